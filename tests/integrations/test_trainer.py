"""`DPTrainer` and `DPCallback`: what is sampled, released, charged, logged, saved and resumed."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from opacus.validators import ModuleValidator

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")

from gsm.losses import per_sample_loss  # noqa: E402
from gsm.noise import GaussianNoise  # noqa: E402
from gsm.optimizer import DPOptimizer  # noqa: E402
from gsm.secure_noise import SecureNoise  # noqa: E402
from gsm.transformers import DPCallback, DPTrainer, PrivacyArguments  # noqa: E402
from gsm.wrapper import GradSampleModule  # noqa: E402
from tests.integrations.tiny import arguments, bert, classified, gpt2, pad, sequences, t5  # noqa: E402

BOUND = 0.05
ROOT = Path(__file__).parent.parent.parent


def trainer(path, model=None, *, records=8, data=None, privacy=None, optimizer=None, cls=DPTrainer, **options):
    model = bert() if model is None else model
    own = {
        n: options.pop(n)
        for n in ("generator", "compute_loss_func", "task", "callbacks", "eval_dataset")
        if n in options
    }
    return cls(
        model,
        arguments(path, **options),
        privacy=privacy or PrivacyArguments(noise_multiplier=1.0),
        train_dataset=classified(records) if data is None else data,
        data_collator=pad,
        optimizers=(optimizer, None),
        **own,
    )


def clipped_mean(model, rows, bound):
    """sum_i min(1, C / |g_i|) g_i / records, one unpadded sample at a time, with the model's own loss."""
    params = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in params]
    for row in rows:
        grads = torch.autograd.grad(model(**pad([row])).loss, params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, bound / norm.item())
    return [t / len(rows) for t in total]


@pytest.mark.parametrize(("make", "data"), [(bert, classified), (gpt2, sequences), (t5, sequences)])
def test_one_step_is_the_clipped_mean_of_the_one_sample_loop(tmp_path, make, data):
    """Sample rate 1: everybody is in the batch, which is cut in pieces with different padding."""
    rows = data(7)
    model = make().double()
    reference = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = trainer(
        tmp_path, model, data=rows, optimizer=optimizer, max_steps=1, lr_scheduler_type="constant", max_grad_norm=BOUND,
        gradient_accumulation_steps=4, privacy=PrivacyArguments(noise_multiplier=0.0),
    )  # fmt: skip
    assert run.sample_rate == 1.0
    run.train()
    assert run.accountant.history == [(0.0, 1.0, 1)]
    # Causal models of transformers compute their loss, and so its gradient, in float32.
    rtol = 1e-8 if make is bert else 1e-5
    for (name, p), old, step in zip(
        model.named_parameters(), reference.parameters(), clipped_mean(reference, rows, BOUND), strict=True
    ):
        torch.testing.assert_close(p, old - step, rtol=0, atol=rtol * BOUND, msg=lambda m, n=name: f"{n}: {m}")


class Recording(DPTrainer):
    """Remembers the sizes of the physical batches of every step."""

    def compute_per_sample_loss(self, model, inputs):
        self.seen = getattr(self, "seen", {})
        self.seen.setdefault(self.state.global_step, []).append(len(inputs["labels"]))
        return super().compute_per_sample_loss(model, inputs)


def test_logical_batches_are_poisson_samples_in_pieces_that_fit(tmp_path):
    run = trainer(
        tmp_path, records=40, cls=Recording, generator=torch.Generator().manual_seed(3), num_train_epochs=3,
        per_device_train_batch_size=3, gradient_accumulation_steps=2, logging_strategy="no",
    )  # fmt: skip
    assert (run.logical_batch_size, run.sample_rate) == (6, 1 / 7)
    result = run.train()
    assert result.global_step == 21 and run.accountant.history == [(1.0, 1 / 7, 21)]
    sizes = [sum(run.seen.get(step, [])) for step in range(21)]
    assert max(max(pieces) for pieces in run.seen.values()) <= 3
    assert min(sizes) < 40 / 7 < max(sizes)
    assert sum(sizes) == pytest.approx(21 * 40 / 7, abs=4 * math.sqrt(21 * 40 * 6 / 49))


