"""Wrapping a model ends the giving back and faulting in of memory between the operators of a step."""

import os
import platform
import subprocess
import sys

import pytest
from torch import nn

from gsm import GradSampleModule

TURNS = """
import resource
import torch
from torch import nn
from gsm import GradSampleModule

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        held = [torch.ones(2 << 20) for _ in range(4)]  # 8 MiB each: by itself glibc keeps 16
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def step():
    model = GradSampleModule(nn.Linear(4, 2))
    model(torch.randn(3, 4)).mean().backward()

first = faults()
step()
faults()  # the heap grows to what it needs
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the allocator of glibc")
@pytest.mark.parametrize("limit", [None, "1000000"], ids=["dynamic limits", "the user's own limit"])
def test_freed_memory_is_kept_unless_the_user_says_otherwise(limit):
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    own |= {"MALLOC_TRIM_THRESHOLD_": limit, "OMP_NUM_THREADS": "1"} if limit else {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", TURNS], env=own, capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert before > 100
    assert (after > before // 2) if limit else (after < before // 10)


def test_wrapping_a_model_says_so(monkeypatch):
    said = []
    monkeypatch.setattr("gsm.wrapper.keep_freed_memory", lambda: said.append(True))
    GradSampleModule(nn.Linear(3, 2))
    assert said
