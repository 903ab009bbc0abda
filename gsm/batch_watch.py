"""What an optimizer releases, compared with what its loader drew: the account holds for those batches only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from gsm import drawn
from gsm.ledger import PerSampleGradients
from gsm.optimizer_checks import FEWER_ROWS, JOINED, LARGER, LOWER, MORE_RECORDS, SHARED, UNDRAWN
from gsm.passes import Passes
from gsm.release import PendingRelease

if TYPE_CHECKING:
    from gsm.optimizer_interface import OptimizerInterface


class BatchWatch:
    """Compares the batches of one optimizer with those of its loader."""

    def __init__(self) -> None:
        self.sampler: Any = None
        self.records: int | None = None
        self._unused_draws = self._seen_draws = 0
        self._rows_released = self._batches_released = 0
        self._drawn_first = self._drawn_before = drawn.now()

    def follow(self, sampler: Any) -> None:
        """Compares with what ``sampler`` draws from now on."""
        self.sampler, self._unused_draws, self._seen_draws = sampler, 0, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sampler": None}

    def compare(self, optimizer: OptimizerInterface, pending: PendingRelease) -> None:
        """Compares what was released with what was drawn; batches fetched ahead of time do no harm.

        Raises:
            ValueError: a batch of more than the fixed share of the records that is charged, or a smaller rate charged
                than the loader draws with.
        """
        records, rows, rate = self.records, pending.largest, optimizer.sample_rate
        drawing = getattr(self.sampler, "sample_rate", 0.0)
        if not isinstance(rate, Real) or rate < 0:
            rate = 1.0  # nothing can be charged, which is said there
        if optimizer.accountant is not None and rate < drawing * (1 - 1e-9):
            raise ValueError(LOWER.format(rate=rate, drawn=drawing))
        if records is not None and rows > rate * records * (1 + 1e-9):
            raise ValueError(LARGER.format(rows=rows, records=records, rate=rate, share=rows / records))
        if self.sampler is None and not optimizer.independent_batches:
            self._compare_parts(optimizer, pending)
        if self.sampler is None or not getattr(self.sampler, "counted", True):
            return
        self._unused_draws += self.sampler.drawn - self._seen_draws - pending.samples
        self._seen_draws = self.sampler.drawn
        if self._unused_draws < 0:
            self._unused_draws = 0
            optimizer.warn_once(UNDRAWN)
        since, self._drawn_before = drawn.sizes_since(self._drawn_before), drawn.now()
        # Something may have fetched ahead: then what is released was drawn a little earlier.
        if (
            pending.samples == 1
            and 0 < rows < min(since, default=0)
            and rows not in drawn.sizes_since(max(drawn.now() - 8, self._drawn_first))
        ):
            optimizer.warn_once(FEWER_ROWS.format(rows=rows, records=min(since)))

    def _compare_parts(self, optimizer: OptimizerInterface, pending: PendingRelease) -> None:
        """Says if batches hold more records than ``expected_batch_size``, where no loader is known that draws them.

        Parts of one size that virtual_step() joined are cut from fixed batches, which hold no more than that. Others
        may be Poisson samples: by chance, one look in 10^9 at most says what is not so.
        """
        expected = optimizer.expected_batch_size
        if expected is None or optimizer.loss_reduction != "mean" or pending.samples != 1:
            return
        self._rows_released += pending.largest
        self._batches_released += 1
        parts, whole = pending.parts, math.floor(expected) + 1  # it may have been rounded down
        if len(parts) > 1 and pending.by_hand:
            fixed = len(set(parts)) == 1 and sum(parts) > expected * (1 + 1e-9)
            if fixed or _unlikely(sum(parts), whole):
                optimizer.warn_once(JOINED.format(rows=sum(parts), parts=len(parts), expected=expected))
                return
        rows, batches = self._rows_released, self._batches_released
        if optimizer.accountant is not None and _unlikely(rows, batches * whole):
            rate = optimizer.sample_rate
            optimizer.warn_once(MORE_RECORDS.format(rows=rows, batches=batches, expected=expected, rate=rate))

    def more_rows(
        self, batches: Sequence[PerSampleGradients], of_drawn: tuple[int, int] | None
    ) -> tuple[int, int] | None:
        """(rows, records) of a batch with more rows than the loader's batches have records; ``of_drawn`` if drawn."""
        most = getattr(self.sampler, "batch_size", None) if isinstance(self.sampler, Passes) else None
        rows = max(batch.batch_size for batch in batches)
        return (rows, most) if most is not None and rows > most else of_drawn

    def only_looked_at(self) -> None:
        """A batch that was drawn is for no release: it was asked for where no gradient is computed."""
        self._unused_draws -= 1

    def compare_users(self, optimizer: OptimizerInterface, records: int, users: int) -> None:
        """Says if users share the records of a batch, and the accountant is charged the rate of a record."""
        rate = getattr(self.sampler, "sample_rate", None)
        if rate is not None and 0 < users < records and (optimizer.sample_rate or 0) <= rate < 1:
            optimizer.warn_once(SHARED.format(records=records, users=users, rate=rate))


def _unlikely(records: float, mean: float) -> bool:
    """Whether Poisson samples of ``mean`` records hold so many less than once in 10^9 times (Chernoff's bound)."""
    return records > mean and records - mean - records * math.log(records / mean) < -9 * math.log(10)
