"""Checkpoint files: atomic writes, and damaged, half-written or hostile files recognised and named."""

import io
import os
import pickle
import stat

import numpy as np
import pytest
import torch

from gsm import checkpoint_file
from gsm.checkpoint_file import CheckpointError, plain, read, write

STATE = {"weights": torch.arange(5000.0), "history": [(1.0, 0.1, 3)], "name": "run"}


class Hostile:
    """Leaves a trace if anything runs it while loading."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_round_trip_by_name_and_by_file_object(tmp_path):
    write(tmp_path / "a.pt", STATE)
    buffer = io.BytesIO()
    write(buffer, STATE)
    buffer.seek(0)
    for state in (read(tmp_path / "a.pt"), read(str(tmp_path / "a.pt")), read(buffer)):
        assert torch.equal(state["weights"], STATE["weights"])
        assert state["history"] == [(1.0, 0.1, 3)] and state["name"] == "run"
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("stage", ["torch.save", "os.fsync", "os.replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "a.pt"
    write(path, {"version": 1})

    def crash(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(f"gsm.checkpoint_file.{stage}", crash)
    with pytest.raises(OSError, match="disk full"):
        write(path, {"version": 2})
    monkeypatch.undo()
    assert read(path) == {"version": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_the_old_file_is_whole_until_the_new_one_replaces_it(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.pt", []
    write(path, {"version": 1})
    replace = os.replace

    def look(source, target):
        seen.append((read(target), read(source)))
        replace(source, target)

    monkeypatch.setattr(checkpoint_file.os, "replace", look)
    write(path, {"version": 2})
    assert seen == [({"version": 1}, {"version": 2})] and read(path) == {"version": 2}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_half_written_file_is_named(tmp_path, share):
    path = tmp_path / "half.pt"
    write(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="half.pt"):
        read(path)


def test_every_flipped_byte_of_the_contents_is_noticed(tmp_path):
    path = tmp_path / "flipped.pt"
    write(path, STATE)
    whole = path.read_bytes()
    data = whole.index(STATE["weights"].numpy().tobytes())
    for position in (data, data + 7777, data + 4 * 5000 - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match="flipped.pt is corrupted: the checksum of"):
            read(path)


def test_random_damage_never_loads_other_numbers(tmp_path):
    path = tmp_path / "damaged.pt"
    write(path, STATE)
    whole = bytearray(path.read_bytes())
    draw = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.integers(len(whole))] ^= 1 << draw.integers(8)
        path.write_bytes(damaged)
        try:
            state = read(path)  # damage in padding does no harm
        except CheckpointError as error:
            assert "damaged.pt" in str(error)
        else:
            assert torch.equal(state["weights"], STATE["weights"]) and state["history"] == [(1.0, 0.1, 3)]


def test_a_hostile_file_runs_nothing(tmp_path):
    path, trace = tmp_path / "hostile.pt", tmp_path / "trace"
    torch.save({"weights": torch.ones(2), "extra": Hostile(trace)}, path)
    with pytest.raises(CheckpointError, match=r"hostile.pt holds objects other than tensors.*mkdir.*weights_only"):
        read(path)
    assert not trace.exists()
    path.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(CheckpointError, match="hostile.pt"):
        read(path)
    assert not trace.exists()


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    path = tmp_path / "a.pt"
    write(path, {"version": 1})
    with pytest.raises(CheckpointError, match=r"nothing was written to .*a.pt.*objects other than tensors"):
        write(path, {"extra": Hostile(tmp_path / "trace")})
    assert read(path) == {"version": 1} and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2)])
def test_not_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint's dict"):
        read(tmp_path / "other.pt")


def test_a_text_file_and_no_file(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="notes.txt"):
        read(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.pt")


def test_trusted_files_on_request(tmp_path):
    torch.save({"extra": {1, 2}, "f": np.float64(2.0)}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError):
        read(tmp_path / "mine.pt")
    assert read(tmp_path / "mine.pt", weights_only=False)["f"] == 2.0


def test_plain_numbers():
    value = plain({"a": [(np.float64(0.5), np.int64(3))], "b": (np.bool_(True), "x")})
    assert value == {"a": [(0.5, 3)], "b": (True, "x")}
    assert [type(v) for v in (*value["a"][0], value["b"][0])] == [float, int, bool]


def test_a_damaged_table_of_contents_is_named(tmp_path):
    """The end of the archive is in place, what it points to is not."""
    path = tmp_path / "a.pt"
    write(path, {"x": torch.ones(3)})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK\x01\x02", b"PK\x00\x00"))
    with pytest.raises(CheckpointError, match="a.pt is corrupted: its table of contents is damaged"):
        read(path)


def test_the_name_is_on_the_disk_too(tmp_path, monkeypatch):
    """The file before its name changes, the directory afterwards; else a crash of the machine could lose both."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or replace(a, b))
    write(tmp_path / "a.pt", {"x": 1})
    assert done == ["file", "rename", "directory"]


def test_torchs_old_format_is_read(tmp_path):
    """It is no archive, so it has no table of contents that could be damaged."""
    torch.save({"x": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read(tmp_path / "a.pt")["x"], torch.ones(3))


def test_a_damaged_table_of_contents_of_a_file_object_is_named_too():
    file = io.BytesIO()
    torch.save({"x": torch.ones(3)}, file)
    damaged = io.BytesIO(file.getvalue().replace(b"PK\x01\x02", b"PK\x00\x00"))
    with pytest.raises(CheckpointError, match="the BytesIO is corrupted: its table of contents is damaged"):
        read(damaged)


class Full(io.BytesIO):
    """Takes 4,000 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 4000:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_file_object_that_is_full_is_named():
    with pytest.raises(CheckpointError, match="could not be written as a whole .is the disk full"):
        write(Full(), {"weight": torch.zeros(100_000)})


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    """As root, a device of this name would be gone."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
            write(tmp_path / name, STATE)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("path", [5, None, b"name"])
def test_a_path_that_is_none_is_named(path):
    with pytest.raises(TypeError, match="a checkpoint's path is a file name or a binary file object"):
        read(path)
