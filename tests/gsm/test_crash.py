"""kill -9 at random moments of training, saving and resuming.

A child process (forked, so that it starts at once) resumes from the last checkpoint, trains, and saves now and then.
At every release it appends one byte to a log and waits until that is on the disk; then the parameters move. It is
killed after a random time, over and over. What must hold after every kill: the checkpoint is whole, and the account
of the resumed run has at least as many releases as the log.

Guards, and what fails without them: the journal's line written before the noise, and read back on resuming
(``..._lose_no_release...``, ``..._counts_what_was_released...``, ``..._before_the_noise_is_drawn``); the checkpoint
written beside the old one and then renamed (``..._the_checkpoint_is_whole``); torn lines left out
(``test_a_torn_line...``).
"""

import os
import random
import signal
import time
import traceback
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gsm import PrivacyEngine
from gsm.checkpoint_file import CheckpointError, read
from gsm.journal import Journal

KILLS = 200


def resume(folder):
    """An engine with everything that an earlier process left in ``folder``."""
    engine = PrivacyEngine(accountant="rdp")
    model = nn.Linear(4, 2)
    loader = DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(2, (40,))), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    engine.keep_journal(folder / "journal")
    if (folder / "checkpoint").exists():
        engine.load_checkpoint(path=folder / "checkpoint", module=model, optimizer=optimizer)
    return engine, model, optimizer, loader


def child(folder, seed, ready):
    """Trains until it is killed; says when it has made a release."""
    random.seed(seed)
    torch.manual_seed(seed)
    engine, model, optimizer, loader = resume(folder)
    log = os.open(folder / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def released(_):
        os.write(log, b"x")
        os.fsync(log)
        os.write(ready, b"r")

    optimizer.attach_step_hook(released)  # the noisy gradient exists, the parameters have not moved
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if random.random() < 0.4:
                engine.save_checkpoint(path=folder / "checkpoint", module=model, optimizer=optimizer)


def run_and_kill(folder, seed, moments):
    """Forks a child and kills it, once in four as early as while it resumes; fails if it ended by itself."""
    ready, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(folder, seed, write)
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
        os._exit(1)
    os.close(write)
    if moments.random() < 0.75:
        assert os.read(ready, 1), (folder / "error").read_text()
    time.sleep(moments.uniform(0.0, 0.04))
    os.kill(pid, signal.SIGKILL)
    os.close(ready)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), (folder / "error").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork (POSIX)")
@pytest.mark.timeout(280)
@pytest.mark.parametrize("part", range(2))
def test_two_hundred_kills_lose_no_release_and_the_checkpoint_is_whole(tmp_path, part):
    moments = random.Random(part)
    warnings.simplefilter("ignore")
    resume(tmp_path)[0].journal.close()  # everything is imported and warm before the first fork
    for kill in range(KILLS // 2):
        run_and_kill(tmp_path, 1000 * part + kill, moments)
        released = (tmp_path / "log").stat().st_size if (tmp_path / "log").exists() else 0
        if (tmp_path / "checkpoint").exists():
            read(tmp_path / "checkpoint")
        journal = Journal(tmp_path / "journal")
        journal.close()
        assert journal.steps >= released, f"after kill {kill}: {released} releases, {journal.steps} on the account"
        assert journal.steps <= released + kill + 1, "a kill may cost one charge, not more"
    engine, model, optimizer, loader = resume(tmp_path)
    assert sum(entry[2] for entry in engine.accountant.history) == engine.journal.steps >= released > KILLS / 2
    before = engine.get_epsilon(1e-5)
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert engine.get_epsilon(1e-5) > before
    leftover = [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    for name in leftover:  # half-written: never taken for a checkpoint
        with pytest.raises(CheckpointError, match=name.split(".")[1]):
            read(tmp_path / name)
            raise CheckpointError(f"{name} is whole: it was killed between writing and renaming")


def history(*charges):
    return [(1.0, 0.5, n) for n in charges]


def test_a_resumed_run_counts_what_was_released_after_the_checkpoint(tmp_path):
    engine, model, optimizer, loader = resume(tmp_path)
    x, y = next(iter(loader))
    for step in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step == 1:
            engine.save_checkpoint(path=tmp_path / "checkpoint", module=model, optimizer=optimizer)
    engine.journal.close()  # as the end of its process would
    with pytest.warns(UserWarning, match="5 releases of an earlier run"):
        later = resume(tmp_path)[0]
    assert later.accountant.history == engine.accountant.history == [(1.0, 0.2, 5)]


def test_the_charge_is_on_the_disk_before_the_noise_is_drawn(tmp_path):
    _, model, optimizer, loader = resume(tmp_path)
    seen = []
    optimizer.noise.add_ = lambda *args: seen.append((tmp_path / "journal").read_bytes().count(b"\n"))
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert seen == [2]  # the head and one charge


def test_a_torn_line_was_no_release_and_is_written_over(tmp_path):
    journal = Journal(tmp_path / "j", history(3))
    journal.record(noise_multiplier=1.0, sample_rate=0.5)
    journal.close()
    with open(tmp_path / "j", "ab") as file:
        file.write(b"[1.0, 0.")
    journal = Journal(tmp_path / "j")
    assert journal.history() == history(4)
    journal.record(noise_multiplier=2.0, sample_rate=0.5)
    journal.close()
    assert Journal(tmp_path / "j").history() == [(1.0, 0.5, 4), (2.0, 0.5, 1)]


@pytest.mark.parametrize("content", ["hello\n", '["gsm journal 1", []]\n[1.0, 0.5]\nrubbish\n[1.0, 0.5]\n', "[]\n"])
def test_what_is_no_journal_is_named(tmp_path, content):
    (tmp_path / "j").write_text(content)
    with pytest.raises(CheckpointError, match="is not a journal of charges, or it is damaged"):
        Journal(tmp_path / "j")


def test_a_journal_of_another_run_is_refused(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    engine.keep_journal(tmp_path / "j")
    engine.journal.close()
    other = PrivacyEngine(accountant="rdp")
    other.accountant.history = history(7)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        other.keep_journal(tmp_path / "j")
