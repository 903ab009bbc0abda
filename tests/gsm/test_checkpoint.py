"""Checkpoints of a whole training: everything comes back, nothing is replayed, nothing foreign is accepted."""

import io
import warnings

import opacus
import pytest
import torch
from opacus.schedulers import ExponentialNoise, StepGradClip
from torch.optim.lr_scheduler import StepLR

from accountants import PLDAccountant
from gsm.checkpoint_file import CheckpointError
from gsm.engine import PrivacyEngine
from tests.gsm.training import flat, parts, train


class Session:
    """A private training that can be saved and resumed."""

    def __init__(self, accountant="rdp", noise_multiplier=1.0, seed=3, engine=PrivacyEngine, **options):
        options = {"grad_sample_mode": "hooks", "max_grad_norm": 1.0, **options}
        self.engine = engine(accountant=accountant)
        model, optimizer, loader = parts(seed=seed, generator=torch.Generator().manual_seed(5))
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise_multiplier,
            noise_generator=torch.Generator().manual_seed(6),
            **options,
        )

    def train(self, steps=6):
        train(self.model, self.optimizer, self.loader, steps=steps)
        return self

    def save(self, path, **options):
        self.engine.save_checkpoint(path=path, module=self.model, optimizer=self.optimizer, **options)

    def load(self, path, **options):
        return self.engine.load_checkpoint(path=path, module=self.model, optimizer=self.optimizer, **options)


def momenta(session):
    return torch.cat([s["momentum_buffer"].flatten() for s in session.optimizer.state.values()])


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("accountant", ["rdp", "gdp", "prv", "pld"])
def test_everything_comes_back(tmp_path, accountant, mode):
    saved = Session(accountant, grad_sample_mode=mode).train()
    saved.save(tmp_path / "a.pt", checkpoint_dict={"epoch": 4, "best": torch.tensor(0.5)})
    fresh = Session(accountant, seed=9, grad_sample_mode=mode)
    entries = fresh.load(tmp_path / "a.pt")
    assert torch.equal(flat(fresh.model), flat(saved.model)) and torch.equal(momenta(fresh), momenta(saved))
    assert fresh.engine.accountant.history == saved.engine.accountant.history == [(1.0, 1 / 6, 6)]
    assert fresh.engine.get_epsilon(1e-5) == saved.engine.get_epsilon(1e-5)
    assert entries["epoch"] == 4 and entries["best"] == 0.5
    fresh.train(2)
    assert fresh.engine.accountant.history == [(1.0, 1 / 6, 8)]


def test_the_adaptive_bound_comes_back(tmp_path):
    saved = Session(clipping="adaptive").train()
    saved.save(tmp_path / "a.pt")
    fresh = Session(clipping="adaptive")
    assert saved.optimizer.max_grad_norm != fresh.optimizer.max_grad_norm
    fresh.load(tmp_path / "a.pt")
    assert saved.optimizer.max_grad_norm == fresh.optimizer.max_grad_norm


def test_schedulers_come_back(tmp_path):
    def schedulers(session):
        return {
            "noise_scheduler": ExponentialNoise(session.optimizer, gamma=0.9),
            "grad_clip_scheduler": StepGradClip(session.optimizer, step_size=2, gamma=0.5),
            "lr_scheduler": StepLR(session.optimizer, step_size=1, gamma=0.1),
        }

    saved = Session()
    old = schedulers(saved)
    for _ in range(3):
        saved.train(1)
        for s in old.values():
            s.step()
    saved.save(tmp_path / "a.pt", **old)
    fresh = Session()
    new = schedulers(fresh)
    with pytest.warns(UserWarning, match="noise_multiplier was 0.72"):
        fresh.load(tmp_path / "a.pt", **new)
    assert [s.last_epoch for s in new.values()] == [3, 3, 3]
    assert fresh.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_neither_noise_nor_batches_are_replayed_after_a_resume(tmp_path):
    """Two equal sums under equal noise, or the same batches again, would break what the accountant assumes."""

    def released(session):
        session.optimizer.zero_grad()
        session.model(torch.zeros(0, 6)).sum().backward()
        session.optimizer.step()
        return torch.cat([p.grad.flatten() for p in session.model.parameters()])

    first, second = Session(), Session()
    assert torch.equal(released(first), released(second))  # the seeds are the same
    batches = list(Session().loader.batch_sampler)
    assert batches == list(Session().loader.batch_sampler)
    second.save(tmp_path / "a.pt")
    third, fourth = Session(), Session()
    third.load(tmp_path / "a.pt")
    fourth.load(tmp_path / "a.pt")
    noise = [released(s) for s in (third, fourth, Session(), first)]
    assert all(not torch.equal(a, b) for i, a in enumerate(noise) for b in noise[:i])
    drawn = [list(third.loader.batch_sampler), list(fourth.loader.batch_sampler), batches]
    assert drawn[0] != drawn[1] and drawn[2] not in drawn[:2]


