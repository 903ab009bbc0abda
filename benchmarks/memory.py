"""Peak memory of training, each column in a process of its own.

On a CPU: the highest resident set size of the process during three steps (`VmHWM` of /proc/self/status, which is what
`ru_maxrss` means but does not inherit the parent's), minus its size after imports and one step of the same column on
the small problem, which pulls in whatever is loaded late. So the figure counts parameters, activations, gradients and
whatever the allocator does not give back, and not the interpreter. On CUDA: the allocator's own peak.

How much the C allocator does not give back depends on the order in which tensors come and go more than on their size.
With ``live=True`` it is told to return every tensor from 64 KiB on as soon as it is freed, so that the figure is what
is in use at the same time.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.columns import make
from benchmarks.timing import reason
from benchmarks.workloads import WORKLOADS

STEPS = 3
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt: from this size on an allocation is a mapping of its own
PRELOAD = ["torch", "torch.func", "opacus", "opacus.validators", "gsm.optimizer", "gsm.wrapper", "benchmarks.memory"]


@dataclass
class Memory:
    """One cell: bytes at the peak, or why there is none."""

    workload: str
    column: str
    peak: int | None = None
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resident() -> tuple[int, int]:
    """Bytes: the highest resident set size so far, and the present one (both the highest, where /proc is missing)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))  # type: ignore[return-value]
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak


def return_at_once() -> bool:
    """Makes the C allocator give large allocations back when they are freed; False where it cannot be told to."""
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16))
    except (OSError, AttributeError):  # another C library than glibc
        return False


def measure(
    workload: str, column: str, size: str, device: str, dtype: str, threads: int, live: bool, changes: dict[str, Any]
) -> Memory:
    """Runs in the fresh process."""
    torch.set_num_threads(threads)
    if live and not return_at_once():
        return Memory(workload, column, failure="the C library's allocator cannot be told to return memory at once")
    row = WORKLOADS[workload]
    try:
        make(column, row.problem("quick", device=device, dtype=dtype)).step()
        cuda = device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = 0 if cuda else resident()[1]
        step = make(column, row.problem(size, device=device, dtype=dtype, **changes)).step
        for _ in range(STEPS):
            step()
        peak = torch.cuda.max_memory_allocated() if cuda else resident()[0]
        return Memory(workload, column, peak - before)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is a result
        return Memory(workload, column, failure=reason(error))


def measure_columns(
    workload: str,
    columns: Sequence[str],
    *,
    size: str = "full",
    device: str = "cpu",
    dtype: str = "float32",
    live: bool = False,
    **changes: Any,
) -> list[Memory]:
    """Peak memory of each column on one workload, each measured in a fresh process."""
    context = multiprocessing.get_context("forkserver")  # starts from imports alone: nothing was computed in it
    context.set_forkserver_preload(PRELOAD)
    out = []
    for column in columns:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            job = pool.submit(measure, workload, column, size, device, dtype, torch.get_num_threads(), live, changes)
            try:
                out.append(job.result())
            except BrokenProcessPool:
                out.append(Memory(workload, column, failure="the process was killed (out of memory?)"))
    return out
