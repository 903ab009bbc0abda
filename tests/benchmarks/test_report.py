"""Tables from results."""

import json

import pytest

from benchmarks import picture, report


def timing(workload, column, ratio, **more):
    failure = None if ratio else "TypeError: no"
    seconds = ratio and ratio * 0.01
    return {"workload": workload, "column": column, "ratio": ratio, "base_seconds": 0.01 if ratio else None,
            "seconds": seconds, "failure": failure, "options": {}, **more}  # fmt: skip


TIMES = [timing("a", "x", 2.0), timing("a", "y", None), timing("b", "x", 8.0), timing("b", "y", 3.0)]
MEMORY = [
    {"workload": "a", "column": "non-private", "peak": 2**21, "failure": None},
    {"workload": "a", "column": "gsm auto", "peak": 2**22, "failure": None},
]


def lines(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_time_table():
    head, _, a, b, mean = lines(report.time_table(TIMES))
    assert head == ["", "non-private ms", "x", "y"]
    assert a == ["a", "10.0", "2.00", "fails"] and b == ["b", "10.0", "8.00", "3.00"]
    assert mean == ["geometric mean", "", "4.00", "3.00 (of 1)"]


def test_memory_table():
    assert lines(report.memory_table(MEMORY))[2] == ["a", "2 MB", "2.00"]


def test_growth_table():
    rows = [timing("classifier", "x", 1.5, options={"axis": "batch", "value": 4})]
    assert lines(report.growth_table(rows))[2] == ["batch = 4", "10.0", "1.50"]


def test_subtree_table_is_relative_to_the_standard_model():
    rows = [timing("standard", "x", 1.0), timing("extreme", "x", 1.5)]
    table = lines(report.subtree_table(rows, {"standard": 136, "extreme": 172}))
    assert table[2:] == [["standard", "10.0 (1.00)", "136 s (1.00)"], ["extreme", "15.0 (1.50)", "172 s (1.26)"]]


def test_failures_and_disagreements_are_named():
    assert report.failures(TIMES) == "- a, y: TypeError: no"
    rows = [{"workload": "a", "column": "x", "error": 0.5}, {"workload": "a", "column": "y", "error": 1e-7}]
    text = report.agreement_text(rows)
    assert text.startswith("1 of 2 updates agree") and "WRONG: a, x: relative error 0.5" in text
    assert "WRONG" in report.agreement_text([{"workload": "a", "column": "x", "error": float("nan")}])


def test_render_and_save(tmp_path):
    results = {"environment": report.environment(1, "cpu"), "options": {"size": "quick"}}
    results |= {"time": TIMES, "memory": MEMORY}
    text = report.render(results)
    assert "Time per step" in text and "Peak memory" in text and "Growth" not in text
    path = report.save(results, tmp_path / "new", "name")
    assert json.loads(path.read_text())["time"] == TIMES


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (extra: demo)")
    results = {"environment": report.environment(1, "cpu"), "time": TIMES, "memory": MEMORY}
    assert picture.draw(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not picture.draw({"environment": results["environment"]}, tmp_path / "b.png")
