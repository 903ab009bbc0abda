"""What is computed is recorded as it was, and comes out the same when computed again; nothing of it stays behind."""

import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gsm import recording
from gsm.recording import Recording
from gsm.window import window
from tests.gsm.training import Profiler

SIZE = 5


def scaled_in_place(z, y):
    out = z * 2
    out[:, 0].mul_(3)
    view = out.view(-1)
    view += 1
    return (out * view.view_as(out).detach()).mean()


def ends_in_no_grad(z, y):
    with torch.no_grad():
        weights = F.cross_entropy(z, y, reduction="none").softmax(0)
        total = z.clone().mul_(2).sum()
    return (F.cross_entropy(z, y, reduction="none") * weights).sum() / total


def own_generator(z, y):
    generator = torch.Generator().manual_seed(3)
    return (z * torch.randn(z.shape, generator=generator)).sum() * torch.rand(1, generator=generator)


def written_to(z, y):
    y.add_(1).remainder_(3)
    return F.cross_entropy(z, y)


def through_numbers(z, y):
    return (z / z.detach().abs().max().item()).mean() + torch.tensor([1.0, float(len(y))]).sum()


PROGRAMS = {
    "cross entropy": F.cross_entropy,
    "views and masks": lambda z, y: z.t().reshape(3, -1)[:, y > 0].square().mean() + z[torch.arange(SIZE), y].sum(),
    "in place": scaled_in_place,
    "detached": lambda z, y: (z / z.detach().norm()).sum() + (z.data.exp() * z).mean(),
    "without gradients": ends_in_no_grad,
    "dropout": lambda z, y: F.dropout(z, 0.5).square().mean() + (z * torch.rand_like(z)).mean(),
    "the user's generator": own_generator,
    "labels written to": written_to,
    "numbers": through_numbers,
    "several results": lambda z, y: z.topk(2, 1)[0].mean() + torch.stack(z.unbind(1)[:2]).sum() + z.sort(0)[0][0].sum(),
    "lists of tensors": lambda z, y: torch.cat([z, z * 2], 1).mean() + torch.einsum("bi,bj->", z, z),
    "alignment": lambda z, y: F.ctc_loss(
        torch.stack([z, 2 * z, -z, z]).log_softmax(2), y.new_ones(SIZE, 1), [4] * SIZE, [1] * SIZE),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_recorded_before():
    window().pause()


def outputs():
    torch.manual_seed(0)
    leaf = torch.randn(SIZE, 3, requires_grad=True)
    return leaf, leaf * 1, torch.arange(SIZE) % 3


def recorded(function, *inputs, given=0):
    """The recording of `function(*inputs)`, the number of the input ``given``, and what came of it."""
    record = Recording()
    number = record.give(inputs[given])
    record.start()
    try:
        value = function(*inputs)
    finally:
        record.stop()
    return record, number, value


@pytest.mark.parametrize("name", PROGRAMS)
def test_computed_again_it_gives_the_same_value_and_gradient(name):
    leaf, z, y = outputs()
    record, number, value = recorded(PROGRAMS[name], z, y)
    (expected,) = torch.autograd.grad(value, leaf)
    torch.rand(3)
    state, labels = torch.get_rng_state(), y.clone()
    program = record.made([record.number(value)])
    for _ in range(2):
        again = program.given[number].clone().requires_grad_()
        result = program.run({number: again})[record.number(value)]
        torch.testing.assert_close(result.detach(), value.detach(), rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(result, again)[0], expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(y, labels)


@pytest.mark.parametrize("name", ["cross entropy", "views and masks", "in place", "detached", "without gradients"])
def test_other_outputs_give_what_the_function_gives_for_them(name):
    _, z, y = outputs()
    record, number, value = recorded(PROGRAMS[name], z, y)
    other = torch.randn(SIZE, 3)
    again = other.clone().requires_grad_()
    result = record.made([record.number(value)]).run({number: again})[record.number(value)]
    leaf = other.clone().requires_grad_()
    expected = PROGRAMS[name](leaf * 1, y)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, again)[0], torch.autograd.grad(expected, leaf)[0])


