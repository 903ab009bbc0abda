"""Whatever is compiled with torch.compile, and however: the per-sample gradients are those of the loop."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsm import GradSampleModule
from gsm.compiled import eager_runner
from tests.compare import MODES, captured
from tests.loop import assert_close_per_sample, per_sample_loop, projection_loss

torch_dynamo = pytest.importorskip("torch._dynamo", reason="this build of PyTorch has no compiler")


def scaled(h: Tensor, scale: Tensor) -> Tensor:
    return (h * scale).tanh()


class Net(nn.Module):
    """A bare parameter used beside a residual block, and by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(4, 6), nn.Linear(6, 2)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())
        self.scale = nn.Parameter(torch.rand(6))
        self.function: Callable[..., Any] = scaled

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.o(self.function(h, self.scale) + self.scale * self.block(h))


Built = tuple[nn.Module, Callable[[Tensor], Any]]


def compiled(net: Net, how: str, mode: str, backend: str) -> Built:
    """The wrapped model, and what to call: compiled in one of the ways there are."""
    inner: nn.Module = net
    if how == "block":
        net.block = torch.compile(net.block, backend=backend)
    elif how == "block in place":
        net.block.compile(backend=backend)
    elif how == "function":
        net.function = torch.compile(scaled, backend=backend)
    elif how == "model":
        inner = torch.compile(net, backend=backend)
    elif how in ("model in place", "not by its wrapper"):
        net.compile(backend=backend)
    wrapped = GradSampleModule(inner, mode=mode, loss_reduction="sum")
    if how == "wrapper":
        return wrapped, torch.compile(wrapped, backend=backend)
    if how == "wrapper in place":
        wrapped.compile(backend=backend)
    if how == "step":
        return wrapped, torch.compile(lambda x: wrapped(x) * 1.0, backend=backend)
    return wrapped, net if how == "not by its wrapper" else wrapped


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch_dynamo.reset()
    torch_dynamo.utils.counters.clear()
    yield
    torch_dynamo.reset()


def frames() -> int:
    """How many pieces of code were compiled since the last question."""
    count = torch_dynamo.utils.counters["frames"]["ok"]
    torch_dynamo.utils.counters.clear()
    return count


def exact(net: Net, original: Net, call: Callable[[Tensor], Any], wrapped: Any, size: int) -> None:
    x = torch.randn(size, 4, dtype=torch.float64)
    expected = per_sample_loop(original, x)
    projection_loss(call(x)).backward()
    got = {name.replace("_orig_mod.", ""): rows for name, rows in captured(net).items()}
    assert_close_per_sample(got, expected)
    wrapped.set_grad_sample_to_none()


INSIDE = ("block", "block in place", "function", "model", "model in place")
AROUND = ("wrapper", "wrapper in place", "step", "not by its wrapper")


@pytest.mark.filterwarnings("ignore:.*torch.compile:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", INSIDE + AROUND)
def test_gradients_are_those_of_the_loop(how: str, backend: str) -> None:
    torch.manual_seed(0)
    for mode in MODES if backend == "aot_eager" and how in ("block", "function", "model") else ("hooks",):
        net = Net().double()
        original = copy.deepcopy(net)
        wrapped, call = compiled(net, how, mode, backend)
        for size in (5, 3, 5, 1):
            exact(net, original, call, wrapped, size)


@pytest.mark.filterwarnings("ignore:.*torch.compile:UserWarning")
@pytest.mark.parametrize("how", INSIDE)
def test_the_library_is_not_traced_and_without_gradients_the_model_stays_compiled(how: str) -> None:
    torch.manual_seed(0)
    net = Net().double()
    original = copy.deepcopy(net)
    wrapped, call = compiled(net, how, "hooks", "eager")
    for _ in range(2):
        exact(net, original, call, wrapped, 5)
        assert frames() == 0
    for compiles in (True, False):
        with torch.no_grad():
            x = torch.randn(5, 4, dtype=torch.float64)
            torch.testing.assert_close(call(x), original(x))
        assert (frames() > 0) is compiles
        exact(net, original, call, wrapped, 5)  # what was compiled meanwhile is not used
        assert frames() == 0


