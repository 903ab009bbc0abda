"""Models from transformers, built from a configuration: nothing is downloaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Logits(nn.Module):
    """A transformers model that takes one positional tensor and returns its logits.

    ``places``: hand over position ids of shape `[B, T]` instead of letting the model make its own of shape `[1, T]`,
    whose embedding gradient most peers cannot attribute to samples.
    """

    def __init__(self, model: nn.Module, *, places: bool = False):
        super().__init__()
        self.model, self.places = model, places

    def forward(self, x: Tensor) -> Tensor:
        extra: dict[str, Any] = {}
        if self.places:
            extra = {"position_ids": x.new_ones(x.shape).cumsum(-1) - 1, "use_cache": False}
        return self.model(x, **extra).logits


def gpt2(*, vocab: int, width: int, layers: int, heads: int, positions: int) -> Logits:
    """GPT-2 with its output layer tied to the token embedding; ids `[B, T]` to logits `[B, T, vocab]`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab, n_embd=width, n_layer=layers, n_head=heads, n_positions=positions,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Logits(GPT2LMHeadModel(config), places=True)


def vit(*, image: int, patch: int, width: int, layers: int, heads: int, classes: int = 10) -> Logits:
    """A vision transformer, with its class token and position table as bare parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=image, patch_size=patch, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Logits(ViTForImageClassification(config))