def test_an_empty_batch_is_a_release_of_noise_alone(tmp_path):
    run = trainer(
        tmp_path, records=2, cls=Recording, generator=torch.Generator().manual_seed(0), max_steps=12,
        per_device_train_batch_size=1, gradient_accumulation_steps=1,
        optimizer=None, logging_strategy="no",
    )  # fmt: skip
    moved = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *args, model=None, **kwargs):
            self.old = model.classifier.weight.detach().clone()

        def on_step_end(self, *args, model=None, **kwargs):
            moved.append(not torch.equal(self.old, model.classifier.weight))

    run.add_callback(Watch())
    run.train()
    assert len(run.seen) < 12, "no empty batch was drawn"
    assert moved[:11] == [True] * 11  # the last step has learning rate 0 or close to it
    assert run.accountant.history == [(1.0, 0.5, 12)]


def test_the_budget_is_met_and_logged_and_nothing_else_of_the_data(tmp_path):
    run = trainer(tmp_path, privacy=PrivacyArguments(target_epsilon=4.0), records=16, save_strategy="epoch")
    result = run.train()
    assert run.get_epsilon() == pytest.approx(4.0, rel=0.01) and run.get_epsilon() <= 4.0
    assert run.dp_callback.target_delta == 1 / 160
    assert result.metrics["epsilon"] == run.get_epsilon() and math.isnan(result.training_loss)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    epsilons = [entry["epsilon"] for entry in state["log_history"]]
    assert epsilons == sorted(epsilons) and epsilons[-1] == run.get_epsilon()
    assert state["stateful_callbacks"]["DPCallback"]["args"]["history"] == [[run.noise_multiplier, 0.25, 4]]
    for entry in run.state.log_history:
        assert not {"loss", "grad_norm", "train_loss", "total_flos"} & set(entry)
    assert state["total_flos"] == 0 and state["num_input_tokens_seen"] == 0


def test_the_training_loss_is_logged_where_it_is_asked_for(tmp_path):
    run = trainer(
        tmp_path, records=8, gradient_accumulation_steps=4, max_steps=1,
        privacy=PrivacyArguments(noise_multiplier=1.0, log_training_loss=True),
    )  # fmt: skip
    model = copy.deepcopy(run.model).train()
    expected = sum(model(**pad([row])).loss.item() for row in classified(8)) / 8
    result = run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert result.training_loss == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_resumes_with_its_account(tmp_path):
    privacy = PrivacyArguments(target_epsilon=4.0)
    first = trainer(tmp_path, records=16, privacy=privacy, num_train_epochs=2, save_strategy="steps", save_steps=3)
    first.train()
    second = trainer(tmp_path, records=16, privacy=privacy, num_train_epochs=2)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.state.global_step == 8
    assert second.accountant.history == first.accountant.history == [(first.noise_multiplier, 0.25, 8)]
    assert second.get_epsilon() == first.get_epsilon() <= 4.0
    assert second._sampler.secure_mode  # neither the batches nor the noise of the first run are drawn again
    different = [
        not torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True)
    ]
    assert any(different)


