"""`python -m tests.transformers.report`: runs the sweep and writes `docs/transformers.md`, one row an architecture.

`--shard 0/2 --results a.jsonl` runs a part and keeps its results; `--from a.jsonl b.jsonl` writes the page from those.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.transformers.architectures import Architecture, architectures
from tests.transformers.sweep import Result, as_dict, run

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
SECONDS = 240
HEAD = """# Transformers, as they come

Every architecture that a small configuration builds from transformers {version}'s auto-mappings, unmodified, against
the one-sample loop. Two runs each: 3 samples of 8 tokens, in float64 as far as the model lets it (many compute norms
and routers in float32 inside: relative error at most 2e-4), and 4 samples of 4 tokens with 4 heads, float64 throughout
(1e-8). *Hooks* compares per-sample gradients, *ghost* norms and weighted sums. *Mixes* means that the plain model
itself gives a sample other outputs in a batch than alone: refusing it is right. The last column counts parameters by
rung: registered sampler, known use of a bare parameter, `vmap` over a subtree, loop over the samples.

Written by `python -m tests.transformers.report` (`make test-transformers` checks the same).
"""


def results_of(architecture: Architecture) -> list[Result]:
    """The sweep of one architecture; one that hangs is an error."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return run(architecture)
    except TimeoutError as error:
        return [Result(str(architecture), "-", "-", "error", reason=str(error))]
    finally:
        signal.alarm(0)


def page(rows: list[dict[str, Any]]) -> str:
    """The page, from results as dicts."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_name[row["architecture"]].append(row)
    built = {n: [r for r in rs if r["verdict"] != "not built"] for n, rs in by_name.items()}
    built = {n: rs for n, rs in built.items() if rs}
    lines = [HEAD.format(version=transformers.__version__), *_summary(built, len(by_name)), ""]
    lines += ["| architecture | hooks | ghost | largest error | parameters by rung |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [_row(name, rs) for name, rs in sorted(built.items())]
    lines += ["", "## What stops, and why", ""]
    for name, rs in sorted(built.items()):
        bad = [r for r in rs if r["verdict"] in ("error", "WRONG") or (r["verdict"] == "refused" and not r["mixes"])]
        if bad:
            first = bad[0]
            lines.append(f"- {name}: {first['shape']} {first['mode']}: {first['verdict']}: {_short(first['reason'])}")
    lines += ["", "## Not built", "", "The small configuration, or the plain model on its inputs, stops:", ""]
    lines += [f"- {n}: {_short(rs[0]['reason'], 140)}" for n, rs in sorted(by_name.items()) if n not in built]
    return "\n".join(lines) + "\n"


def _summary(built: dict[str, list[dict[str, Any]]], total: int) -> list[str]:
    mixing = {n for n, rs in built.items() if any(r["mixes"] for r in rs)}
    alone = {n: rs for n, rs in built.items() if n not in mixing}
    right = {
        m: sum(all(r["verdict"] == "right" for r in rs if r["mode"] == m) for rs in alone.values())
        for m in ("hooks", "ghost")
    }
    wrong = sum(any(r["verdict"] == "WRONG" for r in rs) for rs in built.values())
    refused = sum(all(r["verdict"] == "refused" for r in built[n]) for n in mixing)
    rungs: Counter[str] = Counter()
    for rs in built.values():
        for r in rs:
            rungs.update(r["rungs"] if r["mode"] == "hooks" else {})
    share = ", ".join(f"{k} {v / max(sum(rungs.values()), 1):.1%}" for k, v in rungs.most_common())
    return [
        f"{total} architectures, {len(built)} built.",
        f"Samples independent: {len(alone)}; right in hooks {right['hooks']}, in ghost {right['ghost']}.",
        f"Silently wrong: {wrong}. Mixing: {len(mixing)}, refused {refused}.",
        f"Parameters by rung: {share}.",
    ]


def _row(name: str, rs: list[dict[str, Any]]) -> str:
    def verdict(mode: str) -> str:
        found = sorted({r["verdict"] for r in rs if r["mode"] == mode})
        mixes = " (mixes)" if any(r["mixes"] for r in rs) else ""
        return "/".join(found) + mixes if found else "-"

    exact = [r["error"] for r in rs if r["verdict"] == "right" and r["shape"] == "B=4 T=4"]
    rungs = next((r["rungs"] for r in rs if r["rungs"]), {})
    counts = ", ".join(f"{k} {v}" for k, v in rungs.items())
    return f"| {name} | {verdict('hooks')} | {verdict('ghost')} | {f'{max(exact):.0e}' if exact else ''} | {counts} |"


def _short(reason: str, limit: int = 260) -> str:
    text = re.sub(r"\s+", " ", re.sub(r"/\S+/", "", reason)).replace("|", "/")
    return text[:limit]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--from", dest="kept", type=Path, nargs="*")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.kept:
        rows = [json.loads(line) for path in options.kept for line in path.read_text().splitlines()]
    else:
        index, count = map(int, options.shard.split("/"))
        for architecture in architectures()[index::count]:
            new = [as_dict(r) for r in results_of(architecture)]
            rows += new
            if options.results:
                with options.results.open("a") as file:
                    file.writelines(json.dumps(r) + "\n" for r in new)
    if not options.results:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
