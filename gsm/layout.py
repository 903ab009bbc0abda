"""Where the batch lies in a tensor.

Samplers want the batch in front. Inside a model it may be elsewhere: second (sequence first), or flattened together
with the positions. Shapes alone cannot tell when a sequence is as long as the batch, so :mod:`gsm.probe` runs the
model at two batch sizes and compares; :func:`guess` is for tensors the probe has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class Unresolvable(RuntimeError):
    """A parameter is used in a way that cannot be taken apart by sample; the subtree around it has to be.

    ``subtree`` is set where a subtree was already taken as a whole, and that did not do.
    """

    def __init__(self, message: str, parameters: tuple[str, ...] = (), subtree: str | None = None):
        super().__init__(message)
        self.parameters, self.subtree = parameters, subtree


@dataclass(frozen=True)
class Layout:
    """The batch is dimension ``dim``; ``flat`` says whether and how positions are folded into it.

    ``"major"``: rows ordered sample by sample, ``[B * T]``; ``"minor"``: position by position, ``[T * B]``.
    """

    dim: int = 0
    flat: str = ""

    def to_front(self, x: Tensor, batch_size: int) -> Tensor:
        """``x`` with the batch as its own first dimension (positions, if any were folded in, follow)."""
        if not self.flat:
            return x if self.dim == 0 else x.movedim(self.dim, 0)
        positions = x.shape[self.dim] // max(batch_size, 1)
        if self.flat == "major":
            return x.unflatten(self.dim, (batch_size, positions)).movedim((self.dim, self.dim + 1), (0, 1))
        return x.unflatten(self.dim, (positions, batch_size)).movedim((self.dim + 1, self.dim), (0, 1))


BATCH_FIRST = Layout(0)
UNKNOWN = Layout(-1)  # the probe saw the tensor and could not tell
BATCH_SECOND = Layout(1)


def guess(
    shape: tuple[int, ...], batch_size: int, *, depends: bool, batch_first: bool, batch_dim: int | None = None
) -> Layout | None:
    """The likely layout of a tensor of this shape, or None if it seems to have no batch dimension.

    Args:
        shape: the tensor's shape.
        batch_size: samples in the physical batch.
        depends: the tensor is known to depend on the samples (it carries a gradient).
        batch_first: the convention the user stated.
        batch_dim: what the caller, a layer that knows more than the shape, takes for the batch dimension.
    Raises:
        Unresolvable: if it depends on the samples but no dimension fits.
    """
    preferred = 0 if batch_first or len(shape) < 2 else 1
    if batch_dim is not None:
        preferred = batch_dim
        if batch_size and shape[preferred] > batch_size and shape[preferred] % batch_size == 0 and depends:
            return Layout(preferred, "major")
    if len(shape) > preferred and shape[preferred] == batch_size:
        return Layout(preferred)
    matching = [i for i, n in enumerate(shape) if n == batch_size]
    if matching:
        return Layout(matching[0])
    if len(shape) and batch_size > 1 and shape[0] and shape[0] % batch_size == 0 and depends:
        return Layout(0, "major")
    if depends:
        raise Unresolvable(f"no dimension of a tensor of shape {tuple(shape)} fits the batch of {batch_size}")
    return None
