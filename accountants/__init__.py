"""Privacy accounting: histories of noisy steps in, epsilon and delta out. Needs numpy and scipy only."""

from .accountant import IAccountant
from .assumptions import combined_noise_multiplier
from .calibrate import get_noise_multiplier, get_num_steps, get_sample_rate
from .gdp import ApproximateEpsilonWarning, GaussianAccountant
from .pld import PLDAccountant
from .prv import PRVAccountant
from .rdp import RDPAccountant
from .registry import create_accountant, register_accountant

__all__ = [
    "ApproximateEpsilonWarning",
    "GaussianAccountant",
    "IAccountant",
    "PLDAccountant",
    "PRVAccountant",
    "RDPAccountant",
    "combined_noise_multiplier",
    "create_accountant",
    "get_noise_multiplier",
    "get_num_steps",
    "get_sample_rate",
    "register_accountant",
]