def test_steps_taken_stay_on_the_account_when_the_same_trainer_goes_back(tmp_path):
    run = trainer(tmp_path, records=16, save_strategy="steps", save_steps=2)
    run.train()
    with pytest.warns(UserWarning, match="has 2 steps and this trainer has taken 4"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.accountant.history == [(1.0, 0.25, 6)]


def test_restored_callbacks_keep_the_account(tmp_path):
    first = trainer(tmp_path, records=16, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer(tmp_path, records=16, restore_callback_states_from_checkpoint=True)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.accountant.history == [(1.0, 0.25, 4)]
    assert second._private.accountant is second.accountant


def test_a_longer_training_than_planned_is_refused(tmp_path):
    privacy = PrivacyArguments(target_epsilon=4.0)
    trainer(tmp_path, records=16, privacy=privacy, save_strategy="steps", save_steps=2).train()
    longer = trainer(tmp_path, records=16, privacy=privacy, num_train_epochs=5)
    with pytest.raises(ValueError, match="2 steps are on the account already, and 18 more"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_without_an_account_is_refused(tmp_path):
    ordinary = transformers.Trainer(
        bert(),
        arguments(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=classified(16),
        data_collator=pad,
    )
    ordinary.train()
    with pytest.raises(ValueError, match="holds no privacy account"):
        trainer(tmp_path, records=16).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_logical_batch_that_breaks_off_enters_no_release(tmp_path):
    """The first item of the first logical batch is clipped, then the epoch is stopped."""

    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 0 and not hasattr(self, "stopped"):
                self.stopped = control.should_epoch_stop = True

    model = bert().double()
    reference = copy.deepcopy(model).train()
    rows = classified(4)
    run = trainer(
        tmp_path, model, data=rows, callbacks=[Stop()], optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        lr_scheduler_type="constant", max_grad_norm=BOUND, privacy=PrivacyArguments(noise_multiplier=0.0),
        logging_strategy="no", num_train_epochs=2,
    )  # fmt: skip
    run.train()
    assert run.accountant.history == [(0.0, 1.0, 1)]
    for p, old, step in zip(
        model.parameters(), reference.parameters(), clipped_mean(reference, rows, BOUND), strict=True
    ):
        torch.testing.assert_close(p, old - step, rtol=0, atol=1e-8)


def trained(path, **options):
    run = trainer(path, records=12, logging_strategy="no", max_steps=2, **options)
    run.train()
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_only_a_generator_makes_runs_repeatable(tmp_path):
    """`args.seed` is 42 for everybody: noise that follows from it would be no secret."""
    seeded = [trained(tmp_path, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*seeded)
    assert not torch.equal(trained(tmp_path), trained(tmp_path))


def test_the_model_is_as_before_and_can_be_saved_and_trained_again(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert "forward" not in run.model.__dict__
    run.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    ids = classified(1)[0]["input_ids"][None]
    torch.testing.assert_close(loaded.eval()(ids).logits, run.model.eval()(ids).logits)
    run.train()
    assert run.accountant.history == [(1.0, 0.5, 2)]


def test_batches_and_noise_come_from_the_operating_system_unless_a_generator_is_given(tmp_path):
    seeded = trainer(tmp_path, max_steps=1, generator=torch.Generator().manual_seed(0))
    plain = trainer(tmp_path, max_steps=1)
    secure = trainer(tmp_path, max_steps=1, privacy=PrivacyArguments(noise_multiplier=1.0, secure_mode=True))
    for run in (seeded, plain, secure):
        run.train()
    assert [run._sampler.secure_mode for run in (seeded, plain, secure)] == [False, True, True]
    assert [type(run._private.noise) for run in (seeded, plain, secure)] == [GaussianNoise, GaussianNoise, SecureNoise]
    # The Trainer seeds torch's generator: noise that came from it would be known to whoever knows `args.seed`.
    sums = []
    for run in (plain, plain):
        torch.manual_seed(42)
        sums.append(torch.zeros(3))
        run._private.noise.add_([sums[-1]], 1.0, 1.0)
    assert not torch.equal(*sums)
    plain._private.noise = GaussianNoise()
    plain._set_randomness(resumed=False)
    torch.manual_seed(42)
    plain._private.noise.add_([again := torch.zeros(3)], 1.0, 1.0)
    assert not torch.equal(again, torch.randn(3, generator=torch.Generator().manual_seed(42)))


def test_nothing_of_the_batch_is_returned_or_clipped_again(tmp_path):
    """The noise of one step is longer than the bound: a second clipping, by the Trainer, would shorten it."""
    model = bert()
    before = [p.detach().clone() for p in model.parameters()]
    run = trainer(
        tmp_path, model, max_steps=1, max_grad_norm=BOUND, lr_scheduler_type="constant",
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )  # fmt: skip
    output = run.train()
    assert "train_loss" not in output.metrics
    step = torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)])
    assert step.norm() > 2 * BOUND
    assert run._get_grad_norm(model, torch.tensor(3.0)) is None
    model.classifier.bias.grad = torch.ones(2)
    run._clip_grad_norm(model)
    assert model.classifier.bias.grad.tolist() == [1.0, 1.0]


def test_what_the_trainer_returns_is_filtered_whatever_it_logged(tmp_path, monkeypatch):
    told = transformers.trainer_utils.TrainOutput(1, 0.5, {"train_loss": 0.5, "total_flos": 3.0, "epsilon": 1.0})
    monkeypatch.setattr(transformers.Trainer, "train", lambda self: told)
    run = trainer(tmp_path)
    monkeypatch.setattr(run, "get_epsilon", lambda: 1.0)
    assert run.train().metrics == {"epsilon": 1.0}


def test_a_logical_batch_that_fails_leaves_nothing_behind(tmp_path):
    class Failing(DPTrainer):
        pieces = 0

        def compute_per_sample_loss(self, model, inputs):
            self.pieces += 1
            if self.pieces == 2:
                raise KeyError("the second piece")
            return super().compute_per_sample_loss(model, inputs)

    run = trainer(tmp_path, cls=Failing, max_steps=1, gradient_accumulation_steps=4)
    with pytest.raises(KeyError, match="the second piece"):
        run.train()
    assert run._private._pending.samples == 0
    assert all(getattr(p, "summed_grad", None) is None for p in run.model.parameters())


def test_validators_that_a_user_registered_with_opacus_are_asked(tmp_path):
    class Odd(torch.nn.Linear):
        pass

    ModuleValidator.VALIDATORS[Odd] = lambda layer: [ValueError("odd layers are not allowed")]
    try:
        model = bert()
        model.classifier = Odd(model.classifier.in_features, model.classifier.out_features)
        with pytest.raises(Exception, match="odd layers are not allowed"):
            trainer(tmp_path, model, max_steps=1).train()
    finally:
        del ModuleValidator.VALIDATORS[Odd]


def test_a_callback_starts_from_the_history_it_is_given():
    assert DPCallback(1e-5, history=[(1.0, 0.5, 3)]).accountant.history == [(1.0, 0.5, 3)]


def test_evaluation_and_bfloat16_as_usual(tmp_path):
    run = trainer(tmp_path, max_steps=2, bf16=True, eval_strategy="steps", eval_steps=1, eval_dataset=classified(3))
    old = copy.deepcopy(run.model)
    run.train()
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == [1, 2]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert not torch.equal(old.classifier.weight, run.model.classifier.weight)


def test_a_loss_of_ones_own(tmp_path):
    def double(outputs, labels, num_items_in_batch=None):
        return 2 * per_sample_loss(outputs, labels)

    trainer(tmp_path, compute_loss_func=double, max_steps=1).train()
    mean = trainer(tmp_path, compute_loss_func=lambda o, l, **_: per_sample_loss(o, l).mean(), max_steps=1)
    with pytest.raises(ValueError, match="one loss per sample"):
        mean.train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 0.0}, "the clipping bound on one record"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "group_by_length"}, "Poisson samples"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, **options)


