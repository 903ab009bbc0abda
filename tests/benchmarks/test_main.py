"""The command line, end to end, on a few tiny rows."""

import json

import pytest

from benchmarks import growth
from benchmarks.__main__ import PARTS, main
from benchmarks.profile import show
from benchmarks.subtrees import REPORTED, build


def test_quick_run_writes_every_part(tmp_path, capsys):
    chosen = ["gsm auto", "gsm hooks", "opacus hooks"]
    main(["--quick", "--workloads", "mlp16", "narrow", "--columns", *chosen, "--threads=1", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "quick.json").read_text())
    assert set(PARTS) <= set(results)
    for part in ("time", "growth", "subtrees"):
        assert {row["column"] for row in results[part]} == set(chosen)
        assert all(row["ratio"] > 0 for row in results[part])
    assert {row["workload"] for row in results["time"]} == {"mlp16", "narrow"}
    assert all(row["peak"] > 0 for row in results["memory"])
    assert all(row["error"] < 1e-5 for row in results["agreement"])
    assert {row["workload"] for row in results["subtrees"]} == set(REPORTED)
    assert (tmp_path / "quick.md").read_text().strip() in printed


def test_parts_can_be_chosen(tmp_path):
    main(["--quick", "--workloads", "mlp16", "--columns", "gsm auto", "--parts", "agreement", f"--output={tmp_path}"])
    results = json.loads((tmp_path / "quick.json").read_text())
    assert "time" not in results and len(results["agreement"]) == 1


def test_growth_moves_one_axis_at_a_time():
    rows = growth.measure(["gsm auto"], quick=True, size="quick", pairs=2, warmup=0)
    assert [row.options for row in rows] == [
        {"axis": axis, "value": value} for axis, values in growth.QUICK.items() for value in values
    ]


def test_subtree_models_own_a_parameter_at_their_height():
    own = {kind: [n for n, _ in build(kind, 2).named_parameters() if n.endswith("extra")] for kind in REPORTED}
    assert own == {"standard": [], "mid-level": ["0.extra", "1.extra"], "extreme": ["extra"]}


@pytest.mark.parametrize("column", ["gsm ghost", "opacus hooks"])
def test_profile_names_phases_and_operators(column):
    text = show("mlp16", column, size="quick", repeats=1, top=5, device="cpu", dtype="float32", clock="wall")
    assert "ratio" in text and "Python calls per step" in text and "aten::" in text
    if column.startswith("gsm"):
        assert "norms and weights" in text and "noise" in text
