"""The README's GPT-2 script, run as it stands."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the transformers extra")

SCRIPT = Path(__file__).parents[2] / "tutorials" / "gpt2_in_15_lines.py"


def test_it_has_15_lines():
    tree = ast.parse(SCRIPT.read_text())
    code = {line for node in ast.walk(tree) if (line := getattr(node, "lineno", None))} - {tree.body[0].lineno}
    assert len(code) == 15


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_runs_and_keeps_to_its_budget(capsys):
    names = runpy.run_path(str(SCRIPT))
    spent = float(re.search(r"epsilon = (\d+\.\d+)", capsys.readouterr().out).group(1))
    assert spent == 3.0
    model = names["model"]._module
    assert model.lm_head.weight is model.transformer.wte.weight, "the weights are tied, as transformers made them"
    assert names["optimizer"].accountant.history[0][1:] == (0.25, 4)