def test_noise_is_not_replayed_where_the_optimizer_was_left_out_of_the_loading(tmp_path):
    Session().save(tmp_path / "a.pt")
    noise = []
    for _ in range(2):
        session = Session()
        session.engine.load_checkpoint(path=tmp_path / "a.pt", module=session.model)
        noise.append(torch.zeros(5))
        session.optimizer.noise.add_([noise[-1]], 1.0, 1.0)
    assert not torch.equal(*noise)


def test_parts_made_private_after_loading_are_not_replayed_either(tmp_path):
    Session().train(2).save(tmp_path / "a.pt")
    engine = PrivacyEngine(accountant="rdp")
    engine.load_checkpoint(path=tmp_path / "a.pt", module=parts()[0], torch_load_kwargs={"map_location": "cpu"})
    batches, noise = [], []
    for _ in range(2):
        model, optimizer, loader = parts(generator=torch.Generator().manual_seed(5))
        _, private, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator().manual_seed(6),
        )
        batches.append(list(loader.batch_sampler))
        noise.append(torch.zeros(5))
        private.noise.add_([noise[-1]], 1.0, 1.0)
    assert batches[0] != batches[1]
    assert not torch.equal(*noise)


def test_another_accountant_is_refused_and_changes_nothing(tmp_path):
    Session("rdp").train().save(tmp_path / "a.pt")
    other = Session("gdp", seed=9)
    before = flat(other.model)
    with pytest.raises(CheckpointError, match=r"accountant is 'rdp' and this engine's is 'gdp'.*accountant='rdp'"):
        other.load(tmp_path / "a.pt")
    assert torch.equal(flat(other.model), before) and other.engine.accountant.history == []


@pytest.mark.parametrize("other", [{"relation": "replace_one"}, {"sampling": "unsampled"}])
def test_other_assumptions_are_refused_and_change_nothing(tmp_path, other):
    """A relation or a sampling that came with the file would be read into the steps of this run."""
    pair = [lambda: PLDAccountant(**other), PLDAccountant]
    for kept, asked in (pair, pair[::-1]):
        Session(kept()).train(2).save(tmp_path / "a.pt")
        fresh = Session(asked(), seed=9)
        before, weights = fresh.engine.accountant.state_dict(), flat(fresh.model).clone()
        with pytest.raises(CheckpointError, match=f"assumes {next(iter(other))}="):
            fresh.load(tmp_path / "a.pt")
        assert fresh.engine.accountant.state_dict() == before and torch.equal(flat(fresh.model), weights)
        same = Session(kept(), seed=9)
        same.load(tmp_path / "a.pt")
        assert len(same.engine.accountant.history) == 1


@pytest.mark.parametrize("history", [None, "x", [("a", 1)], [(1.0, 0.1, -3)]])
def test_an_invalid_history_is_refused_and_changes_nothing(tmp_path, history):
    Session().train().save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt")
    state["privacy_accountant_state_dict"]["history"] = history
    torch.save(state, tmp_path / "a.pt")
    other = Session(seed=9)
    before = flat(other.model)
    with pytest.raises(CheckpointError, match="accountant state is not valid"):
        other.load(tmp_path / "a.pt")
    assert torch.equal(flat(other.model), before) and other.engine.accountant.history == []


@pytest.mark.parametrize("missing", ["module_state_dict", "privacy_accountant_state_dict"])
def test_an_incomplete_checkpoint_is_named(tmp_path, missing):
    Session().train().save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt")
    del state[missing]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"a.pt is not a checkpoint of private training: it has no {missing}"):
        Session().load(tmp_path / "a.pt")


def test_other_settings_are_said_and_charged_as_they_are(tmp_path):
    Session(noise_multiplier=1.0).train(2).save(tmp_path / "a.pt")
    fresh = Session(noise_multiplier=2.0)
    with pytest.warns(UserWarning, match="noise_multiplier was 1.0 and is now 2.0"):
        fresh.load(tmp_path / "a.pt")
    fresh.train(1)
    assert fresh.engine.accountant.history == [(1.0, 1 / 6, 2), (2.0, 1 / 6, 1)]


def test_steps_that_a_checkpoint_replaces_are_said(tmp_path):
    Session().train(2).save(tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="3 steps on this engine's account are replaced"):
        Session().train(3).load(tmp_path / "a.pt")


def test_loading_where_it_belongs_warns_of_nothing(tmp_path):
    Session().train(2).save(tmp_path / "a.pt")
    fresh = Session()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load(tmp_path / "a.pt")


