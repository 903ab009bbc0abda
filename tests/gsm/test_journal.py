"""Every release is in the journal, whoever makes it and whenever the journal begins (crashes: test_crash.py)."""

import errno
import os
import signal
import zlib

import pytest
import torch
from torch import nn

from accountants import RDPAccountant
from gsm import PrivacyEngine
from gsm import journal as journals
from gsm.checkpoint_file import CheckpointError
from gsm.journal import Journal
from tests.gsm.training import parts, train


def private(engine, **seed):
    model, optimizer, loader = parts(**seed)
    return engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )


def steps(path):
    journal = Journal(path)
    journal.close()
    return journal.steps


def test_optimizers_made_before_and_after_the_journal_use_it(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    early = private(engine)
    train(*early, steps=2)
    engine.keep_journal(tmp_path / "j")
    train(*early, steps=1)
    train(*private(engine, seed=1), steps=3)
    engine.journal.close()
    assert steps(tmp_path / "j") == engine.journal.steps == 6
    assert engine.accountant.history == engine.journal.history() == [(1.0, 1 / 6, 6)]


def test_what_a_crashed_run_wrote_is_on_the_account_before_and_after_a_checkpoint_is_loaded(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = private(engine)
    engine.keep_journal(tmp_path / "j")
    train(model, optimizer, loader, steps=1)
    engine.save_checkpoint(path=tmp_path / "a.pt", module=model, optimizer=optimizer)
    train(model, optimizer, loader, steps=2)
    engine.journal.close()  # ... and it dies
    resumed = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = private(resumed)
    with pytest.warns(UserWarning, match="3 releases of an earlier run"):
        resumed.keep_journal(tmp_path / "j")
    assert resumed.accountant.history == [(1.0, 1 / 6, 3)]
    with pytest.warns(UserWarning, match="2 releases of an earlier run"):
        resumed.load_checkpoint(path=tmp_path / "a.pt", module=model, optimizer=optimizer)
    assert resumed.accountant.history == [(1.0, 1 / 6, 3)]


def test_a_charge_is_on_the_disk_when_it_is_recorded(tmp_path, monkeypatch):
    journal, synced, fsync = Journal(tmp_path / "j"), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((tmp_path / "j").read_bytes()) or fsync(file))
    journal.record(noise_multiplier=1.0, sample_rate=0.5)
    assert len(synced) == 1 and synced[0].split(b"\n")[1].startswith(b"[1.0, 0.5] ")


def test_an_account_that_knows_more_than_the_journal_is_of_another_run(tmp_path):
    Journal(tmp_path / "j", [(1.0, 0.5, 2)]).close()
    engine = PrivacyEngine(accountant="rdp")
    engine.accountant.history = [(1.0, 0.5, 3)]
    with pytest.raises(CheckpointError, match="has 2 releases and the account 3"):
        engine.keep_journal(tmp_path / "j")


@pytest.mark.parametrize("own", [1, 2, 3])
def test_the_journal_of_another_run_never_replaces_an_account(tmp_path, own):
    journal = Journal(tmp_path / "j")
    for _ in range(2):
        journal.record(noise_multiplier=9.0, sample_rate=1 / 6)
    journal.close()
    engine = PrivacyEngine(accountant="rdp")
    train(*private(engine), steps=own)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        engine.keep_journal(tmp_path / "j")
    assert engine.accountant.history == [(1.0, 1 / 6, own)]


def test_an_account_that_changes_its_noise_is_the_journals_beginning(tmp_path):
    journal = Journal(tmp_path / "j", [(1.0, 0.5, 2), (2.0, 0.5, 1)])
    journal.record(noise_multiplier=2.0, sample_rate=0.5)
    journal.record(noise_multiplier=1.0, sample_rate=0.5)
    whole = [(1.0, 0.5, 2), (2.0, 0.5, 2), (1.0, 0.5, 1)]
    for known, history in ((0, []), (1, [(1.0, 0.5, 1)]), (3, [(1.0, 0.5, 2), (2.0, 0.5, 1)]), (5, whole)):
        accountant = RDPAccountant()
        accountant.history = list(history)
        assert journal.settle(accountant) == 5 - known and accountant.history == whole
    journal.close()


def test_a_line_that_the_disk_takes_only_in_part_is_no_charge(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = private(engine)
    engine.keep_journal(tmp_path / "j")
    train(model, optimizer, loader, steps=1)
    file, weights = engine.journal._file, [p.clone() for p in model.parameters()]

    class Full:
        closed = False

        def write(self, line):
            return file.write(line[:7])

        def __getattr__(self, name):
            return getattr(file, name)

    engine.journal._file = Full()
    with pytest.raises(CheckpointError, match="is the disk full"):
        train(model, optimizer, loader, steps=1)
    assert all(map(torch.equal, weights, model.parameters())) and engine.accountant.history == [(1.0, 1 / 6, 1)]
    engine.journal._file = file
    optimizer.zero_grad()
    train(model, optimizer, loader, steps=2)
    engine.journal.close()
    assert steps(tmp_path / "j") == 3 and engine.accountant.history == [(1.0, 1 / 6, 3)]


def test_an_optimizer_that_does_not_charge_by_itself_keeps_no_journal(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    engine._account.optimizers.append(nn.Linear(1, 1))  # what stands for Opacus's, under DistributedDataParallel
    with pytest.raises(ValueError, match="a journal needs gsm's own optimizer"):
        engine.keep_journal(tmp_path / "j")


def test_a_file_with_another_mark_is_no_journal(tmp_path):
    body = b'["another journal", []]'
    (tmp_path / "j").write_bytes(b"%s %08x\n" % (body, zlib.crc32(body)))
    with pytest.raises(CheckpointError, match="is not a journal of charges"):
        Journal(tmp_path / "j")


def test_a_charge_that_changed_on_the_disk_is_noticed(tmp_path):
    """One bit of a rate makes it smaller; a line that is lost or doubled makes the account shorter or longer."""
    journal = Journal(tmp_path / "j")
    for sigma in (1.0, 2.0, 3.0):
        journal.record(noise_multiplier=sigma, sample_rate=0.125)
    journal.close()
    whole = (tmp_path / "j").read_bytes()
    *lines, _ = whole.split(b"\n")
    damaged = [b"\n".join([*lines[:k], *lines[k + 1 :], b""]) for k in range(3)]
    damaged += [b"\n".join([*lines[: k + 1], *lines[k:], b""]) for k in range(4)]
    damaged += [b"\n".join([lines[0], lines[2], lines[1], lines[3], b""])]
    damaged += [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in range(len(whole) - 1)]
    for held in damaged:
        (tmp_path / "j").write_bytes(held)
        with pytest.raises(CheckpointError, match="not a journal of charges, or it is damaged behind line [0-4]"):
            Journal(tmp_path / "j")
        assert (tmp_path / "j").read_bytes() == held
    (tmp_path / "j").write_bytes(whole)
    journal = Journal(tmp_path / "j")
    assert journal.steps == 3
    journal.record(noise_multiplier=4.0, sample_rate=0.125)
    journal.close()
    assert steps(tmp_path / "j") == 4


def test_a_long_torn_line_leaves_nothing_behind_a_short_one(tmp_path):
    Journal(tmp_path / "j").close()
    with open(tmp_path / "j", "ab") as file:
        file.write(b"[1.1111111111111111, 0.3333333333333")
    journal = Journal(tmp_path / "j")
    journal.record(noise_multiplier=2.0, sample_rate=0.5)
    journal.close()
    assert steps(tmp_path / "j") == 1


def test_what_is_no_journal_is_left_as_it_is(tmp_path):
    """A first line that a crash cut off is written anew; another file's is not."""
    (tmp_path / "j").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="is not a journal of charges"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == b"weights"
    for torn in (b"", b'["gsm jour', b'["gsm journal 2", [[1.0, 0.'):
        (tmp_path / "j").write_bytes(torn)
        journal = Journal(tmp_path / "j", [(1.0, 0.5, 2)])
        journal.close()
        assert steps(tmp_path / "j") == 2


needs_locks = pytest.mark.skipif(journals.fcntl is None, reason="needs flock (POSIX)")


@needs_locks
def test_two_engines_never_write_one_journal(tmp_path):
    first, second = PrivacyEngine(accountant="rdp"), PrivacyEngine(accountant="rdp")
    model, optimizer, loader = private(first)
    first.keep_journal(tmp_path / "j")
    train(model, optimizer, loader, steps=1)
    with pytest.raises(CheckpointError, match=r"j is open already.*engine\.journal\.close\(\)"):
        second.keep_journal(tmp_path / "j")
    assert second.journal is None and second.accountant.history == []
    train(model, optimizer, loader, steps=1)
    first.journal.close()
    with pytest.warns(UserWarning, match="2 releases of an earlier run"):
        second.keep_journal(tmp_path / "j")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match="is closed, so this release cannot be charged"):
        train(model, optimizer, loader, steps=1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert second.journal.steps == first.accountant.history[0][2] == 2


def test_an_engine_may_begin_its_journal_again(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    parts = private(engine)
    engine.keep_journal(tmp_path / "j")
    train(*parts, steps=1)
    engine.keep_journal(tmp_path / "j")
    train(*parts, steps=1)
    engine.journal.close()
    assert steps(tmp_path / "j") == engine.journal.steps == 2


@needs_locks
def test_a_journal_that_nobody_holds_can_be_opened_again(tmp_path):
    circle = [Journal(tmp_path / "j")]
    circle.append(circle)
    del circle
    Journal(tmp_path / "j").close()


@needs_locks
def test_a_refused_file_is_not_kept_locked(tmp_path):
    (tmp_path / "j").write_text("hello\n")
    with pytest.raises(CheckpointError, match="is not a journal") as held:
        Journal(tmp_path / "j")
    (tmp_path / "j").write_text("")
    Journal(tmp_path / "j").close()
    assert held.value


def forked(run):
    """A child process that does ``run(say)``, and what it said first."""
    heard, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run(lambda word: os.write(say, word))
        finally:
            os._exit(1)
    os.close(say)
    word = os.read(heard, 9)
    os.close(heard)
    return pid, word


def wait(pid):
    return os.waitpid(pid, 0)[1]


@needs_locks
def test_two_processes_never_write_one_journal_and_a_killed_one_leaves_no_lock(tmp_path):
    """Not even if a process forked from it, such as a loader's worker, lives on."""
    stay, end = os.pipe()

    def run(say):
        journal = Journal(tmp_path / "j")
        journal.record(noise_multiplier=1.0, sample_rate=0.5)
        os.close(end)
        if os.fork() == 0:
            say(b"open")
            os.read(stay, 1)  # until the test ends
            os._exit(0)
        signal.pause()

    pid, word = forked(run)
    try:
        assert word == b"open"
        with pytest.raises(CheckpointError, match="open already, in another process"):
            Journal(tmp_path / "j")
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(wait(pid))
        assert steps(tmp_path / "j") == 1
    finally:
        os.close(end)
        os.close(stay)


@needs_locks
def test_a_forked_process_does_not_write_the_journal_of_its_parent(tmp_path):
    journal = Journal(tmp_path / "j")

    def run(say):
        try:
            journal.record(noise_multiplier=1.0, sample_rate=0.5)
        except CheckpointError as error:
            say(b"refused" if "in the process that trains" in str(error) else b"?")

    pid, word = forked(run)
    wait(pid)
    assert word == b"refused"
    with pytest.raises(CheckpointError, match="open already"):  # the child's end did not unlock it
        Journal(tmp_path / "j")
    journal.close()
    assert steps(tmp_path / "j") == 0


def test_where_there_are_no_locks_a_journal_works_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if journals.fcntl is not None:
        monkeypatch.setattr(journals.fcntl, "flock", flock)
        journal = Journal(tmp_path / "j")
        assert steps(tmp_path / "j") == 0  # opened twice, unnoticed
        journal.close()
    monkeypatch.setattr(journals, "fcntl", None)
    journal = Journal(tmp_path / "j")
    assert steps(tmp_path / "j") == 0
    journal.close()


@pytest.mark.parametrize("how", ["removed", "replaced", "the directory is gone"])
def test_a_journal_that_is_no_longer_in_its_place_takes_no_charge(tmp_path, how):
    """Guard: ``_check_place``; what goes to a file without a name is forgotten with the process."""
    (tmp_path / "run").mkdir()
    path, engine = tmp_path / "run" / "j", PrivacyEngine(accountant="rdp")
    model, optimizer, loader = private(engine)
    engine.keep_journal(path)
    train(model, optimizer, loader, steps=1)
    before = [p.clone() for p in model.parameters()]
    path.rename(tmp_path / "elsewhere")
    if how == "replaced":
        path.write_bytes((tmp_path / "elsewhere").read_bytes())
    elif how != "removed":
        path.parent.rmdir()
    with pytest.raises(CheckpointError, match="removed or replaced while it was written"):
        train(model, optimizer, loader, steps=1)
    assert engine.accountant.history == [(1.0, 1 / 6, 1)]
    assert all(map(torch.equal, before, model.parameters()))
    engine.keep_journal(tmp_path / "elsewhere")
    optimizer.zero_grad()
    train(model, optimizer, loader, steps=1)
    assert engine.accountant.history == [(1.0, 1 / 6, 2)]
