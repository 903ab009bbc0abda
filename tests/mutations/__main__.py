"""`make mutations`: takes every guard of the table away, one at a time, and runs the tests that must notice.

    python -m tests.mutations [-j 2] [words ...]

Only records that contain one of the words are run (all, if there are none). Nothing in the working tree is changed:
each mutation is made in a temporary copy. Ends with status 1 if a guard can be removed without a test failing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.mutations.table import HERE, ROOT, Mutation, load

PACKAGES = ("accountants", "grad_samplers", "gsm", "tests")
# Imported once, before the forks: most of the time of a small test.
HEAVY = ("torch", "torch.func", "scipy.stats", "opacus", "opacus.validators", "hypothesis", "pytest")
TIMEOUT = 120


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """A temporary copy of the packages and the tests."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        for name in PACKAGES:
            shutil.copytree(ROOT / name, Path(folder, name))
        shutil.copy2(ROOT / "pyproject.toml", folder)
        yield Path(folder)


def run_tests(tree: Path, tests: Sequence[str], output: Path) -> int:
    """pytest's exit status for ``tests`` in this process, which is of no use for anything else afterwards."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.dont_write_bytecode = True  # a mutated file must never be taken for the original
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
    os.chdir(tree)
    sys.path[:] = [str(tree), *[p for p in sys.path if Path(p or ".").resolve() != ROOT]]
    for name in [n for n in sys.modules if n.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    import pytest

    # Half a second each: plugins that no test here uses, and collecting the garbage of all that HEAVY holds.
    plugins = [f"-pno:{name}" for name in ("cacheprovider", "anyio", "unraisableexception")]
    options = ["-x", "-q", "--tb=short", *plugins, "-o", f"timeout={TIMEOUT}", "--no-header"]
    return int(pytest.main([*options, *tests]))


def forked(mutation: Mutation | None, tests: Sequence[str], output: Path) -> int:
    """Starts a process that runs the tests without the guard (None: with all of them); returns its id."""
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        with copy_of_the_tree() as tree:
            if mutation is not None:
                file = tree / mutation.path
                file.write_text(mutation.mutated(file.read_text(encoding="utf-8")), encoding="utf-8")
            status = run_tests(tree, tests, output)
    finally:
        sys.stdout.flush()
        os._exit(status)


def outcome(status: int) -> str:
    """What an exit status of pytest means for a mutation."""
    return {0: "SURVIVED", 1: "killed"}.get(status, f"BROKEN (pytest ended with {status})")


def run(mutations: Sequence[Mutation], jobs: int, folder: Path) -> Iterator[tuple[Mutation, int, Path]]:
    """Runs all mutations, ``jobs`` at a time; yields each with pytest's exit status and output."""
    waiting, running = list(enumerate(mutations)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            n, mutation = waiting.pop(0)
            output = folder / f"{n}.log"
            running[forked(mutation, mutation.tests, output)] = mutation, output
        process, status = os.wait()
        mutation, output = running.pop(process)
        yield mutation, os.waitstatus_to_exitcode(status), output


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="run only records that contain one of these")
    parser.add_argument("--table", type=Path, default=HERE, help="folder with other tables")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes at a time")
    given = parser.parse_args(arguments)
    chosen = [m for m in load(given.table) if not given.words or any(w in f"{m}" for w in given.words)]
    for mutation in chosen:
        mutation.mutated((ROOT / mutation.path).read_text(encoding="utf-8"))
    transformers = any("integrations/" in test for m in chosen for test in m.tests)
    for name in (*HEAVY, *(["transformers"] if transformers else [])):
        with suppress(ImportError):
            importlib.import_module(name)
    start, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        output = Path(folder, "all.log")
        tests = list(dict.fromkeys(t for m in chosen for t in m.tests))
        _, status = os.waitpid(forked(None, tests, output), 0)
        if status:
            print(output.read_text(errors="replace")[-5000:], "The tests fail with all guards in place.", sep="\n")
            return 2
        for mutation, status, output in run(chosen, given.jobs, Path(folder)):
            if status != 1:
                bad += 1
                why = f"  ({mutation.why})" if mutation.why else ""
                print(f"{outcome(status)}: {mutation.place} {mutation.path}{why}\n-{mutation.old}+{mutation.new}")
                if status:
                    print(output.read_text(errors="replace")[-2000:])
                sys.stdout.flush()
    print(f"{len(chosen)} guards removed one by one, {bad} without a failing test, {time.monotonic() - start:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
