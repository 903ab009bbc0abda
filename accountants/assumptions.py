r"""What a number rests on: how the batches were drawn, and which data sets count as neighbours.

An epsilon without these two is not a statement. The default, Poisson sampling and neighbours that differ by one record
added or removed, is what Opacus, jax_privacy and most papers mean. What is certified here, for a Gaussian mechanism of
noise multiplier :math:`\sigma` (noise over the bound C on the norm of one record's contribution):

=================  ======================  =============================================================================
sampling           relation                mechanism whose privacy loss is composed
=================  ======================  =============================================================================
poisson            add_remove, zero_out    :math:`(1-q)N(0,\sigma^2)+qN(1,\sigma^2)` against :math:`N(0,\sigma^2)`, both
                                           directions (Zhu, Dong and Wang 2022)
poisson            replace_one             :math:`(1-q)N(0,\sigma^2)+qN(\pm1,\sigma^2)` against each other:
                                           :mod:`accountants.replace`
fixed_size         replace_one             the pair of :mod:`accountants.fixed_size`, at noise over distance
                                           :math:`\sigma/2`
shuffled, cyclic   zero_out, replace_one   Gaussian: a record takes part once per epoch, whatever the order
unsampled          all three               Gaussian with q = 1: a record may take part in every step
=================  ======================  =============================================================================

*Shuffled and cyclic*: for a fixed order the steps a record takes part in are fixed and the others do not depend on it;
a random order chosen without looking at the data is a mixture of such mechanisms, and the hockey-stick divergence is
jointly convex. A pass that is left early counts by its steps, so the next one must go on where it stopped: begun anew,
it has records that were in both, and what the first one lacks has to be charged, as the engine does
(:mod:`gsm.passes`). No amplification by shuffling is claimed; Poisson accounting of shuffled batches can
be far below the truth (Chua et al. 2024, "How private are DP-SGD implementations?"), so it is not offered under that
name.

*Exchanged records* move the sum by up to twice the bound, 2C: hence :math:`\sigma/2`, sampled or not.

*Fixed size*: b of n records without replacement, afresh and independently in every step, b and n public; the sample
rate is b/n. Adding a record changes n, and with it everybody's chance: "add_remove" is refused; "zero_out" is a case of
"replace_one". An epoch cut into batches after shuffling is not this: that is "shuffled".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import checks

SAMPLINGS = {
    "poisson": "Poisson sampling: every record in every batch independently, at the stated rate",
    "fixed_size": "batches of fixed size, drawn without replacement and independently of each other",
    "shuffled": "every record once per epoch in a random order (no amplification claimed)",
    "cyclic": "every record once per epoch in any order",
    "unsampled": "no claim about sampling: a record may be in every batch",
}
RELATIONS = {
    "add_remove": "neighbours differ by one record added or removed",
    "zero_out": "neighbours differ by one record whose contribution is replaced by zero",
    "replace_one": "neighbours differ by one record exchanged for another",
}


@dataclass(frozen=True)
class Segment:
    """``steps`` equal steps.

    ``kind``: "subsampled" (a record added or removed; Poisson), "replaced" (exchanged; Poisson) or "fixed_size"
    (exchanged; batches of fixed size). ``noise_multiplier`` is the noise over the largest move of the sum, except in
    sampled steps of the kind "replaced", where the pair itself has the two records at distance two.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    kind: str = "subsampled"

    @property
    def is_gaussian(self) -> bool:
        """Nothing is sampled: the Gaussian mechanism itself, whose composition is known in closed form."""
        return self.sample_rate == 1


def check_assumptions(sampling: str, relation: str) -> None:
    """Refuse names that do not exist and combinations for which no bound is known here."""
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {sorted(SAMPLINGS)}, got {sampling!r}")
    if relation not in RELATIONS:
        raise ValueError(f"relation must be one of {sorted(RELATIONS)}, got {relation!r}")
    if sampling == "fixed_size" and relation != "replace_one":
        raise ValueError(
            f"no epsilon can be certified for sampling='fixed_size' under relation={relation!r}: the number of records "
            "is public. Use relation='replace_one' (a contribution set to zero is one exchanged for zero), or "
            "sampling='unsampled'"
        )
    if relation == "add_remove" and sampling in ("shuffled", "cyclic"):
        raise ValueError(
            f"no epsilon can be certified for sampling={sampling!r} under relation='add_remove': adding a record "
            "changes which batches the others are in. Use relation='zero_out' or 'replace_one', or "
            "sampling='unsampled'"
        )


