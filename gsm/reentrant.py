"""Naming the cause where activation checkpointing cuts the graph: ``checkpoint(..., use_reentrant=True)``.

That kind runs its piece of the model again during the backward, on detached inputs and in a backward of its own, so
nothing leads from there to the samples. Asked only where something is refused anyway: it changes a message, never what
is done.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch.utils.checkpoint import CheckpointFunction

_BACKWARD = CheckpointFunction.backward.__code__

CUT_OFF = (
    "torch.utils.checkpoint with use_reentrant=True runs a piece of the model again, during the backward, cut off from "
    "the samples' graph. Let the piece be a module of its own, and pass use_reentrant=False to checkpoint (for a model "
    "of transformers: gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}))."
)


def inside_reentrant_checkpoint() -> bool:
    """Whether the caller runs within the backward of such a checkpoint."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _BACKWARD:
        frame = frame.f_back
    return frame is not None
