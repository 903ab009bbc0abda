"""Adapters of peft: their gradients and nobody else's, saved and merged as peft does."""

from __future__ import annotations

import copy

import pytest
import torch

peft = pytest.importorskip("peft", reason="needs the transformers extra")

from gsm.losses import per_sample_loss  # noqa: E402
from gsm.optimizer import DPOptimizer  # noqa: E402
from gsm.transformers import DPTrainer, PrivacyArguments  # noqa: E402
from gsm.wrapper import GradSampleModule  # noqa: E402
from tests.compare import captured  # noqa: E402
from tests.integrations.tiny import VOCABULARY, arguments, bert, classified, gpt2, pad, sequences  # noqa: E402
from tests.loop import assert_close_per_sample  # noqa: E402

TOKENS = 5
LORA = {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(**LORA, task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True, task_type="CAUSAL_LM"),
    "lora on the embedding": lambda: peft.LoraConfig(
        r=2, target_modules=["wte", "c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}
VIRTUAL = {"prompt tuning": 3, "p-tuning": 3}


def adapted(name):
    model = peft.get_peft_model(gpt2().double(), CONFIGS[name]()).double().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # peft starts many of them at zero, where half of the gradients vanish
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def ids(batch=4):
    return torch.randint(0, VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(2))


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def loop(model, losses, rows):
    params = trainable(model)
    found = [torch.autograd.grad(losses(model, row).sum(), list(params.values())) for row in rows.split(1)]
    return {n: torch.stack([g[k] for g in found]) for k, n in enumerate(params)}


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_adapters(name, mode):
    def losses(model, rows):
        return per_sample_loss(model(input_ids=rows), rows, task="causal_lm", virtual_tokens=VIRTUAL.get(name, 0))

    model = adapted(name)
    expected = loop(copy.deepcopy(model), losses, ids())
    assert min(g.norm() for g in expected.values()) > 0
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    losses(model, ids()).sum().backward()
    assert_close_per_sample(captured(model), expected)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None and getattr(p, "grad_sample", None) is None for p in frozen)
    named = {n for entry in wrapped.plan.entries.values() for n in entry.parameters}
    assert len(named) == len(expected), "the plan holds the adapters and nothing else"


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_bitfit_by_requires_grad(mode):
    model = bert().double().train()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias") or name.startswith("classifier"))

    def losses(model, rows):
        return per_sample_loss(model(input_ids=rows), rows[:, 0] % 2)

    expected = loop(copy.deepcopy(model), losses, ids())
    GradSampleModule(model, mode=mode, loss_reduction="sum")
    losses(model, ids()).sum().backward()
    assert_close_per_sample(captured(model), expected, 1e-7)


def test_many_frozen_layers_between_the_adapters_take_no_memory():
    """Where the batch lies is looked up through all frozen layers, and every reshape on the way multiplies the rows."""
    model = peft.get_peft_model(bert(layers=8), peft.LoraConfig(r=2, target_modules=["query", "value"])).train()
    wrapped = GradSampleModule(model, mode="auto", loss_reduction="sum")
    rows = torch.randint(1, VOCABULARY, (8, 16))
    model(input_ids=rows).logits.sum().backward()
    assert wrapped.per_sample_gradient_norms.shape == (8,)


def private_step(model):
    optimizer = DPOptimizer(
        torch.optim.SGD(trainable(model).values(), lr=0.5),
        noise_multiplier=0.1,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    optimizer.step(loss=per_sample_loss(model(input_ids=ids()), ids(), task="causal_lm"))


def test_adapters_are_saved_and_merged_as_usual(tmp_path):
    base = gpt2()
    model = peft.get_peft_model(copy.deepcopy(base), CONFIGS["lora"]()).train()
    wrapped = GradSampleModule(model, mode="ghost")
    private_step(model)
    wrapped.save_pretrained(tmp_path)
    expected = model.eval()(ids()).logits.detach()
    assert not torch.allclose(expected, base.eval()(ids()).logits)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(ids()).logits, expected)
    merged = model.merge_and_unload()
    assert not any("lora" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(merged.eval()(ids()).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_disabled_adapter_is_the_base_model():
    base = gpt2().eval()
    model = peft.get_peft_model(copy.deepcopy(base), CONFIGS["lora"]()).train()
    GradSampleModule(model)
    private_step(model)
    with model.disable_adapter():
        torch.testing.assert_close(model.eval()(ids()).logits, base(ids()).logits)


@pytest.mark.parametrize("name", ["lora", "prompt tuning"])
def test_trainer_with_adapters(tmp_path, name):
    model = peft.get_peft_model(gpt2(), CONFIGS[name]())
    old = copy.deepcopy(model)
    run = DPTrainer(
        model,
        arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2),
        privacy=PrivacyArguments(noise_multiplier=1.0),
        train_dataset=sequences(8),
        data_collator=pad,
    )
    run.train()
    assert run.accountant.history == [(1.0, 0.5, 2)]
    moved = {n for (n, p), q in zip(model.named_parameters(), old.parameters(), strict=True) if not torch.equal(p, q)}
    assert moved == set(trainable(model))
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_trainer_with_a_classifier_and_lora(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(bert(), config)
    run = DPTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        privacy=PrivacyArguments(target_epsilon=5.0),
        train_dataset=classified(8),
        data_collator=pad,
    )
    run.train()
    assert run.get_epsilon() <= 5.0 and "epsilon" in run.state.log_history[0]
