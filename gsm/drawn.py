"""How many batches our loaders have handed out: forwards on either side of a hand-out saw different records.

Two forwards whose backward is still to come are two looks at the same records (a siamese network, two augmentations)
and their gradients are added per record before clipping - unless a new batch was drawn in between. Then adding them
would let one record change the clipped sum by twice the bound, so they stay two batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from gsm.window import window

T = TypeVar("T")
_count = 0
_records = 0
_sizes: deque[tuple[int, int]] = deque(maxlen=64)  # the number of the batch, and of its records


def now() -> int:
    """The number of batches handed out so far."""
    return _count


def records() -> int:
    """The number of records in all batches handed out so far."""
    return _records


def sizes_since(count: int) -> list[int]:
    """How many records were in each of the last batches (64 at most) that followed the first ``count``, if known."""
    return [size for number, size in _sizes if number > count]


def counted(
    batches: Iterable[T], sizes: deque[int] | None = None, wanted: Callable[[], bool] = lambda: False
) -> Iterator[T]:
    """The same batches, each counted when it is handed out.

    Args:
        batches: what a loader yields.
        sizes: how many records are in each, appended by the sampler before the batch is fetched.
        wanted: asked of each, whether what is computed with it is to be recorded.
    """
    global _count, _records
    try:
        for batch in batches:
            _count += 1
            if sizes:
                _sizes.append((_count, sizes.popleft()))
                _records += _sizes[-1][1]
            known = wanted() and sizes is not None and bool(_sizes) and _sizes[-1][0] == _count
            window().load(batch, _sizes[-1][1] if known else 0)
            yield batch
            window().pause()  # what it takes to make the next is none of a loss's
    finally:  # of the epoch, or left before
        window().pause()