def test_a_seed_and_secure_mode_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="secure_mode takes its randomness"):
        trainer(tmp_path, generator=torch.Generator(), privacy=PrivacyArguments(noise_multiplier=1.0, secure_mode=True))
    trainer(tmp_path, privacy=PrivacyArguments(noise_multiplier=1.0, secure_mode=True), max_steps=1).train()


def test_streams_and_missing_data_are_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from classified(4)

    with pytest.raises(ValueError, match="cannot be Poisson sampled"):
        trainer(tmp_path, data=Stream(), max_steps=2)


def test_privacy_arguments():
    parser = transformers.HfArgumentParser(PrivacyArguments)
    (privacy,) = parser.parse_args_into_dataclasses(["--target_epsilon", "3", "--clipping", "automatic"])
    assert (privacy.target_epsilon, privacy.clipping, privacy.delta(50)) == (3.0, "automatic", 1 / 500)
    for options in ({}, {"target_epsilon": 1.0, "noise_multiplier": 1.0}):
        with pytest.raises(ValueError, match="exactly one of"):
            PrivacyArguments(**options)
    with pytest.raises(ValueError, match="target_delta"):
        PrivacyArguments(noise_multiplier=1.0, target_delta=0.0)


def in_a_plain_trainer(tmp_path, **options):
    """A `Trainer` of transformers' own with a private optimizer, the callback, and the wrapper."""
    model = bert()
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    callback = DPCallback(target_delta=1e-3, accountant="rdp")
    optimizer.accountant, optimizer.sample_rate = callback.accountant, 4 / 16
    wrapped = GradSampleModule(model)
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, **options}
    run = transformers.Trainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=classified(16),
        data_collator=pad,
        optimizers=(optimizer, None),
        callbacks=[callback],
    )
    return run, optimizer, callback, wrapped


def test_the_callback_in_a_plain_trainer(tmp_path):
    run, _, callback, wrapped = in_a_plain_trainer(tmp_path)
    run.train()
    assert callback.accountant.history == [(1.0, 0.25, 4)]
    assert run.state.log_history[-1]["epsilon"] == callback.epsilon() > 0
    wrapped.remove_hooks()


