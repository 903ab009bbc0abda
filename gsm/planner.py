"""Which reading of a capture to keep: the per-sample gradients, or the pair (activations, output gradients).

Kept gradients cost memory, one copy of the layer's parameters per sample, and make clipping cheap: their norms and
their weighted sum are one pass over memory each. A kept pair costs the captured tensors, and the norm has to be
computed from them. Which is better depends on the layer and its shapes, so it is decided layer by layer:

* ``ghost``: whatever takes less memory;
* ``auto``: whatever takes less time, as long as what is kept at the backward's end is not more than the activations
  that the non-private step holds at its beginning, and a tenth. (A backward frees activations while it keeps gradients,
  so those two ends are its peaks.)

The constants are rates of a 2-core CPU in float32 (matrix products 140 Gflop/s, one pass over memory 33 GB/s: the
ordinary weight gradient of `B=16 T=128 d=256 p=1024` takes 7.7 ms, its norms over 16.8 MB of kept gradients 0.5 ms).
Only their ratio matters, and on accelerators it is larger: there products are cheaper still.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from grad_samplers.conv import CONV_TRANSPOSE, CONVOLUTIONS
from grad_samplers.conv_capture import convolution
from grad_samplers.conv_norms import costs
from gsm.contributions import Record

FLOPS_PER_SECOND = 140e9
BYTES_PER_SECOND = 33e9
#: Every sample's weight gradient of a convolution, in times of the batch's (1.05 to 3, by shape).
CONV_GRADIENTS = 1.7


@dataclass
class Choice:
    """One layer's options, per sample: bytes kept and seconds beyond the ordinary step's."""

    kept_bytes: float
    pair_bytes: float
    kept_seconds: float
    pair_seconds: float
    keep: bool = False

    @property
    def extra_bytes(self) -> float:
        return self.kept_bytes - self.pair_bytes

    @property
    def saved_seconds(self) -> float:
        return self.pair_seconds - self.kept_seconds

    def summary(self) -> str:
        """The estimate behind the choice, for the plan's table."""
        held, seconds = (self.kept_bytes, self.kept_seconds) if self.keep else (self.pair_bytes, self.pair_seconds)
        return f"{held / 1024:.1f} KiB and {seconds * 1e6:.2f} us a sample"


class Planner:
    """Decides per layer and shape; what it has not seen yet is kept by what is certain to be lean."""

    def __init__(self, mode: str, memory_budget: int | None = None):
        self.mode, self.memory_budget = mode, memory_budget
        self.activation_bytes = 0.0  # per sample, of the non-private step; measured before the first batch
        self.choices: dict[tuple[object, ...], Choice] = {}
        self._settled = True
        self._largest_batch = 1
        # Inputs that are held already in this backward, with the first choice that counts them (None: several do).
        self._held: dict[tuple[int, int], Choice | None] = {}
        self._shared_bytes = 0.0

    def keeps(self, record: Record, key: object) -> bool:
        """Whether this record's gradients are to be materialised now."""
        place = (key, *record.backprops.shape[1:]) if isinstance(record.backprops, Tensor) else (key,)
        choice = self.choices.get(place)
        if choice is None:
            choice = self.choices[place] = measure(record)
            choice.keep = choice.extra_bytes <= 0
            if not choice.keep:
                self._count_once(record, choice)
            self._settled = self._settled and self.mode != "auto"
        self._largest_batch = max(self._largest_batch, record.batch_size)
        return choice.keep

    def _count_once(self, record: Record, choice: Choice) -> None:
        """An input of several layers (query, key and value) is held once, and until the last of them is kept."""
        for x in record.activations:
            if isinstance(x, Tensor):
                place, size = (x.data_ptr(), x.numel()), x.numel() * x.element_size() / max(record.batch_size, 1)
                if place not in self._held:
                    self._held[place] = choice
                    continue
                first = self._held[place]
                if first is not None:
                    first.pair_bytes -= size
                    self._shared_bytes += size
                    self._held[place] = None
                choice.pair_bytes -= size

    def settle(self) -> None:
        """After a backward that showed new layers or shapes: spends the budget where it saves most per byte."""
        self._held.clear()
        if self._settled:
            return
        self._settled = True
        kept = self._shared_bytes + sum(min(c.kept_bytes, c.pair_bytes) for c in self.choices.values())
        budget = (
            1.1 * self.activation_bytes
            if self.memory_budget is None
            else self.memory_budget / self._largest_batch + kept
        )
        for c in self.choices.values():
            c.keep = c.extra_bytes <= 0
        # Of equal layers those that a backward reaches last: by then it has freed the most.
        worth = [c for c in reversed(self.choices.values()) if c.extra_bytes > 0 and c.saved_seconds > 0]
        for c in sorted(worth, key=lambda c: c.saved_seconds / c.extra_bytes, reverse=True):
            if kept + c.extra_bytes <= budget:
                c.keep = True
                kept += c.extra_bytes


