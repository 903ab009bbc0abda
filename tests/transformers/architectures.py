"""Every architecture of transformers' auto-mappings: its small model and its inputs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from tests.transformers.shrink import OVERRIDES, VOCABULARY, config_class, small_config

TASKS = {
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
EXTRA = (("seq2seq", "whisper", "WhisperForConditionalGeneration"),)  # of other mappings, asked for by name
LARGEST = 6_000_000


class NotBuilt(Exception):
    """The small configuration does not give a model that runs; nothing of ours was involved."""


@dataclass(frozen=True, order=True)
class Architecture:
    """One class of models under one task."""

    task: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.task}-{self.class_name}"


def architectures() -> list[Architecture]:
    """All of them, each class once a task, in a fixed order."""
    found: dict[str, Architecture] = {}
    for task, mapping in TASKS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(f"{task} {name}", Architecture(task, model_type, name))
    for task, model_type, name in EXTRA:
        found.setdefault(f"{task} {name}", Architecture(task, model_type, name))
    return sorted(found.values())


def build(architecture: Architecture) -> nn.Module:
    """The small model, float64, in training mode, its parameters moved away from zeros and ones.

    Raises:
        NotBuilt: if the configuration or the model can't be made.
    """
    try:
        cls = getattr(transformers, architecture.class_name)
        config = _config(architecture, cls)
        torch.manual_seed(0)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > LARGEST:
            raise NotBuilt(f"{size:,} parameters after shrinking")
        torch.manual_seed(0)
        model = cls(config).double().train()
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), alpha=0.05)
    return model


def _config(architecture: Architecture, cls: type) -> Any:
    extra = OVERRIDES.get(f"{architecture.model_type}:{architecture.task}", {})
    config = small_config(config_class(architecture.model_type), extra)
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        inner = config.get_text_config(decoder=True)
        config = inner if isinstance(inner, wanted) else small_config(wanted, extra)
    for name, value in (("pad_token_id", 0), ("decoder_start_token_id", 1)):
        if architecture.task != "image" and getattr(config, name, None) is None:
            setattr(config, name, value)
    config._experts_implementation = "eager"  # the default, grouped_mm, has no float64 kernel
    return config


def inputs_for(architecture: Architecture, model: nn.Module, size: int, length: int) -> dict[str, Tensor]:
    """Keyword arguments for `size` samples of `length` positions; the last sample of several is padded."""
    generator = torch.Generator().manual_seed(size * 100 + length)
    main = model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    config = model.config if architecture.task == "image" else model.config.get_text_config()
    if main == "pixel_values" or (main == "inputs" and architecture.task == "image"):
        return _images(model, main, size, generator, accepted)
    if main == "input_features":
        frames = 2 * model.config.max_source_positions
        out = {main: torch.randn(size, model.config.num_mel_bins, frames, generator=generator).double()}
    else:
        vocabulary = min(getattr(config, "vocab_size", None) or VOCABULARY, 40)
        ids = torch.randint(5, vocabulary, (size, length), generator=generator)
        out = {main: ids}
        if "attention_mask" in accepted:
            mask = torch.ones(size, length, dtype=torch.long)
            if size > 1:
                ids[-1, -2:], mask[-1, -2:] = 0, 0
                ids[-1, -3] = 2
            ids[:-1 if size > 1 else 1, -1] = 2
            out["attention_mask"] = mask
    if "decoder_input_ids" in accepted and architecture.task == "seq2seq":
        out["decoder_input_ids"] = torch.randint(5, 40, (size, length), generator=generator)
    return out


def _images(model: nn.Module, main: str, size: int, generator: torch.Generator, accepted: Any) -> dict[str, Tensor]:
    vision = getattr(model.config, "vision_config", None) or model.config
    side = getattr(vision, "image_size", None) or 32
    side = side if isinstance(side, int) else side[0]
    channels = getattr(vision, "num_channels", 3)
    if "pixel_attention_mask" in accepted and "spatial_shapes" in accepted:  # patches, cut beforehand
        patches = torch.randn(size, 4, channels * vision.patch_size**2, generator=generator).double()
        shapes = torch.full((size, 2), 2)
        return {main: patches, "pixel_attention_mask": torch.ones(size, 4, dtype=torch.long), "spatial_shapes": shapes}
    return {main: torch.randn(size, channels, side, side, generator=generator).double()}
