"""One picture of a result: time and memory relative to the non-private step, one group of bars per workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "gsm auto": "#0b6e4f", "gsm ghost": "#3a9d6f", "gsm hooks": "#86c5a4", "gsm functorch": "#c5e3d2",
    "opacus hooks": "#8c3b1b", "opacus ghost": "#c75b2a", "opacus functorch": "#e29a6f", "opacus ew": "#f1cbb0",
    "opake": "#5b6ea8",
}  # fmt: skip


def draw(results: dict[str, Any], path: Path) -> bool:
    """Writes a PNG of the time and memory tables; False where matplotlib is missing or there is nothing to draw."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    if rows := results.get("time"):
        panels.append(("time per step / non-private", [(r["workload"], r["column"], r["ratio"]) for r in rows]))
    if rows := results.get("memory"):
        base = {r["workload"]: r["peak"] for r in rows if r["column"] == "non-private"}
        kept = [r for r in rows if r["column"] in COLOURS and r["peak"] and base.get(r["workload"])]
        cells = [(r["workload"], r["column"], r["peak"] / base[r["workload"]]) for r in kept]
        panels += [("peak memory / non-private", cells)] if cells else []
    if not panels:
        return False
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(14, 4.2 * len(panels)), squeeze=False)
    for axis, (title, cells) in zip(axes[:, 0], panels, strict=True):
        _bars(axis, title, cells)
    axes[0, 0].legend(ncol=5, fontsize=8, frameon=False, loc="upper right")
    env = results["environment"]
    figure.suptitle(f"torch {env['torch']}, {env['device']}, {env['processor']}, {env['threads']} threads", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _bars(axis: Any, title: str, cells: Sequence[tuple[str, str, float | None]]) -> None:
    workloads, columns = list(dict.fromkeys(c[0] for c in cells)), list(dict.fromkeys(c[1] for c in cells))
    width = 0.85 / len(columns)
    for j, column in enumerate(columns):
        found = {w: v for w, c, v in cells if c == column and v}
        places = [i + (j - (len(columns) - 1) / 2) * width for i, w in enumerate(workloads) if w in found]
        axis.bar(places, [found[w] for w in workloads if w in found], width, label=column, color=COLOURS.get(column))
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_yticks([0.5, 1, 1.5, 2, 3, 5, 10, 30, 100], ["0.5", "1", "1.5", "2", "3", "5", "10", "30", "100"])
    axis.minorticks_off()
    axis.set_xticks(range(len(workloads)), workloads)
    axis.set_ylabel(title)
    axis.spines[["top", "right"]].set_visible(False)
