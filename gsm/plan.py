"""The plan: for every trainable parameter, which rung of the ladder gives its per-sample gradient, and why.

The rungs, in order of preference: a registered *sampler*; *tracked* uses of the parameter by known functions;
*functorch* over the subtree that owns it; a *loop* over the samples of that subtree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from grad_samplers import lookup, reason_unsupported
from grad_samplers.functional import FUNCTIONAL_LAYERS


@dataclass
class Entry:
    """One module with trainable parameters of its own, or one subtree."""

    path: str
    type: str
    parameters: list[str]
    rung: str
    why: str
    reading: str = ""  # materialised / ghost, once a batch was seen
    estimate: str = ""


@dataclass
class Plan:
    """How every trainable parameter is handled; `print(plan)` is a table."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, parameter: str) -> Entry:
        """The entry that handles a parameter, by the parameter's name (or the entry by its module's path)."""
        for entry in self:
            if parameter in entry.parameters:
                return entry
        return self.entries[parameter]

    def rung(self, parameter: str) -> str:
        """`"sampler"`, `"tracked"`, `"functorch"` or `"loop"`."""
        return self[parameter].rung

    def __str__(self) -> str:
        head = ("module", "type", "parameters", "rung", "why", "reading", "estimate")
        rows = [(e.path or "(model)", e.type, _shortened(e), e.rung, e.why, e.reading, e.estimate) for e in self]
        used = [i for i in range(len(head)) if i < 5 or any(r[i] for r in rows)]
        widths = [max(len(head[i]), *(len(r[i]) for r in rows)) if rows else len(head[i]) for i in used]
        lines = ["  ".join(head[i].ljust(w) for i, w in zip(used, widths, strict=True)).rstrip()]
        lines.append("  ".join("-" * w for w in widths))
        lines += ["  ".join(r[i].ljust(w) for i, w in zip(used, widths, strict=True)).rstrip() for r in rows]
        return "\n".join(lines)


def _shortened(entry: Entry) -> str:
    names = [p[len(entry.path) + 1 :] if entry.path and p.startswith(entry.path + ".") else p for p in entry.parameters]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ... ({len(names)})"


def own_trainable(module: nn.Module) -> list[str]:
    """Names of the module's own parameters that want a gradient."""
    return [n for n, p in module._parameters.items() if p is not None and p.requires_grad]


def covers_functionally(module: nn.Module) -> bool:
    """Whether the module's forward is one known function, reached through the function."""
    sampler = lookup(module)
    return sampler is not None and sampler.cls in FUNCTIONAL_LAYERS and _builtin(sampler.grad)


def _builtin(function: object) -> bool:
    function = getattr(function, "func", function)  # functools.partial
    return getattr(function, "__module__", "").startswith("grad_samplers.")


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def initial_entry(path: str, module: nn.Module, composed: bool) -> Entry:
    """What is known about a module before any batch was seen."""
    names = [joined(path, n) for n in own_trainable(module)]
    kind = type(module).__name__
    if composed:
        return Entry(path, kind, names, "sampler", "rewritten in terms of known functions")
    sampler = lookup(module)
    if sampler is not None:
        reason = reason_unsupported(module)
        if reason is None:
            return Entry(path, kind, names, "sampler", f"registered for {_class_name(sampler.cls)}")
        return Entry(path, kind, names, "tracked", reason)
    return Entry(
        path, kind, names, "tracked", f"no sampler is registered for {kind}: its parameters' uses are followed"
    )


def _class_name(cls: type | str) -> str:
    return cls.rpartition(".")[2] if isinstance(cls, str) else cls.__name__
