"""The sum that is being built up for one release, and what one record can have contributed to it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from gsm.clipping import Clipped


class PendingRelease:
    """Clipped sums of one or more physical batches that will leave together in one release.

    A *sample* is what the sampler drew at once (the logical batch). Physical batches that join one sample hold
    different records, so the largest of their bounds holds for the sample; two samples can hold the same record, so
    the bounds of samples add up.

    Formal guarantee: if every record is in at most one physical batch of a sample, one record changes ``sums`` by at
    most ``sensitivity`` in l2 (triangle inequality over the samples), and ``statistic`` by at most
    ``statistic_sensitivity``.
    """

    def __init__(self) -> None:
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.statistic: Tensor | None = None
        self.statistic_sensitivity = 0.0
        self.samples = 0
        #: Rows of the largest sample.
        self.largest = 0
        #: Whether the next physical batch is another part of the current sample.
        self.joins = False
        #: Whether the caller alone says what belongs together, and no loader.
        self.by_hand = False
        #: Rows of each physical batch of the sample under way.
        self.parts: list[int] = []
        self._earlier = 0.0
        self._current = 0.0
        self._pass = self._rows = 0
        self._groups: frozenset[Hashable] = frozenset()

    @property
    def sensitivity(self) -> float:
        return self._earlier + self._current

    def enter(self, number: int) -> None:
        """What comes next is of this pass over the data. Every record is in every pass: another begins a sample."""
        self.joins = self.joins and number == self._pass
        self._pass = number

    def check(self, clipped: Clipped) -> None:
        """Raises ValueError if a user of this batch was in an earlier physical batch of the same sample."""
        twice = self._groups & clipped.groups if self.joins else frozenset()
        if twice:
            raise ValueError(
                f"The records of {len(twice)} user(s), {sorted(twice, key=str)[:3]} among them, are spread over "
                "several physical batches of one logical batch, so each would contribute once per physical "
                "batch: keep all records of a user in one physical batch."
            )

    def add(self, params: Sequence[nn.Parameter], sums: Sequence[Tensor], clipped: Clipped) -> None:
        """Adds one physical batch: the weighted sums of ``params`` and what clipping said about them."""
        rows = clipped.weights.shape[-1]
        self.parts = [*self.parts, rows] if self.joins else [rows]
        if self.joins:
            self._current = max(self._current, clipped.sensitivity)
            self._rows += rows
            self._groups |= clipped.groups
        else:
            self._earlier += self._current
            self._current, self._rows = clipped.sensitivity, rows
            self._groups = clipped.groups
            self.samples += 1
            self.statistic_sensitivity += clipped.statistic_sensitivity
        self.largest = max(self.largest, self._rows)
        for p, total in zip(params, sums, strict=True):
            held = self.sums.get(p)
            self.sums[p] = total if held is None else held.add_(total)
        if clipped.statistic is not None:
            self.statistic = clipped.statistic if self.statistic is None else self.statistic + clipped.statistic
