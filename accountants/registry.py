"""Accountants by name."""

from __future__ import annotations

from typing import Any

from .accountant import IAccountant
from .gdp import GaussianAccountant
from .pld import PLDAccountant
from .prv import PRVAccountant
from .rdp import RDPAccountant

_ACCOUNTANTS: dict[str, type[Any]] = {
    "rdp": RDPAccountant,
    "gdp": GaussianAccountant,
    "prv": PRVAccountant,
    "pld": PLDAccountant,
}


def register_accountant(mechanism: str, accountant: type[Any], force: bool = False) -> None:
    """Make ``create_accountant(mechanism)`` build ``accountant``.

    Args:
        mechanism: the name.
        accountant: a class with the interface of :class:`accountants.IAccountant`, built without arguments.
        force: replace what the name stands for.

    Raises:
        ValueError: the name is taken and ``force`` is not set.
    """
    if mechanism in _ACCOUNTANTS and not force:
        raise ValueError(f"Accountant for mechanism {mechanism} is already registered; force=True replaces it")
    _ACCOUNTANTS[mechanism] = accountant


def create_accountant(mechanism: str) -> IAccountant:
    """A fresh accountant: "pld", "prv", "rdp", "gdp" or a registered name.

    Raises:
        ValueError: the name is not registered.
    """
    if mechanism not in _ACCOUNTANTS:
        raise ValueError(f"Unexpected accounting mechanism: {mechanism!r}; registered are {sorted(_ACCOUNTANTS)}")
    return _ACCOUNTANTS[mechanism]()