def test_it_is_said_once() -> None:
    net = Net().double()
    net.block = torch.compile(net.block, backend="eager")
    wrapped = GradSampleModule(net)
    with pytest.warns(UserWarning, match=r"^block is compiled .*gains nothing from torch.compile"):
        wrapped(torch.randn(5, 4).double()).mean().backward()
    wrapped.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(torch.randn(5, 4).double()).mean().backward()


def test_it_is_said_once_of_a_compiled_wrapper() -> None:
    wrapped = GradSampleModule(Net().double())
    call = torch.compile(wrapped, backend="eager")
    with pytest.warns(UserWarning, match=r"^What calls the wrapped model is compiled"):
        call(torch.randn(5, 4).double()).mean().backward()
    wrapped.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(torch.randn(5, 4).double()).mean().backward()


def test_without_anything_compiled_nothing_is_said() -> None:
    wrapped = GradSampleModule(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(torch.randn(5, 4)).mean().backward()


@pytest.mark.filterwarnings("ignore:.*torch.compile:UserWarning")
def test_a_whole_graph_cannot_be_had_and_the_error_says_why() -> None:
    call = torch.compile(GradSampleModule(Net()), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="per_sample_gradients_are_captured_eagerly"):
        call(torch.randn(5, 4))


def test_compiled_autograd_is_refused() -> None:
    wrapped = GradSampleModule(nn.Linear(4, 2), loss_reduction="sum")
    x = torch.randn(5, 4)
    loss = wrapped(x).sum()
    from torch._dynamo import compiled_autograd

    with (
        pytest.raises(RuntimeError, match="compiled itself"),
        compiled_autograd._enable(torch.compile(backend="eager")),
    ):
        loss.backward()
    wrapped.set_grad_sample_to_none()
    wrapped(x).sum().backward()
    torch.testing.assert_close(wrapped._module.weight.grad_sample, x.unsqueeze(1).expand(5, 2, 4))


def test_the_compiler_is_as_before_afterwards() -> None:
    run, seen = eager_runner(), []
    counted = torch.compile(lambda x: x.sin() + 1, backend=lambda graph, inputs: seen.append(1) or graph.forward)

    def fails() -> None:
        counted(torch.ones(3))
        raise KeyError

    with pytest.raises(KeyError):
        run(fails)
    assert not seen
    counted(torch.ones(3))
    assert seen == [1]
    with torch.compiler.set_stance("force_eager"):
        run(lambda: None)
        counted(torch.ones(3, 3))
    assert seen == [1]


def test_called_by_what_the_compiler_left_out() -> None:
    """A callback of the compiler that is still set while ordinary Python runs."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame

    run, seen = eager_runner(), []
    before = set_eval_frame(False)
    try:
        run(lambda: seen.append(get_eval_frame_callback()))
        seen.append(get_eval_frame_callback())
    finally:
        set_eval_frame(before)
    assert seen == [None, False]


def test_one_thread_does_not_end_what_another_is_in() -> None:
    run, seen = eager_runner(), []
    counted = torch.compile(lambda x: x.cos() + 1, backend=lambda graph, inputs: seen.append(1) or graph.forward)
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        entered.set()
        assert leave.wait(30)

    other = threading.Thread(target=run, args=(stay,))

    def first() -> None:
        other.start()
        assert entered.wait(30)

    run(first)  # over, while the other is inside
    counted(torch.ones(3))
    assert not seen

    def second() -> None:
        leave.set()
        other.join(30)
        counted(torch.ones(3))

    run(second)  # the other is over, while this one is inside
    assert not seen
    counted(torch.ones(3))
    assert seen == [1]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("mode", ["hooks", "auto", "functorch"])
def test_a_trained_model_can_be_exported_and_traced_and_trained_on(mode: str, whole: bool) -> None:
    """`torch.export` ended in an AttributeError about the forward's code, or of tensors without a place in memory."""
    plain, x = Net(), torch.randn(4, 4)
    same, wrapped = copy.deepcopy(plain), GradSampleModule(plain, mode=mode)
    for _ in range(2):
        wrapped(x).sum().backward()
        wrapped.zero_grad()
        exported = torch.export.export(wrapped if whole else plain, (x,)).module()
        for made in (exported, torch.jit.trace(plain, x)):
            torch.testing.assert_close(made(x), same(x))
