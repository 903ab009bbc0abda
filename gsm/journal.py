"""A journal of charges: what a crashed run released after its last checkpoint is not forgotten.

A checkpoint holds the account as it was when it was written. If a run dies later and resumes from it, the releases in
between are gone from the account. That is right only if nobody saw anything of them: no metric, no log, no weights on
another machine. A journal makes it right in any case: every charge is on the disk before its noise is drawn.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gsm.checkpoint_file import CheckpointError, plain

MARK = "gsm journal 1"


class Journal:
    """An append-only file of charges, one line each.

    Formal guarantee: when :meth:`record` returns, the charge survives a crash of the process or of the machine (as far
    as the operating system's ``fsync`` keeps its promise). A line that a crash cut off belongs to a charge whose
    :meth:`record` did not return, so nothing was released for it: it is left out.

    Args:
        path: the file; made if it does not exist, continued if it does.
        history: what was on the account before the first line; only used for a new file.

    Raises:
        CheckpointError: not a journal, or damaged before its last line.
    """

    def __init__(self, path: Any, history: list[Any] | None = None) -> None:
        self.path = Path(os.fspath(path))
        if not self.path.exists() or b"\n" not in self.path.read_bytes():
            self.path.write_text(json.dumps([MARK, plain([list(entry) for entry in history or []])]) + "\n")
        kept, self.before, self.charges = self._read()
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - open as long as the run
        self._file.truncate(kept)
        self._file.seek(kept)
        os.fsync(self._file.fileno())

    def record(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Writes one charge and waits until it is on the disk."""
        charge = (float(noise_multiplier), float(sample_rate))
        self._file.write((json.dumps(charge) + "\n").encode())
        os.fsync(self._file.fileno())
        self.charges.append(charge)

    @property
    def steps(self) -> int:
        """Releases so far, those before the journal included."""
        return sum(entry[2] for entry in self.before) + len(self.charges)

    def history(self) -> list[tuple[float, float, int]]:
        """The whole account, run-length merged, as accountants keep it."""
        merged = [(float(s), float(q), int(n)) for s, q, n in self.before]
        for sigma, rate in self.charges:
            if merged and merged[-1][:2] == (sigma, rate):
                merged[-1] = (sigma, rate, merged[-1][2] + 1)
            else:
                merged.append((sigma, rate, 1))
        return merged

    def settle(self, accountant: Any) -> int:
        """Gives the accountant what it lacks; returns how many releases that were.

        Raises:
            CheckpointError: the accountant knows of more releases than the journal: it belongs to another run.
        """
        known = sum(entry[2] for entry in accountant.history)
        if known > self.steps:
            raise CheckpointError(
                f"the journal {self.path} has {self.steps} releases and the account {known}: it belongs to another run "
                "or an earlier state of this one. Give every run its own journal, from its beginning."
            )
        if known < self.steps:
            accountant.history = self.history()
        return self.steps - known

    def close(self) -> None:
        self._file.close()

    def _read(self) -> tuple[int, list[Any], list[tuple[float, float]]]:
        """Length of the whole lines in bytes, the history before the first, and the charges."""
        *lines, torn = self.path.read_bytes().split(b"\n")
        try:
            mark, before = json.loads(lines[0])
            if mark != MARK:
                raise ValueError
            charges = [(float(sigma), float(rate)) for sigma, rate in map(json.loads, lines[1:])]
        except (ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{self.path} is not a journal of charges, or it is damaged") from error
        return sum(len(line) + 1 for line in lines), before, charges
