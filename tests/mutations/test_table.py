"""The table of guards is up to date: it finds its guards, its tests exist, and no error or warning is missing in it.

That each guard's tests fail without it is shown by `make mutations`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations.table import ROOT, Mutation, load

TABLE = load()
FILES = sorted({m.path for m in TABLE})
PACKAGES = ("accountants", "grad_samplers", "gsm")
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

#: Errors whose loss nothing could notice, each with the reason.
LEFT_OUT = {
    "gsm/rules.py": {' with a vector that holds the batch"': "the next rule refuses the same: it contracts the batch"},
    "gsm/known.py": {", whose first input does not depend": "no known function has a constant in front of a batch"},
}


@pytest.mark.parametrize("path", FILES)
def test_every_guard_of_the_table_is_found_once(path: str) -> None:
    """If this fails, a guard was rewritten: write it anew in the table, and run `python -m tests.mutations FILE`."""
    for mutation in TABLE:
        if mutation.path == path:
            ast.parse(mutation.mutated(SOURCES[path]))


def test_every_test_of_the_table_exists() -> None:
    known: dict[str, str] = {}
    for mutation in TABLE:
        for test in mutation.tests:
            file, _, name = test.partition("::")
            text = known.setdefault(file, (ROOT / file).read_text(encoding="utf-8"))
            function = name.partition("[")[0]
            assert not name or re.search(rf"^def {function}\(", text, re.M), f"{mutation.place}: there is no {test}"


def test_no_two_records_are_the_same() -> None:
    seen: dict[tuple[str, str, str], Mutation] = {}
    for mutation in TABLE:
        other = seen.setdefault((mutation.path, mutation.old, mutation.new), mutation)
        assert other is mutation, f"{mutation.place} repeats {other.place}"


def refusals(source: str) -> list[tuple[int, set[int]]]:
    """Line of each `raise` and warning, and the lines any of which a record may replace to take it away."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            if node.exc is None or "NotImplementedError" == ast.unparse(node.exc):
                continue  # passed on, or an interface
        elif not (isinstance(node, ast.Call) and re.search(r"\b(warnings\.warn|_warn_once)$", ast.unparse(node.func))):
            continue
        lines = set(range(node.lineno, node.end_lineno + 1))  # type: ignore[attr-defined, operator]
        above = parents[node] if isinstance(node, ast.Raise) else parents[parents[node]]
        if isinstance(above, ast.If | ast.ExceptHandler):
            lines |= set(range(above.lineno, above.body[0].lineno))
        found.append((node.lineno, lines))  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_every_error_and_warning_is_in_the_table(path: str) -> None:
    """Whoever adds an error adds a record: the lines that make it, and the test that fails without them."""
    source = SOURCES[path]
    covered = {line for m in TABLE if m.path == path for line in m.lines(source)}
    text = source.splitlines()
    for line, lines in refusals(source):
        own = "\n".join(text[n - 1] for n in sorted(lines))
        if not lines & covered and not any(words in own for words in LEFT_OUT.get(path, ())):
            pytest.fail(f"{path}:{line} is in no record of tests/mutations:\n{own}")


def test_the_runner_tells_a_guard_from_what_is_none(tmp_path: Path) -> None:
    table = tmp_path / "table.txt"
    old = '-        raise ValueError(f"gamma must be a positive number, got {gamma!r}.")'
    own = "tests/gsm/test_clipping.py::test_gamma_must_be_positive"
    other = "tests/gsm/test_clipping.py::test_flat_weights_are_one_up_to_the_bound_and_bound_over_norm_beyond"
    table.write_text("\n".join(f"gsm/clipping.py\n{old}\n+        pass\n{test}\n" for test in (own, other)))
    command = [sys.executable, "-m", "tests.mutations", "--table", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "2 guards removed one by one, 1 without a failing test" in done.stdout
    assert "SURVIVED: table.txt:6 gsm/clipping.py" in done.stdout
    assert "raise ValueError(f\"gamma" in (ROOT / "gsm/clipping.py").read_text()
