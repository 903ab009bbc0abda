"""The history as an event of Google's dp_accounting, for a second opinion; needed only when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import checks


def to_dp_event(history: Sequence[Sequence[Any]]) -> Any:
    """``history`` as a ``dp_accounting.DpEvent`` (Poisson-sampled Gaussians, self-composed, composed).

    Raises:
        ImportError: dp_accounting is not installed (``pip install dp-accounting``).

    Example:
        >>> event = to_dp_event([(1.1, 0.01, 100)])  # doctest: +SKIP
        >>> dp_accounting.pld.PLDAccountant().compose(event).get_epsilon(1e-5)  # doctest: +SKIP
    """
    entries = checks.history(history)
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError("to_dp_event needs dp_accounting: pip install dp-accounting") from error
    events = []
    for sigma, q, count in entries:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        event = gaussian if q == 1 else dp_accounting.PoissonSampledDpEvent(q, gaussian)
        events.append(dp_accounting.SelfComposedDpEvent(event, count))
    return dp_accounting.ComposedDpEvent(events)