def test_values_from_outside_are_kept_as_they_were_first_used():
    _, z, y = outputs()

    def overwrites(z, y):
        loss = F.cross_entropy(z, y)
        y.zero_()
        z.data.zero_()
        return loss

    before = z.detach().clone(), y.clone()
    record, number, value = recorded(overwrites, z, y)
    assert not y.any() and not z.any()
    program = record.made([record.number(value)])
    assert {tuple(x.shape) for x in program.given.values()} == {(SIZE, 3), (SIZE,)}
    for x in program.given.values():
        assert torch.equal(x, before[0] if x.is_floating_point() else before[1])


def test_statistics_of_a_batch_norm_are_not_updated_again():
    """Its operation writes to them and does not say so."""
    _, z, _ = outputs()
    norm = nn.BatchNorm1d(3)
    record, number, value = recorded(lambda z: norm(z).square().sum(), z)
    after = norm.running_mean.clone()
    record.made([record.number(value)]).run({number: z.detach()})
    assert torch.equal(norm.running_mean, after) and after.any()


def test_memory_that_is_filled_where_nobody_sees_it_is_from_outside():
    """Numbers of Python become tensors without any operation that fills them."""
    _, z, y = outputs()
    record, number, value = recorded(PROGRAMS["alignment"], z, y)
    program = record.made([record.number(value)])
    torch.use_deterministic_algorithms(True)  # fills new memory with what no program gets by chance
    try:
        again = program.run({number: z.detach()})[record.number(value)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(again, value.detach(), rtol=0, atol=0)


def test_only_what_a_value_is_made_of_is_computed_again():
    _, z, y = outputs()

    def beside(z, y):
        loss = F.cross_entropy(z, y)
        torch.randn(4).mul_(2)
        (z * 2).argmax(1).eq(y).sum()
        return loss

    record, _, value = recorded(beside, z, y)
    names = {op.call.__name__ for op in record.made([record.number(value)]).operations}
    assert names == {"_log_softmax.default", "detach.default", "nll_loss_forward.default"}


def test_what_grows_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(recording, "MOST_OPERATIONS", 3)
    _, z, _ = outputs()
    record, _, value = recorded(lambda z: (z * 1 * 2 * 3 * 4 * 5).sum(), z)
    assert record.lost and not record.operations and not record.given and record.number(value) is None
    record.clear()
    assert not record.lost


@pytest.mark.parametrize("other", ["sparse", "inference", "made sparse"])
def test_tensors_of_another_kind_end_it(other):
    _, z, _ = outputs()
    if other == "made sparse":
        record, _, value = recorded(lambda z: torch.sparse.mm(torch.eye(SIZE).to_sparse(), z).sum(), z)
        assert record.lost and record.number(value) is None
        return
    if other == "sparse":
        x = torch.eye(SIZE).to_sparse()
    else:
        with torch.inference_mode():
            x = torch.ones(SIZE, SIZE)
    with torch.no_grad():
        record, _, _ = recorded(lambda z: (x @ z).sum(), z)
    assert record.lost


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("make", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_results_of_another_kind_end_it(make):
    """A confusion matrix kept sparse, say: such tensors have no memory to tell apart."""
    _, z, _ = outputs()
    record, _, value = recorded(lambda z: getattr(z.detach(), make)().to_dense() * 1, z)
    assert record.lost and torch.equal(value, z.detach())


def test_operations_of_higher_order_end_it():
    _, z, _ = outputs()
    record, _, value = recorded(lambda z: torch.cond(z.sum() > 9, torch.neg, torch.exp, (z.detach(),)), z)
    assert record.lost and torch.equal(value, z.detach().exp())


def test_sums_over_ranks_are_not_taken_again():
    from torch.distributed import HashStore, all_reduce, destroy_process_group, init_process_group

    _, z, _ = outputs()
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:

        def logged(z):
            total = z.detach().sum()
            all_reduce(total)
            return z.mean(), z.mean() / total

        record, _, (plain, divided) = recorded(logged, z)
    finally:
        destroy_process_group()
    assert record.made([record.number(plain)]).repeatable
    assert not record.made([record.number(divided)]).repeatable


# -- on and off --------------------------------------------------------------------------------------------------------


def test_beside_another_mode_nothing_is_recorded_and_its_end_is_its_own():
    _, z, _ = outputs()
    record = Recording()
    record.give(z)
    with Profiler():
        record.start()
        assert not record.on
        (z * 2).sum()
    assert not record.operations and not _get_current_dispatch_mode_stack()


def test_a_mode_entered_meanwhile_is_left_in_its_place():
    record = Recording()
    record.start()
    with Profiler() as other:
        record.stop()
        assert _get_current_dispatch_mode_stack() == [record, other]
        torch.ones(2) + 1
    assert not record.operations
    torch.ones(2) + 1
    record.stop()
    assert not _get_current_dispatch_mode_stack() and torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))


