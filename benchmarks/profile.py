"""Where one column's step spends its time: ``python -m benchmarks.profile classifier --column "gsm auto"``.

Prints the ratio to the non-private step, the share of each phase (by the name of the function that does it), and the
operators that took longest, beside the same operator's time in the non-private step.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.columns import BASE, COLUMNS, Step, make
from benchmarks.timing import CLOCKS, seconds
from benchmarks.workloads import WORKLOADS

# Function name -> phase; cumulative times, so a phase that calls another contains it.
PHASES = {
    ("wrapper.py", "forward"): "forward, with capture",
    ("_tensor.py", "backward"): "backward, with capture",
    ("tape.py", "receive"): "  receiving output gradients (in the backward)",
    ("planner.py", "keeps"): "    planning",
    ("clipping.py", "clip"): "norms and weights",
    ("registry.py", "per_sample_gradients"): "  per-sample gradients, whoever asks",
    ("registry.py", "per_sample_norms"): "  norms of layers, whoever asks",
    ("ledger.py", "squared_norm"): "  norms of materialised gradients, whoever asks",
    ("registry.py", "weighted_sum"): "weighted sums of layers",
    ("ledger.py", "weighted"): "weighted sums of materialised gradients",
    ("noise.py", "add_"): "noise",
    ("optimizer.py", "scale_grad"): "scaling",
    ("optimizer.py", "clip_and_accumulate"): "clip_and_accumulate, all",
    ("optimizer.py", "add_noise"): "add_noise, all",
    ("optimizer.py", "step"): "step, all",
    ("sgd.py", "step"): "the wrapped optimizer's step",
    ("optimizer.py", "zero_grad"): "zero_grad",
}


def phases(step: Step, repeats: int, clock: str) -> tuple[list[tuple[str, float, int]], int]:
    """`(phase, seconds per step, calls per step)` under cProfile, and the number of Python calls per step."""
    recorder = cProfile.Profile(CLOCKS[clock])
    recorder.enable()
    for _ in range(repeats):
        step()
    recorder.disable()
    stats = pstats.Stats(recorder).stats  # type: ignore[attr-defined]
    found: dict[str, tuple[float, int]] = {}
    for (file, _, function), (_, calls, _, cumulative, _) in stats.items():
        label = PHASES.get((file.rsplit("/", 1)[-1], function))
        if label and ("gsm" in file or "grad_samplers" in file or "torch" in file):
            before = found.get(label, (0.0, 0))
            found[label] = (before[0] + cumulative, before[1] + calls)
    rows = [(label, *found[label]) for label in PHASES.values() if label in found]
    total = sum(calls for _, calls, _, _, _ in stats.values())
    return [(name, t / repeats, c // repeats) for name, t, c in rows], total // repeats


def operators(step: Step, repeats: int, device: str) -> dict[str, tuple[float, int]]:
    """Operator to (seconds of its own per step, calls per step)."""
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        for _ in range(repeats):
            step()
    return {
        e.key: ((e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6 / repeats, e.count // repeats)
        for e in recorded.key_averages()
    }


def show(workload: str, column: str, *, size: str, repeats: int, top: int, device: str, dtype: str, clock: str) -> str:
    """The whole report as text."""
    problem = WORKLOADS[workload].problem(size, device=device, dtype=dtype)
    base, step = make(BASE, problem).step, make(column, problem).step
    for warm in (base, step, base, step):
        warm()
    pairs = [(seconds(base, device, clock), seconds(step, device, clock)) for _ in range(max(5, repeats))]
    plain, private = (median(p[i] for p in pairs) for i in (0, 1))
    ratio = median(b / a for a, b in pairs)
    lines = [f"{workload}, {column}: {private * 1e3:.1f} ms, non-private {plain * 1e3:.1f} ms, ratio {ratio:.2f}"]
    rows, calls = phases(step, repeats, clock)
    lines.append(f"Python calls per step: {calls} (non-private {phases(base, repeats, clock)[1]})")
    lines += [f"  {name:<50} {t * 1e3:9.2f} ms {c:6d} calls" for name, t, c in rows]
    ours, theirs = operators(step, repeats, device), operators(base, repeats, device)
    lines.append(f"{'operator':<44} {'ms':>9} {'calls':>6} {'non-private ms':>15} {'calls':>6}")
    for name in sorted(ours, key=lambda n: theirs.get(n, (0.0, 0))[0] - ours[n][0])[:top]:
        (t, c), (t0, c0) = ours[name], theirs.get(name, (0.0, 0))
        lines.append(f"{name[:44]:<44} {t * 1e3:9.2f} {c:6d} {t0 * 1e3:15.2f} {c0:6d}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--column", default="gsm auto", choices=list(COLUMNS))
    parser.add_argument("--size", default="full", choices=["full", "quick"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        show(
            options.workload,
            options.column,
            size=options.size,
            repeats=options.repeats,
            top=options.top,
            device=options.device,
            dtype=options.dtype,
            clock=options.clock,
        )
    )


if __name__ == "__main__":
    main()
