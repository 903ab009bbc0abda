"""Side-by-side timing: pairs, ratios, and failures that are recorded with their reason."""

import time

import pytest

from benchmarks import columns
from benchmarks.columns import DEFAULT_COLUMNS, Trainer
from benchmarks.timing import CLOCKS, reason, time_columns
from benchmarks.workloads import WORKLOADS

QUICK = {"size": "quick", "pairs": 3, "warmup": 1}


def test_every_column_is_timed_or_says_why_not():
    found = time_columns(WORKLOADS["mlp16"], DEFAULT_COLUMNS, **QUICK)
    assert [row.column for row in found] == DEFAULT_COLUMNS
    for row in found:
        assert row.failure is None
        assert row.pairs == 3 and 0 < row.low <= row.ratio <= row.high
        assert row.seconds > 0 and row.base_seconds > 0


def test_the_ratio_is_of_neighbours(monkeypatch):
    now = 0.0

    def taking(durations):
        def step():
            nonlocal now
            now += next(durations)

        return lambda problem, noise: Trainer(step, problem.model)

    # A disturbance that comes and goes hits both halves of a pair; the first step of each is the warm-up.
    monkeypatch.setitem(CLOCKS, "wall", lambda: now)
    monkeypatch.setitem(columns.COLUMNS, columns.BASE, taking(iter([9.0, 1.0, 5.0, 2.0])))
    monkeypatch.setitem(columns.COLUMNS, "slow", taking(iter([9.0, 3.0, 10.0, 7.0])))
    (found,) = time_columns(WORKLOADS["mlp16"], ["slow"], **QUICK)
    assert (found.seconds, found.base_seconds, found.pairs) == (7.0, 2.0, 3)
    assert (found.low, found.ratio, found.high) == (2.0, 3.0, 3.5)


def test_a_column_that_raises_is_recorded(monkeypatch):
    def broken(problem, noise):
        raise ValueError("no such layer\nsecond line")

    monkeypatch.setitem(columns.COLUMNS, "broken", broken)
    bad, good = time_columns(WORKLOADS["mlp16"], ["broken", "gsm ghost"], **QUICK)
    assert bad.failure == "ValueError: no such layer" and bad.ratio is None
    assert good.ratio is not None


def test_processor_time_does_not_count_waiting(monkeypatch):
    def idle(problem, noise):
        return Trainer(lambda: time.sleep(0.05), problem.model)

    monkeypatch.setitem(columns.COLUMNS, "idle", idle)
    (found,) = time_columns(WORKLOADS["mlp16"], ["idle"], clock="cpu", **QUICK)
    assert found.seconds < 0.05


def test_a_reason_is_one_line():
    assert reason(RuntimeError("")) == "RuntimeError: "
    assert len(reason(RuntimeError("x" * 1000))) == 300


def test_an_unknown_column_is_an_error():
    with pytest.raises(KeyError):
        columns.make("gsm unheard-of", WORKLOADS["mlp16"].problem("quick"))