def test_left_inside_of_a_compiled_function_it_ends_outside():
    """PyTorch puts the dispatcher's state back behind compiled functions: without a mode, an internal error."""
    record = Recording()
    record.start()

    @torch.compile(backend="eager")
    def compiled(x):
        torch._dynamo.graph_break()
        leave()
        return x + 1

    leave = torch.compiler.disable(record.stop)
    compiled(torch.ones(2))
    assert _get_current_dispatch_mode_stack()
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))
    record.stop()
    assert not _get_current_dispatch_mode_stack() and torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))


def test_entered_inside_of_a_compiled_function_it_can_be_left_outside():
    record = Recording()
    enter = torch.compiler.disable(record.start)

    @torch.compile(backend="eager")
    def compiled(x):
        enter()
        return x + 1

    compiled(torch.ones(2))
    record.stop()
    assert not _get_current_dispatch_mode_stack() and torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))


def test_compiled_functions_stay_compiled():
    """Under an ordinary mode PyTorch leaves a function eager for good; nor is it compiled once more."""
    compiled, runs = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return lambda *args: runs.append(1) or graph(*args)

    first, second = (torch.compile(lambda x, k=k: x.sin() + k, backend=backend) for k in (1, 2))
    first(torch.ones(2))
    record = Recording()
    record.start()
    first(torch.ones(2))
    second(torch.ones(2))
    record.stop()
    second(torch.ones(2))
    assert len(runs) == 4 and len(compiled) == 2


def test_what_is_traced_meanwhile_is_traced_as_ever():
    """Behind the record lie the modes of whoever traces: it may not compute with what they stand for."""
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Tuple(nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    record = Recording()
    record.start()
    try:
        graph, _ = aot_export_module(Tuple(4, 2), (torch.ones(3, 4),), trace_joint=False)
        with FakeTensorMode() as mode:
            fake = torch.ones(3) + torch.ones(3)
    finally:
        record.stop()
    assert "addmm" in graph.code and fake.fake_mode is mode
    assert not _get_current_dispatch_mode_stack()


def test_another_thread_neither_records_nor_ends_it():
    record = Recording()
    record.start()

    def elsewhere():
        torch.ones(2) + 1
        record.stop()
        record.on = True

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not record.operations and _get_current_dispatch_mode_stack() == [record]
    record.stop()
    assert not _get_current_dispatch_mode_stack()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_as_ever():
    """A worker of a loader that was started while a loss was being computed."""
    record = Recording()
    record.start()
    child = os.fork()
    if child == 0:
        x = torch.ones(2) + 1
        os._exit(0 if x.sum() == 4 and not record.operations else 1)
    _, status = os.waitpid(child, 0)
    record.stop()
    assert os.waitstatus_to_exitcode(status) == 0
