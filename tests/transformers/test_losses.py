"""Losses that a model computes inside: those that mix samples are refused, the others let through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gsm.layout import SamplesInfluenceEachOther
from gsm.wrapper import GradSampleModule
from tests.transformers.architectures import Architecture, build, inputs_for

GPT2 = Architecture("causal", "gpt2", "GPT2LMHeadModel")
MIXTRAL = Architecture("causal", "mixtral", "MixtralForCausalLM")
BERT = Architecture("classification", "bert", "BertForSequenceClassification")


def _case(architecture: Architecture) -> tuple[nn.Module, dict[str, Any]]:
    model = build(architecture)
    return model, inputs_for(architecture, model, 3, 8)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_mean_over_the_tokens_of_the_batch_is_refused(mode: str) -> None:
    """Also where the first batch happens to have no padding: a later one will."""
    model, inputs = _case(GPT2)
    wrapped = GradSampleModule(model, mode=mode)
    with pytest.raises(SamplesInfluenceEachOther, match=r"loss.*per_sample_loss"):
        wrapped(**inputs, labels=inputs["input_ids"])


def test_without_labels_the_same_model_is_fine() -> None:
    model, inputs = _case(GPT2)
    GradSampleModule(model)(**inputs).logits.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mean_over_samples_is_let_through(reduction: str) -> None:
    model, inputs = _case(BERT)
    wrapped = GradSampleModule(model, loss_reduction=reduction)
    labels = torch.tensor([0, 1, 1])
    if reduction == "sum":
        with pytest.raises(SamplesInfluenceEachOther, match="loss_reduction"):
            wrapped(**inputs, labels=labels)
    else:
        wrapped(**inputs, labels=labels).loss.backward()


def test_a_load_balancing_loss_is_refused_with_its_switch() -> None:
    model, inputs = _case(MIXTRAL)
    with pytest.raises(SamplesInfluenceEachOther, match="output_router_logits = False"):
        GradSampleModule(model)(**inputs, output_router_logits=True)
    GradSampleModule(build(MIXTRAL))(**inputs).logits.sum().backward()


class _OwnLoss(nn.Module):
    def __init__(self, mixing: bool):
        super().__init__()
        self.fc, self.mixing = nn.Linear(4, 2), mixing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x).pow(2).sum(1)
        return torch.logsumexp(y, 0) if self.mixing else y.mean()


def test_a_model_that_returns_its_loss() -> None:
    GradSampleModule(_OwnLoss(False))(torch.randn(3, 4)).backward()
    with pytest.raises(SamplesInfluenceEachOther, match="the model's output"):
        GradSampleModule(_OwnLoss(True))(torch.randn(3, 4))