def segments(history: Sequence[Sequence[Any]], sampling: str, relation: str) -> list[Segment]:
    """The history as mechanisms with a known privacy curve; checks every number.

    Args:
        history: entries ``(noise_multiplier, sample_rate, num_steps)``.
        sampling, relation: names from :data:`SAMPLINGS` and :data:`RELATIONS`.

    Returns:
        one segment per different mechanism, Gaussian ones (q = 1) merged into one.
    """
    check_assumptions(sampling, relation)
    entries = checks.history(history)
    if sampling in ("shuffled", "cyclic"):
        entries = _participations(entries)
    if sampling == "unsampled":
        entries = [(sigma, 1.0, count) for sigma, _, count in entries]
    if relation != "replace_one":
        return _merge_gaussians([Segment(*entry) for entry in entries])
    kind = "fixed_size" if sampling == "fixed_size" else "replaced"
    # An exchanged record moves the sum by twice the bound; the Poisson pair says so itself.
    return _merge_gaussians([Segment(s if kind == "replaced" and q < 1 else s / 2, q, n, kind) for s, q, n in entries])


def combined_noise_multiplier(noise_multipliers: Sequence[float]) -> float:
    r"""Noise multiplier of ONE Gaussian mechanism that costs what several on the same sampled batch cost together.

    Args:
        noise_multipliers: of each sum released in the same step, each relative to that sum's own sensitivity.

    Returns:
        :math:`(\sum_i \sigma_i^{-2})^{-1/2}`, exact, not an approximation: scale each released sum by its noise's
        standard
        deviation; together they are one vector with unit noise in every direction, and one record moves it by at most
        :math:`\sqrt{\sum_i \sigma_i^{-2}}`. This holds whatever else is sampled, as both use the same batch. (Andrew
        et al.
        2021, "Differentially private learning with adaptive clipping", do so for a gradient and a count.)

    Example:
        >>> round(combined_noise_multiplier([2.0, 2.0]), 6)
        1.414214
    """
    values = [checks.noise_multiplier(value) for value in noise_multipliers]
    if not values:
        raise ValueError("noise_multipliers must hold one value or more, got none")
    return 0.0 if min(values) == 0 else 1 / math.hypot(*(1 / value for value in values))


def _merge_gaussians(parts: list[Segment]) -> list[Segment]:
    """All Gaussian segments as one step: n steps with sigma are one with sigma / sqrt(n)."""
    gaussian = [part for part in parts if part.is_gaussian]
    rest = [part for part in parts if not part.is_gaussian]
    if not gaussian:
        return rest
    if any(part.noise_multiplier == 0 for part in gaussian):
        return [Segment(0.0, 1.0, 1, gaussian[0].kind), *rest]
    inverse = math.sqrt(math.fsum(part.steps / part.noise_multiplier**2 for part in gaussian))
    return [Segment(1 / inverse, 1.0, 1, gaussian[0].kind), *rest]


def _participations(entries: checks.History) -> checks.History:
    """Steps a record can have taken part in when every epoch has it once: the least noisy ones first.

    An entry of n steps at rate q lasts n*q epochs and, starting anywhere in one, holds a record at most ceil(n*q) + 1
    times; all entries together hold it at most ceil(total epochs) times. A rounding error of q is not an epoch.
    """
    epochs = math.fsum(q * count for _, q, count in entries)
    left = math.ceil(epochs * (1 - 1e-9))
    result: checks.History = []
    for sigma, q, count in sorted(entries):
        times = min(left, count, math.ceil(q * count * (1 - 1e-9)) + 1)
        if times:
            result.append((sigma, 1.0, times))
        left -= times
    return result