def measure(record: Record) -> Choice:
    """The cost of either reading of a record, per sample."""
    layer, batch = record.layer, max(record.batch_size, 1)
    tensors = [t for t in (*record.activations, record.backprops) if isinstance(t, Tensor)]
    pair_bytes = sum(t.numel() * t.element_size() for t in tensors) / batch
    params = [p for p in vars(layer).values() if isinstance(p, Tensor)] if not isinstance(layer, nn.Module) else []
    params = params or [p for p in getattr(layer, "_parameters", {}).values() if p is not None]
    trainable = [p for p in params if p.requires_grad]
    entries = sum(p.numel() for p in trainable)
    kept_bytes = float(sum(p.numel() * max(p.element_size(), 4) for p in trainable))
    kept_seconds = 2 * kept_bytes / BYTES_PER_SECOND
    again = record.backprops.numel() / batch if isinstance(record.backprops, Tensor) else 0.0
    if record.sampler.cls is nn.Embedding:
        return Choice(
            kept_bytes, pair_bytes, kept_seconds + kept_bytes / BYTES_PER_SECOND, 4 * pair_bytes / BYTES_PER_SECOND
        )
    if record.sampler.cls is nn.Linear:
        pair_seconds = _linear_pair_seconds(record, batch)
        return Choice(kept_bytes, pair_bytes, kept_seconds, pair_seconds)
    if record.sampler.cls in CONVOLUTIONS:
        return _conv_choice(record, kept_bytes, pair_bytes, batch)
    # Elsewhere the norm of a pair is that of its materialised gradient: the layer's own work is done twice.
    kernel = entries / max(record.backprops.shape[1], 1) if again and record.backprops.dim() > 1 else 1.0
    pair_seconds = 2 * again * kernel / FLOPS_PER_SECOND + kept_seconds + pair_bytes / BYTES_PER_SECOND
    return Choice(kept_bytes, pair_bytes, kept_seconds, pair_seconds)


def _linear_pair_seconds(record: Record, batch: int) -> float:
    """`T^2 (d + p)` for the Gram matrices, or the gradient itself a second time, whichever is less."""
    p, d = record.backprops.shape[-1], record.activations[0].shape[-1]
    t = record.backprops.numel() / batch / max(p, 1)
    if t <= 1:
        return 2 * (p + d) * 4 / BYTES_PER_SECOND
    return 2 * t * min(t * (d + p), d * p) / FLOPS_PER_SECOND + 4 * (p + d) * t / BYTES_PER_SECOND


def _conv_choice(record: Record, kept_bytes: float, pair_bytes: float, batch: int) -> Choice:
    """Kept gradients cost what making them costs more than the batch's; a pair the cheapest way to its norm."""
    captured = convolution(
        record.layer, record.activations, record.backprops, transposed=record.sampler.cls in CONV_TRANSPOSE
    )
    seconds = {way: 2 * n * len(captured.x) / batch / FLOPS_PER_SECOND for way, n in costs(captured).items()}
    passes = 2 * kept_bytes / BYTES_PER_SECOND
    made = seconds.pop("gradient")
    norms = min([CONV_GRADIENTS * made + passes, *seconds.values()])
    kept_seconds = (CONV_GRADIENTS - 1) * made + passes
    return Choice(kept_bytes, pair_bytes, kept_seconds, norms + pair_bytes / BYTES_PER_SECOND)