@pytest.mark.parametrize("restore", [False, True])
def test_the_callback_in_a_plain_trainer_that_resumes(tmp_path, restore):
    for steps in (2, 4):
        run, optimizer, _, wrapped = in_a_plain_trainer(
            tmp_path, save_strategy="steps", save_steps=2, max_steps=steps,
            restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        run.train(resume_from_checkpoint=steps == 4)
        wrapped.remove_hooks()
    whole = DPCallback(target_delta=1e-3, accountant="rdp", history=[(1.0, 0.25, 4)])
    assert run.state.log_history[-1]["epsilon"] == whole.epsilon()
    assert optimizer.accountant.history == whole.accountant.history


def test_no_random_state_is_saved_that_counts_the_records(tmp_path):
    trainer(tmp_path, records=16, save_strategy="steps", save_steps=2).train()
    saved = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "optimizer.pt" in saved and not [name for name in saved if "rng" in name]


def test_a_loss_that_is_not_used_in_training_is_said(tmp_path, recwarn):
    class Own(DPTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    class Both(Own):
        def compute_per_sample_loss(self, model, inputs):
            return super().compute_per_sample_loss(model, inputs)

    for cls in (DPTrainer, Both):
        trainer(tmp_path, cls=cls)
    assert not [w for w in recwarn if "compute_loss" in str(w.message)]
    with pytest.warns(UserWarning, match="Own.compute_loss is used in evaluation only"):
        trainer(tmp_path, cls=Own)


def test_a_seeded_run_that_resumes_repeats_nothing(tmp_path):
    """The seed is the same; what it gave was used up by the first part."""
    options = {"records": 16, "generator": torch.Generator().manual_seed(9), "num_train_epochs": 1}
    first = trainer(tmp_path, save_strategy="steps", save_steps=2, **options)
    first.train()
    assert not first._sampler.secure_mode
    options["generator"].manual_seed(9)
    second = trainer(tmp_path, **{**options, "num_train_epochs": 2})
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second._sampler.secure_mode and second._private.noise._refreshed


def test_what_was_charged_counts_against_the_budget():
    """The steps to come would fit into it alone."""
    privacy = PrivacyArguments(target_epsilon=2.0, accountant="rdp")
    plan = {"sample_rate": 0.1, "delta": 1e-5, "steps": 10}
    sigma = privacy.noise_for(**plan, history=[])
    assert privacy.noise_for(**{**plan, "steps": 5}, history=[(sigma, 0.1, 5)]) == sigma
    with pytest.raises(ValueError, match="20 steps are on the account already"):
        privacy.noise_for(**plan, history=[(sigma, 0.1, 20)])


def test_what_a_trainer_is_made_of_is_checked(tmp_path):
    with pytest.raises(TypeError, match="privacy must be gsm.transformers.PrivacyArguments, got dict"):
        trainer(tmp_path, privacy={"noise_multiplier": 1.0})
    with pytest.raises(ValueError, match="train_dataset is empty"):
        trainer(tmp_path, data=[])
    evaluating = trainer(tmp_path, max_steps=1)
    evaluating.train_dataset = None
    with pytest.raises(ValueError, match="training needs a train_dataset"):
        evaluating.get_train_dataloader()


def test_a_decoder_without_inputs_says_what_to_do():
    from gsm.transformers.trainer import _give_decoder_inputs

    with pytest.raises(ValueError, match="Linear cannot make decoder_input_ids.*DataCollatorForSeq2Seq"):
        _give_decoder_inputs(torch.nn.Linear(1, 1), {}, torch.zeros(1, 2))


@pytest.mark.parametrize("missing, named", [("transformers", "pip install 'opacus-gsm"), ("json", None)])
def test_a_missing_extra_is_named_and_nothing_else_is_hidden(missing, named):
    """In another process: imports are remembered. A module of one's own that is missing keeps its own message."""
    code = (
        f"import builtins, sys; real = builtins.__import__\n"
        f"def fake(name, *rest, **more):\n"
        f"    if name.partition('.')[0] == {missing!r} and 'gsm.transformers' in sys.modules:\n"
        f"        raise ModuleNotFoundError('gone', name={missing!r})\n"
        f"    return real(name, *rest, **more)\n"
        f"import gsm.losses; builtins.__import__ = fake; import gsm.transformers"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stderr
    assert "ModuleNotFoundError" in said.splitlines()[-1]
    assert (named in said) if named else ("opacus-gsm" not in said.splitlines()[-1])
