"""Tables, as plain text that is also Markdown, and as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def environment(threads: int, device: str) -> Row:
    """What a reader needs to know about the machine: versions, processor, device, load."""
    found: Row = {"python": platform.python_version(), "processor": _processor(), "cores": os.cpu_count()}
    found |= {"threads": threads, "load": round(os.getloadavg()[0], 1), "device": device}
    if device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name()
    for package in ("torch", "opacus", "transformers", "opake"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def grid(
    rows: Sequence[Row], columns: Sequence[str], cell: Callable[[Row], str], *, key: str = "workload", corner: str = ""
) -> str:
    """A Markdown table: one line per value of ``key``, one column per trainer; cells without a row stay empty."""
    lines = [[corner, *columns], ["---"] + ["---:"] * len(columns)]
    for name in dict.fromkeys(row[key] for row in rows):
        cells = {row["column"]: cell(row) for row in rows if row[key] == name}
        lines.append([str(name), *(cells.get(c, "") for c in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def ratio_cell(row: Row) -> str:
    return "fails" if row["ratio"] is None else f"{row['ratio']:.2f}"


def time_table(rows: Sequence[Row]) -> str:
    """Ratios to the non-private step, its milliseconds in front, the geometric mean of each column below."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    base = [
        {"workload": row["workload"], "column": "non-private ms", "text": f"{row['base_seconds'] * 1e3:.1f}"}
        for row in rows
        if row["base_seconds"] is not None
    ]
    means = []
    for column in columns:
        found = [row["ratio"] for row in rows if row["column"] == column and row["ratio"] is not None]
        text = f"{geometric_mean(found):.2f}" if found else ""
        if any(row["column"] == column and row["ratio"] is None for row in rows):
            text += f" (of {len(found)})"
        means.append({"workload": "geometric mean", "column": column, "text": text})
    cells = [{**row, "text": ratio_cell(row)} for row in rows]
    return grid([*cells, *base, *means], ["non-private ms", *columns], lambda r: r["text"])


def memory_table(rows: Sequence[Row]) -> str:
    """Megabytes for the non-private step, ratios to it for the others."""
    base = {row["workload"]: row["peak"] for row in rows if row["column"] == "non-private"}

    def cell(row: Row) -> str:
        if row["peak"] is None:
            return "fails"
        if row["column"] == "non-private":
            return f"{row['peak'] / 2**20:.0f} MB"
        return f"{row['peak'] / base[row['workload']]:.2f}" if base.get(row["workload"]) else "?"

    return grid(rows, list(dict.fromkeys(row["column"] for row in rows)), cell)


def growth_table(rows: Sequence[Row]) -> str:
    """Ratios along each axis."""
    named = [{**row, "point": f"{row['options']['axis']} = {row['options']['value']}"} for row in rows]
    base = [
        {"point": row["point"], "column": "non-private ms", "text": f"{row['base_seconds'] * 1e3:.1f}"}
        for row in named
        if row["base_seconds"] is not None
    ]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    cells = [{**row, "text": ratio_cell(row)} for row in named]
    return grid([*cells, *base], ["non-private ms", *columns], lambda r: r["text"], key="point")


def subtree_table(rows: Sequence[Row], reported: dict[str, int]) -> str:
    """Milliseconds per step, and in brackets what each model costs relative to the standard one."""
    first = {row["column"]: row for row in rows if row["workload"] == "standard"}

    def cell(row: Row) -> str:
        if row["seconds"] is None:
            return "fails"
        start = first[row["column"]]["seconds"]
        return f"{row['seconds'] * 1e3:.1f}" + (f" ({row['seconds'] / start:.2f})" if start else "")

    extra = []
    for kind, s in reported.items():
        text = f"{s} s ({s / reported['standard']:.2f})"
        extra.append({"workload": kind, "column": "Opacus reports", "text": text})
    columns = list(dict.fromkeys(row["column"] for row in rows))
    cells = [{**row, "text": cell(row)} for row in rows]
    return grid([*cells, *extra], [*columns, "Opacus reports"], lambda r: r["text"])


def failures(rows: Sequence[Row]) -> str:
    """Every failing combination with its reason."""

    def line(row: Row) -> str:
        where = " in float64 (it runs in float32)" if row.get("error") is not None else ""
        return f"- {row['workload']}, {row['column']}{where}: {row['failure']}"

    return "\n".join(dict.fromkeys(line(row) for row in rows if row["failure"]))


def agreement_text(rows: Sequence[Row], tolerance: float = 1e-4) -> str:
    """One line if all updates agree with the loop, else the ones that do not."""
    wrong = [r for r in rows if r["error"] is not None and not r["error"] <= tolerance]
    right = sum(r["error"] is not None for r in rows) - len(wrong)
    total = right + len(wrong)
    lines = [f"{right} of {total} updates agree with one sample at a time (relative error at most {tolerance:g})."]
    lines += [f"- WRONG: {r['workload']}, {r['column']}: relative error {r['error']:.2g}" for r in wrong]
    return "\n".join(lines)


def render(results: Row) -> str:
    """The whole report."""
    env = ", ".join(f"{k} {v}" for k, v in results["environment"].items() if v is not None)
    parts = [f"{env}", f"options: {', '.join(f'{k}={v}' for k, v in results['options'].items())}"]
    if rows := results.get("time"):
        parts += ["### Time per step, relative to the non-private step", time_table(rows)]
    if rows := results.get("memory"):
        parts += ["### Peak memory, relative to the non-private step", memory_table(rows)]
    if rows := results.get("live"):
        parts += ["### Peak of what is live, relative to the non-private step", memory_table(rows)]
    if rows := results.get("growth"):
        parts += ["### Growth: transformer classifier, one size changed at a time", growth_table(rows)]
    if rows := results.get("subtrees"):
        parts += ["### Parameters above layers: ms per step (relative to the standard model)"]
        parts += [subtree_table(rows, results["reported_by_opacus"])]
    if rows := results.get("agreement"):
        parts += ["### Agreement", agreement_text(rows)]
    timed = [*results.get("time", []), *results.get("growth", []), *results.get("subtrees", [])]
    broken = failures([*timed, *results.get("memory", []), *results.get("live", []), *results.get("agreement", [])])
    return "\n\n".join([*parts, *(["### What fails, and why", broken] if broken else [])])


def save(results: Row, folder: Path, name: str) -> Path:
    """Writes ``name.json`` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path
