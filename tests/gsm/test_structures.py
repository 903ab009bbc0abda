"""Tensors in whatever a model returns, and structures that torch is taught to take apart."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_flatten, tree_map

from gsm.structures import make_known, named_tensors
from gsm.subtree import NotPerSample
from gsm.wrapper import GradSampleModule
from tests.compare import check

Pair = namedtuple("Pair", "y aux")


@dataclass
class Batch:
    x: Tensor
    kind: str = "plain"
    cached: Any = field(default=None, init=False)


@dataclass(frozen=True)
class Frozen:
    x: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor):
            raise TypeError("a tensor")


class Encoding(UserDict[str, Any]):
    pass


def test_tensors_are_named_by_the_path_to_them() -> None:
    t = torch.ones(2)
    itself: dict[str, Any] = {"t": t}
    itself["again"] = itself
    cases: list[tuple[Any, list[str]]] = [
        (t, ["the model's output"]),
        (pack_sequence([t, t]), ["the model's output"]),
        ((t, [t, {"a": t}]), ["output 0", "output 1.0", "output 1.1.a"]),
        (Pair(t, 3), ["y"]),
        (OrderedDict(a=t, b=None), ["a"]),
        (Batch(t), ["x"]),
        (SimpleNamespace(inner=SimpleNamespace(t=t)), ["inner.t"]),
        (torch.distributions.Independent(torch.distributions.Normal(t, t), 1), ["base_dist.loc", "base_dist.scale"]),
        ({1: t, "1": t}, ["1", "1'"]),
        (nn.Linear(2, 2), []),
        (nn.Linear, []),
        (None, []),
    ]
    for value, names in cases:
        assert list(named_tensors(value)) == names
    assert next(iter(named_tensors(itself))) == "t"


@pytest.mark.parametrize("make", [Batch, Frozen, lambda x: Encoding(x=x), lambda x: [Encoding(inner=Batch(x))]])
def test_structures_are_taken_apart_and_put_together(make: Any) -> None:
    value = make(torch.ones(2))
    leaves, _ = tree_flatten(make_known(value))
    assert any(leaf is not value and isinstance(leaf, Tensor) for leaf in leaves)
    doubled = tree_map(lambda leaf: 2 * leaf if isinstance(leaf, Tensor) else leaf, value)
    assert type(doubled) is type(value) and next(iter(named_tensors(doubled).values())).tolist() == [2, 2]


class Takes(nn.Module):
    """Takes a structure, and gives one."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.a, self.scale, self.give = nn.Linear(3, 2), nn.Parameter(torch.ones(2)), give

    def forward(self, batch: Any) -> Any:
        x = batch["x"] if isinstance(batch, UserDict) else batch.x
        return self.give(self.a(x) * self.scale)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch", "loop"])
@pytest.mark.parametrize("make", [Batch, lambda x: Encoding(x=x)], ids=["dataclass", "mapping"])
def test_structures_as_the_only_argument(make: Any, mode: str) -> None:
    wrapped = GradSampleModule(Takes(Batch), mode=mode)
    out = wrapped(make(torch.randn(4, 3)))
    assert isinstance(out, Batch) and out.x.shape == (4, 2) and out.kind == "plain"
    out.x.sum().backward()
    assert wrapped.per_sample_gradient_norms.shape == (4,)


@pytest.mark.parametrize("mode", ["functorch", "loop"])
@pytest.mark.parametrize(
    "give",
    [
        lambda y: {"y": y, "n": len(y)},
        lambda y: (y, [float(y.detach().sum())]),
        lambda y: torch.distributions.Normal(y, 1.0),
        lambda y: SimpleNamespace(y=y),
    ],
    ids=["number", "list of numbers", "distribution", "object"],
)
def test_what_one_sample_at_a_time_does_not_tell_of_the_batch_is_refused(give: Any, mode: str) -> None:
    """It would be the last sample's."""
    with pytest.raises(NotPerSample, match="runs one sample at a time: that of the batch is not known"):
        GradSampleModule(Takes(give), mode=mode)(Batch(torch.randn(4, 3)))


@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_a_cache_says_how_it_is_left_out(mode: str) -> None:
    class DynamicCache:
        pass

    with pytest.raises(NotPerSample, match=r"returns a DynamicCache, .*left out by model.config.use_cache = False"):
        GradSampleModule(Takes(lambda y: (y, DynamicCache())), mode=mode)(Batch(torch.randn(4, 3)))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_where_the_batch_runs_as_a_whole_anything_may_be_returned(mode: str) -> None:
    def loss(out: Any) -> Tensor:
        return -out.log_prob(torch.ones(2, dtype=torch.float64)).sum()

    class Gaussian(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return torch.distributions.Normal(super().forward(x), 1.0)

    check(Gaussian(3, 2), torch.randn(4, 3), mode=mode, loss=loss)