def test_optimizer_on_one_side_only_is_said(tmp_path):
    session = Session().train(2)
    session.engine.save_checkpoint(path=tmp_path / "model.pt", module=session.model)
    with pytest.warns(UserWarning, match="holds no optimizer state"):
        Session().load(tmp_path / "model.pt")
    session.save(tmp_path / "both.pt")
    fresh = Session()
    with pytest.warns(UserWarning, match="no optimizer was given"):
        fresh.engine.load_checkpoint(path=tmp_path / "both.pt", module=fresh.model)


def test_a_plain_model_takes_the_weights_of_a_wrapped_one(tmp_path):
    session = Session().train(2)
    session.engine.save_checkpoint(path=tmp_path / "a.pt", module=session.model)
    plain = parts(seed=8)[0]
    PrivacyEngine(accountant="rdp").load_checkpoint(path=tmp_path / "a.pt", module=plain)
    assert torch.equal(flat(plain), flat(session.model))
    session.engine.save_checkpoint(path=tmp_path / "plain.pt", module=plain)
    fresh = Session(seed=8)
    fresh.engine.load_checkpoint(path=tmp_path / "plain.pt", module=fresh.model)
    assert torch.equal(flat(fresh.model), flat(plain))


def test_not_in_the_middle_of_a_logical_batch(tmp_path):
    session = Session(max_physical_batch_size=3)
    for x, y in session.loader:
        session.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(session.model(x), y).backward()
        session.optimizer.step()
        with pytest.raises(CheckpointError, match="middle of a logical batch"):
            session.save(tmp_path / "a.pt")
        break
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("accountant", ["rdp", "gdp", "prv"])
def test_opacus_reads_ours_and_we_read_opacus(accountant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = Session(accountant, engine=opacus.PrivacyEngine), Session(accountant)
        for source, target in ((theirs, ours), (ours, theirs)):
            source.train(3)
            buffer = io.BytesIO()
            source.save(buffer, checkpoint_dict={"foo": "bar"})
            buffer.seek(0)
            assert target.load(buffer)["foo"] == "bar"
            assert target.engine.accountant.history == source.engine.accountant.history
            assert torch.equal(flat(target.model), flat(source.model))
            assert torch.equal(momenta(target), momenta(source))


def test_numpy_numbers_on_the_account_do_not_get_in_the_way(tmp_path):
    import numpy as np

    session = Session()
    session.engine.accountant.history = [(np.float64(1.0), np.float64(0.1), np.int64(3))]
    session.save(tmp_path / "a.pt")
    fresh = Session()
    fresh.load(tmp_path / "a.pt")
    assert fresh.engine.accountant.history == [(1.0, 0.1, 3)]


@pytest.mark.parametrize("part", ["module_state_dict", "optimizer_state_dict"])
def test_a_checkpoint_of_another_model_leaves_the_account_alone(tmp_path, part):
    """The account comes last: it would speak of steps whose outcome was not loaded."""
    Session().train(2).save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    state[part] = {"another": torch.ones(1)} if part == "module_state_dict" else {"state": {}, "param_groups": []}
    torch.save(state, tmp_path / "b.pt")
    fresh = Session()
    with pytest.raises((RuntimeError, ValueError)):
        fresh.load(tmp_path / "b.pt")
    assert fresh.engine.accountant.history == []


def test_the_keywords_for_torch_reach_it(tmp_path):
    saved = Session()
    saved.save(
        tmp_path / "a.pt",
        module_state_dict_kwargs={"prefix": "net."},
        torch_save_kwargs={"_use_new_zipfile_serialization": False},
        checkpoint_dict={"weight": torch.ones(1)},
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        saved.load(tmp_path / "a.pt")
    entries = saved.load(
        tmp_path / "a.pt", module_load_dict_kwargs={"strict": False}, torch_load_kwargs={"map_location": "meta"}
    )
    assert entries["weight"].device.type == "meta"
    assert not (tmp_path / "a.pt").read_bytes().startswith(b"PK")


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.RMSprop])
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(tmp_path, other):
    """Torch takes it without a word, and fails at the next step."""
    Session().train().save(tmp_path / "a.pt")
    resumed = PrivacyEngine(accountant="rdp")
    module, _, loader = parts(seed=9)
    model, optimizer, _ = resumed.make_private(
        module=module,
        optimizer=other(module.parameters()),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    before = flat(model)
    with pytest.raises(CheckpointError, match=f"the checkpoint's optimizer is no {other.__name__}: it has no "):
        resumed.load_checkpoint(path=tmp_path / "a.pt", module=model, optimizer=optimizer)
    assert torch.equal(before, flat(model)) and not resumed.accountant.history
