"""The command line: ``python -m benchmarks [--quick]``. Prints tables, writes JSON and a picture."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import agreement, growth, memory, picture, report, subtrees
from benchmarks.columns import BASE, COLUMNS, DEFAULT_COLUMNS
from benchmarks.timing import CLOCKS, time_columns
from benchmarks.workloads import WORKLOADS

PARTS = ("time", "memory", "live", "growth", "subtrees", "agreement")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options; what is left out depends on --quick and on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats, under a minute")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--suite", choices=["cpu", "accelerator"], help="default: by the device")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), metavar="NAME", help=", ".join(COLUMNS))
    parser.add_argument("--pairs", type=int, help="pairs per column")
    parser.add_argument("--batch", type=int, help="batch size instead of each workload's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for busy machines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--name", help="of the result's files; default: latest, quick, or the device's name")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, keep: Callable[[dict[str, Any]], object] = lambda results: None) -> dict[str, Any]:
    """Measures what the options ask for and returns it as one dictionary of plain values.

    ``keep`` is called with what there is after every workload, so that an interrupted run is not lost.
    """
    torch.set_num_threads(options.threads)
    suite = options.suite or ("accelerator" if options.device.startswith("cuda") else "cpu")
    size = "quick" if options.quick else "full"
    rows = [w for w in WORKLOADS.values() if (w.name in options.workloads if options.workloads else w.suite == suite)]
    private = [c for c in options.columns or DEFAULT_COLUMNS if c != BASE]
    place = {"device": options.device, "dtype": options.dtype}
    timed = {"size": size, "pairs": options.pairs or (3 if options.quick else 7), "clock": options.clock, **place}
    timed |= {"warmup": 1, "budget": 1.0} if options.quick else {}
    changes = {} if options.batch is None else {"batch": options.batch}
    # CUDA's allocator counts what is live anyway.
    memory_parts = [p for p in ("memory", "live") if p in options.parts and (p == "memory" or options.device == "cpu")]
    results: dict[str, Any] = {
        "environment": report.environment(options.threads, options.device),
        "options": {"size": size, "clock": options.clock, "dtype": options.dtype, "pairs": timed["pairs"], **changes},
    }

    def collect(part: str, found: list[Any]) -> None:
        results.setdefault(part, []).extend(item.to_dict() for item in found)

    for row in rows:
        try:
            row.problem("quick")
        except ImportError as error:
            print(f"left out: {row.title} ({error})", file=sys.stderr)
            results.setdefault("left_out", {})[row.name] = str(error)
            continue
        print(f"{time.strftime('%H:%M:%S')} {row.title}", file=sys.stderr, flush=True)
        if "time" in options.parts:
            collect("time", time_columns(row, private, **timed, **changes))
        for part in memory_parts if not options.quick else ():
            found = memory.measure_columns(row.name, [BASE, *private], live=part == "live", **place, **changes)
            collect(part, found)
        if "agreement" in options.parts:
            collect("agreement", agreement.compare(row, private))
        keep(results)
    for part in memory_parts if options.quick else ():
        collect(part, memory.measure_columns("mlp16", [BASE, *private[:3]], live=part == "live", **place))
    if "growth" in options.parts:
        print(f"{time.strftime('%H:%M:%S')} growth", file=sys.stderr, flush=True)
        collect("growth", growth.measure([c for c in growth.COLUMNS if c in private], quick=options.quick, **timed))
    if "subtrees" in options.parts:
        print(f"{time.strftime('%H:%M:%S')} subtrees", file=sys.stderr, flush=True)
        collect("subtrees", subtrees.measure([c for c in subtrees.COLUMNS if c in private], **timed))
        results["reported_by_opacus"] = subtrees.REPORTED
    return results


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    for noisy in ("Full backward hook is firing", "In CPU autocast"):  # Opacus, at every step
        warnings.filterwarnings("ignore", message=noisy)
    device = report.environment(options.threads, options.device)["device"]
    own = f"{device}-{options.dtype}".lower().replace(" ", "-")
    name = options.name or ("quick" if options.quick else "latest" if options.device == "cpu" else own)
    results = run(options, lambda found: report.save(found, options.output, name))
    text = report.render(results)
    print(text)
    path = report.save(results, options.output, name)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    drawn = picture.draw(results, path.with_suffix(".png"))
    print(f"\nwritten: {path}" + (f", {path.with_suffix('.png')}" if drawn else " (no picture: matplotlib is missing)"))


if __name__ == "__main__":
    main()
