"""The test-suite that ships inside Opacus's wheel, with this library behind Opacus's names.

`left_out.txt` lists the tests that plain Opacus passes and that do not pass here, each with its reason; they are run
as well, and one that passes has to leave the list. By default a selection is run that takes about two minutes;
`make test-opacus` runs all of it, plain Opacus too, and compares the two test by test.

Tests that need several GPUs, CUDA or torchcsprng skip themselves, under plain Opacus as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import opacus
import pytest

from tests.opacus.plugin import read_left_out

HERE = Path(__file__).parent
SUITE = Path(opacus.__file__).parent / "tests"
LEFT_OUT = HERE / "left_out.txt"
ALL = os.environ.get("OPACUS_TESTS") == "all"
# Where `make` puts torchvision, which five of the files import, out of the way of everything else (see plugin.py).
TORCHVISION = Path(sys.prefix) / "torchvision-for-opacus-tests"

# Most of the engine's tests are one class run again with another model or mode: the selection has each model and mode.
ENGINE = (
    "(ConvNetFrozenTest and not FrozenTestFunctorch) or TextTestFunctorch or TiedWeightsTest and not Functorch "
    "or CustomLayerHooksTest or (ConvNetTest and (basic or compatible or parameters_match))"
)
SELECTION = {
    "wrapper": ["grad_sample_module_test.py", "grad_sample_hooks_test.py", "per_sample_gradients_utils_test.py"],
    "ghost": [
        "grad_sample_module_fast_gradient_clipping_test.py",
        "grad_sample_hooks_fast_gradient_clipping_test.py",
        "mixed_precision_test.py",
    ],
    "samplers": ["grad_samples", "dp_layers", "validators", "module_validator_test.py"],
    "optimizer": ["gradient_accumulation_test.py", "schedulers", "accounting_noise_multiplier_test.py"],
    "loader": [
        "dpdataloader_test.py",
        "poisson_test.py",
        "distributed_poisson_test.py",
        "randomness_test.py",
        "batch_memory_manager_test.py",
    ],
    "accountants": ["accountants_test.py"],
    "engine": ["privacy_engine_test.py", "privacy_engine_validation_test.py", "-k", f"{ENGINE} or Validation"],
}


def run(arguments: list[str], which: str, folder: Path, profile: str) -> tuple[dict[str, str], str]:
    """Outcome of each test (passed, failed, skipped, left out) by its id, and pytest's output."""
    report = folder / f"{which}.xml"
    names = [str(SUITE / a) if a.endswith(".py") or (SUITE / a).is_dir() else a for a in arguments]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore"]
    command += ["-p", "tests.opacus.plugin", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, f"--rootdir={SUITE}", "-o", "python_files=*_test.py", f"--junitxml={report}"]
    command += [f"--opacus={which}", *(["--left-out", str(LEFT_OUT)] if which == "ours" else []), *names]
    path = [str(HERE.parents[1]), str(TORCHVISION), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OPACUS_TESTS_PROFILE": profile}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise RuntimeError(f"pytest did not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, cls = case.get("classname", "").rpartition(".")
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "failed"
            elif child.tag == "skipped":
                outcome = "left out" if child.get("type") == "pytest.xfail" else "skipped"
        name = f"{module.replace('.', '/')}.py::{cls}::{case.get('name')}"
        outcomes[name] = "failed" if "failed" in (outcome, outcomes.get(name)) else outcome
    return outcomes, done.stdout


def check(arguments: list[str], folder: Path, profile: str) -> dict[str, str]:
    if not TORCHVISION.exists():
        pytest.fail(f"{TORCHVISION} is missing: run the tests with `make test` or `make test-opacus`, which install it")
    outcomes, output = run(arguments, "ours", folder, profile)
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    assert not failed, f"{len(failed)} of Opacus's tests fail:\n" + "\n".join(failed) + f"\n{output[-6000:]}"
    assert sum(outcome == "passed" for outcome in outcomes.values()) > 3
    return outcomes


@pytest.mark.skipif(ALL, reason="the whole suite is run instead of the selection")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", SELECTION)
def test_selection(part: str, tmp_path: Path):
    check(SELECTION[part], tmp_path, "fast")


@pytest.mark.skipif(not ALL, reason="takes a quarter of an hour: make test-opacus")
@pytest.mark.timeout(7200)
def test_everything_that_plain_opacus_passes(tmp_path: Path):
    profile = os.environ.get("OPACUS_TESTS_PROFILE", "thorough")
    ours = check(["."], tmp_path, profile)
    plain, _ = run(["."], "plain", tmp_path, profile)
    reasons = read_left_out(LEFT_OUT)
    passed = {name for name, outcome in plain.items() if outcome == "passed"}
    print({outcome: sum(o == outcome for o in ours.values()) for outcome in sorted(set(ours.values()))})
    assert {name for name in passed if ours.get(name) != "passed"} == set(reasons) & passed
    assert set(reasons) <= passed, "tests that plain Opacus does not pass need no reason"


def test_every_test_left_out_has_a_reason_and_exists():
    reasons = read_left_out(LEFT_OUT)
    assert reasons and all(len(reason) > 40 for reason in reasons.values())
    for name in reasons:
        file, cls, test = name.split("::")
        assert (SUITE / file).exists(), name
        assert cls in (SUITE / file).read_text(), name
