"""A journal of charges: what a crashed run released after its last checkpoint is not forgotten.

A checkpoint holds the account as it was when it was written. If a run dies later and resumes from it, the releases in
between are gone from the account. That is right only if nobody saw anything of them: no metric, no log, no weights on
another machine. A journal makes it right in any case: every charge is on the disk before its noise is drawn.

A journal belongs to one run at a time, as two accounts in one file are neither's. It is locked while it is open
(``flock``), against other processes and other engines of this one; the lock ends with the process, however that ends.
Where there is no ``flock`` (Windows, some network file systems) nothing notices a second run: keep it apart yourself.

Every line ends with a checksum of itself and of all lines before it (CRC-32), so that a charge that was changed, lost
(but for the last ones) or doubled on the disk is noticed. It is no protection against who changes a journal on purpose.
"""

from __future__ import annotations

import gc
import json
import math
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

from gsm.checkpoint_file import CheckpointError, plain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARK = "gsm journal 2"
_open: WeakSet[Journal] = WeakSet()


class Journal:
    """An append-only file of charges, one line each.

    Formal guarantee: when :meth:`record` returns, the charge survives a crash of the process or of the machine (as far
    as the operating system's ``fsync`` keeps its promise). A line that a crash cut off belongs to a charge whose
    :meth:`record` did not return, so nothing was released for it: it is left out.

    Args:
        path: the file; made if it does not exist, continued if it does.
        history: what was on the account before the first line; only used for a new file.

    Raises:
        CheckpointError: not a journal, damaged before its last line, or open already, here or in another process.
    """

    def __init__(self, path: Any, history: list[Any] | None = None) -> None:
        self.path = Path(os.fspath(path))
        # Open as long as the run; whatever is written comes behind what is there.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            self._sum = 0
            if self._is_new():
                self._file.truncate(0)
                self._append([MARK, plain([list(entry) for entry in history or []])])
            kept, self.before, self.charges = self._read()
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(kept)
        os.fsync(self._file.fileno())
        _open.add(self)

    def _lock(self) -> None:
        if _locked(self._file):
            return
        gc.collect()  # a journal of a run that nobody holds any more
        if not _locked(self._file):
            raise CheckpointError(
                f"the journal {self.path} is open already, in another process or by another engine of this one: give "
                "every run its own journal, or end the other run first (in this process: engine.journal.close())."
            )

    def _is_new(self) -> bool:
        """Whether there is nothing yet, or only the beginning of a first line that a crash cut off."""
        held, first = self.path.read_bytes(), json.dumps([MARK])[:-1].encode()
        return b"\n" not in held and (held.startswith(first) or first.startswith(held))

    def record(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Writes one charge and waits until it is on the disk.

        Raises:
            CheckpointError: the journal was closed, removed or replaced, belongs to the process that this one was
                forked from, or the disk is full.
        """
        if self._file.closed:
            raise CheckpointError(
                f"the journal {self.path} is closed, so this release cannot be charged to it: call keep_journal() "
                "again, in the process that trains."
            )
        self._check_place()
        charge = (float(noise_multiplier), float(sample_rate))
        self._append(charge)
        self.charges.append(charge)

    def _check_place(self) -> None:
        """Raises CheckpointError if the file is not where a later run will look for it (removed, or replaced)."""
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise CheckpointError(
                f"the journal {self.path} was removed or replaced while it was written: a crash would forget what was "
                "released. This release is neither made nor charged. Put the file back, or call keep_journal() with "
                "another path."
            )

    def _append(self, value: Any) -> None:
        body, before = json.dumps(value).encode(), os.fstat(self._file.fileno()).st_size
        line = b"%s %08x\n" % (body, checksum := zlib.crc32(body, self._sum))
        if self._file.write(line) != len(line):  # a disk that runs full takes a part, and only then raises
            self._file.truncate(before)
            raise CheckpointError(
                f"the journal {self.path} could not be written to its end (is the disk full?): this release is neither "
                "made nor charged. Make room before the next."
            )
        self._sum = checksum
        os.fsync(self._file.fileno())

    @property
    def steps(self) -> int:
        """Releases so far, those before the journal included."""
        return sum(entry[2] for entry in self.before) + len(self.charges)

    def history(self) -> list[tuple[float, float, int]]:
        """The whole account, run-length merged, as accountants keep it."""
        return _merged([*self.before, *((sigma, rate, 1) for sigma, rate in self.charges)])

    def settle(self, accountant: Any) -> int:
        """Gives the accountant what it lacks; returns how many releases that were.

        Raises:
            CheckpointError: the accountant knows of releases that the journal does not begin with: it belongs to
                another run.
        """
        account, mine = _merged(accountant.history), self.history()
        known = sum(entry[2] for entry in account)
        if _merged(mine, known) != account:
            raise CheckpointError(
                f"the journal {self.path} has {self.steps} releases and the account {known}, which are not the first "
                "of the journal: it belongs to another run or an earlier state of this one. Give every run its own "
                "journal, from its beginning."
            )
        if known < self.steps:
            accountant.history = mine
        return self.steps - known

    def close(self) -> None:
        """Lets another run have the file; this one can record nothing any more."""
        self._file.close()

    def _read(self) -> tuple[int, list[Any], list[tuple[float, float]]]:
        """Length of the whole lines in bytes, the history before the first, and the charges."""
        *lines, torn = self.path.read_bytes().split(b"\n")
        self._sum, whole = 0, 0
        try:
            for line in lines:
                self._sum = zlib.crc32(line[:-9], self._sum)
                if line[-9:] != b" %08x" % self._sum:
                    raise ValueError
                whole += 1
            mark, before = json.loads(lines[0][:-9])
            if mark != MARK:
                raise ValueError
            charges = [(float(sigma), float(rate)) for sigma, rate in (json.loads(line[:-9]) for line in lines[1:])]
        except (ValueError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{self.path} is not a journal of charges, or it is damaged behind line {whole}: what is lost was "
                "released nevertheless. Restore a copy of it, or take its charges into the account by hand."
            ) from error
        return sum(len(line) + 1 for line in lines), before, charges


def _merged(history: Iterable[Any], most: float = math.inf) -> list[tuple[float, float, int]]:
    """The first ``most`` releases, equal ones that follow each other in one entry."""
    found: list[tuple[float, float, int]] = []
    for sigma, rate, count in history:
        count = min(int(count), most)
        most -= count
        if found and found[-1][:2] == (sigma, rate):
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + int(count))
        elif count:
            found.append((float(sigma), float(rate), int(count)))
    return found


def _locked(file: IO[bytes]) -> bool:
    """Locks a file for this open of it; False if another open of it, in whatever process, has it locked."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks
    return True


def _close_in_child() -> None:
    """A forked process (a loader's worker) shares the lock: were it to outlive a killed run, it would keep it."""
    for journal in list(_open):
        with suppress(OSError):
            journal.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
