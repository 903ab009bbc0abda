"""A pytest plugin for running the test-suite that ships with Opacus: plain, or with `gsm.opacus.install()` active.

    python -m pytest -p tests.opacus.plugin --opacus=ours|plain [--left-out=FILE] site-packages/opacus/tests/...

With `--opacus=ours` the tests listed in the file are expected to fail, strictly: one that passes is an error, too.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

# Without shrinking: a test that is expected to fail may do so at its first example.
_COMMON = {"derandomize": True, "deadline": None, "phases": (Phase.explicit, Phase.generate)}
settings.register_profile("fast", max_examples=3, **_COMMON)
settings.register_profile("thorough", **_COMMON)
settings.load_profile(os.environ.get("OPACUS_TESTS_PROFILE", "fast"))
torch.set_num_threads(1)

if importlib.util.find_spec("torchvision"):
    # torchvision from PyPI is compiled against PyTorch's CUDA build: beside a CPU build its operators are missing, and
    # its import fails for want of two names. The models, transforms and data sets that the tests use need none of them.
    try:
        import torchvision
    except RuntimeError:
        _names = torch.library.Library("torchvision", "DEF")
        for _operator in ("nms", "qnms"):
            _names.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--opacus", choices=["ours", "plain"], default="plain")
    parser.addoption("--left-out", default=None)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--opacus") == "ours":
        import gsm.opacus

        gsm.opacus.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--left-out") is None:
        return
    reasons = read_left_out(Path(config.getoption("--left-out")))
    for item in items:
        reason = reasons.get(item.nodeid)
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def read_left_out(path: Path) -> dict[str, str]:
    """Test id to reason. The file: a reason on lines that start with `#`, then the tests it holds for."""
    reasons: dict[str, str] = {}
    reason: list[str] = []
    fresh = True
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            reason = [] if fresh else reason
            fresh = False
            reason.append(line.lstrip("# ").rstrip())
        elif line.strip():
            fresh = True
            reasons[line.strip()] = " ".join(reason)
    return reasons
