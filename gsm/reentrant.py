"""Naming the cause where a backward runs a piece of the model again: reentrant checkpoints, reversible layers.

Such a `torch.autograd.Function` runs its piece on detached inputs and in a backward of its own, so nothing leads from
there to the samples. Asked only where something is refused anyway: it changes a message, never what is done.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

_BACKWARD = BackwardCFunction.apply.__code__

CHECKPOINT = (
    "torch.utils.checkpoint with use_reentrant=True runs a piece of the model again, during the backward, cut off from "
    "the samples' graph. Let the piece be a module of its own, and pass use_reentrant=False to checkpoint (for a model "
    "of transformers: gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}))."
)
FUNCTION = (
    "{name}, a torch.autograd.Function, runs a piece of the model again in its backward (as reversible layers do), cut "
    "off from the samples' graph. Run that piece in an ordinary forward, to save memory under torch.utils.checkpoint "
    "with use_reentrant=False, or freeze it."
)


def cut_off() -> str | None:
    """What runs the caller within a backward, and what to do about it; None if nothing does.

    A checkpoint that is not reentrant may start inside a Function's backward that asks for its tensors: that is not it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _BACKWARD and frame.f_code.co_name != "unpack_hook":
        frame = frame.f_back
    if frame is None or frame.f_code is not _BACKWARD:
        return None
    function = frame.f_locals["self"]._forward_cls
    return CHECKPOINT if function is CheckpointFunction else FUNCTION.format(name=function.__name__)
