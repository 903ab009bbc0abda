"""Losses with one entry per sample, for the heads of transformers models.

`model(**batch).loss` averages over the tokens of the whole batch: how much one sample counts then depends on how many
tokens its neighbours have, and clipping no longer bounds what one record changes. Here every sample has its own loss,
the one that the model itself computes when the sample is alone in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label that transformers and torch leave out of a loss

TASKS = (
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "question_answering",
)
# What transformers calls an output class says which head made it; the order matters.
_BY_OUTPUT = (
    ("Seq2SeqLM", "seq2seq_lm"),
    ("CausalLM", "causal_lm"),
    ("MaskedLM", "masked_lm"),
    ("TokenClassifier", "token_classification"),
    ("QuestionAnswering", "question_answering"),
)


def per_sample_loss(
    outputs: Any, labels: Any, *, task: str | None = None, label_smoothing: float = 0.0, virtual_tokens: int = 0
) -> Tensor:
    """The loss of every sample: what the model's own loss would be with that sample alone in the batch.

    A sample without any label to predict (all of them -100) has loss 0, where the model's own mean is 0 / 0.

    Args:
        outputs: the model's output (or a dict, a tuple that starts with the logits, or the logits).
        labels: as the model takes them: `[batch]`, `[batch, classes]` or `[batch, tokens]`; the batch itself, a mapping
            with "labels" (or "start_positions" and "end_positions"); or that pair.
        task: one of :data:`TASKS`; needed only where neither the output's class nor the shapes tell.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        virtual_tokens: positions in front of the sample's own tokens (prompt tuning), which have logits and no labels.

    Returns:
        Losses `[batch]`, float32 or better.

    Raises:
        ValueError: the head is not clear, shapes do not fit, or the output has no loss of single samples (CLIP).

    Example:
        >>> loss = per_sample_loss(model(input_ids=ids), labels=ids)
        >>> loss.mean().backward()
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    if _get(outputs, "logits_per_image") is not None:
        raise ValueError(
            "a contrastive loss compares every sample with all others of its batch: it has no per-sample gradients, "
            "and no clipping of single records makes it private"
        )
    labels = _labels(labels)
    if isinstance(labels, tuple):
        return _question_answering(outputs, labels)
    logits = _logits(outputs)
    if virtual_tokens:
        logits = logits[:, virtual_tokens:]
    task = task or _task(outputs, logits, labels)
    if logits.shape[0] != labels.shape[0]:
        raise ValueError(f"logits of {logits.shape[0]} samples and labels of {labels.shape[0]}: one label per sample")
    if task in ("multi_label", "regression"):
        return _elementwise(logits, labels, task)
    if task == "classification":
        _expect(labels.dim() == 1 and logits.dim() == 2, "logits [batch, classes] and labels [batch]", logits, labels)
        return F.cross_entropy(_wide(logits), labels, reduction="none", label_smoothing=label_smoothing)
    if task == "causal_lm":
        _expect(logits.shape[:2] == labels.shape, "logits [batch, tokens, vocabulary] and labels", logits, labels)
        logits, labels = logits[:, :-1], labels[:, 1:]  # position t predicts token t + 1
    _expect(logits.dim() >= 3 and logits.shape[:-1] == labels.shape, "logits [..., classes] and labels", logits, labels)
    return _own_mean(logits, labels, label_smoothing)


def _own_mean(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy averaged over the labelled positions of each sample: logits `[batch, ..., classes]`."""
    flat = F.cross_entropy(
        _wide(logits).reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    losses = flat.view(labels.shape).flatten(1).sum(1)
    return losses / (labels != IGNORED).flatten(1).sum(1).clamp(min=1)


def _elementwise(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """A mean over a sample's own outputs, `[batch, outputs]`."""
    size, outputs = logits.shape[0], logits.flatten(1).shape[1]
    _expect(labels.numel() == logits.numel(), "one number per output", logits, labels)
    logits, target = _wide(logits).reshape(size, outputs), labels.reshape(size, outputs)
    target = target.to(logits.dtype)
    if task == "regression":
        return F.mse_loss(logits, target, reduction="none").mean(1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)


def _question_answering(outputs: Any, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Half the cross entropy of the start plus half that of the end; positions beyond the text are left out."""
    total: Tensor | None = None
    for name, position in zip(("start_logits", "end_logits"), positions, strict=True):
        logits = _get(outputs, name)
        if logits is None:
            raise ValueError(f"start and end positions go with an output that has {name}, not {_describe(outputs)}")
        position = position.squeeze(-1) if position.dim() > 1 else position
        outside = logits.shape[1]
        target = position.clamp(0, outside)
        loss = F.cross_entropy(_wide(logits), target, reduction="none", ignore_index=outside)
        total = loss if total is None else total + loss
    assert total is not None
    return total / 2


def _task(outputs: Any, logits: Tensor, labels: Tensor) -> str:
    for word, task in _BY_OUTPUT:
        if word in type(outputs).__name__:
            return task
    whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
    if logits.dim() == 2 and logits.shape[1] == 1 and labels.numel() == logits.numel():
        return "regression"
    if logits.dim() == 2 and labels.dim() == 1 and whole:
        return "classification"
    if logits.dim() == 2 and labels.shape == logits.shape and labels.is_floating_point():
        return "multi_label"
    raise ValueError(
        f"which loss belongs to {_describe(outputs)} with logits {tuple(logits.shape)} and {labels.dtype} labels "
        f"{tuple(labels.shape)} is not clear: say it with task=, one of {', '.join(TASKS)}"
    )


def _labels(labels: Any) -> Any:
    if isinstance(labels, Mapping) or hasattr(labels, "data") and isinstance(labels.data, dict):
        if labels.get("labels") is not None:
            return labels["labels"]
        if labels.get("start_positions") is not None and labels.get("end_positions") is not None:
            return (labels["start_positions"], labels["end_positions"])
        raise ValueError(
            f"the batch has neither labels nor start_positions and end_positions, only {', '.join(labels) or 'nothing'}"
        )
    if isinstance(labels, tuple | list) and len(labels) == 2 and all(isinstance(x, Tensor) for x in labels):
        return tuple(labels)
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a tensor, the batch, or (start_positions, end_positions), got {type(labels)}")
    return labels


def _logits(outputs: Any) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else _get(outputs, "logits")
    if logits is None and isinstance(outputs, tuple | list) and outputs:
        logits = next((x for x in outputs if isinstance(x, Tensor) and x.dim() > 1), None)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ValueError(
            f"{_describe(outputs)} has no logits [batch, ...]: pass them, or the output of a model with a head"
        )
    return logits


def _get(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _describe(outputs: Any) -> str:
    return f"a {type(outputs).__name__}"


def _expect(condition: bool, wanted: str, logits: Tensor, labels: Tensor) -> None:
    if not condition:
        raise ValueError(
            f"expected {wanted} of the same leading shape, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
