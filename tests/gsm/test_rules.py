"""Each rule for a parameter that meets a tensor that depends on the samples, alone, against the loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compare import check

T, D = 3, 4
Use = Callable[[Tensor, nn.Parameter], Tensor]

# name: (shape of the parameter, use of it on x [B, T, D])
USES: dict[str, tuple[tuple[int, ...], Use]] = {
    "mul": ((D,), lambda x, p: x * p),
    "rmul": ((D,), lambda x, p: p * x),
    "mul_in_place": ((D,), lambda x, p: x.clone().mul_(p)),
    "iadd": ((T, D), lambda x, p: x.clone().__iadd__(p)),
    "add_leading_one": ((1, T, D), lambda x, p: x + p),
    "sub": ((1, 1, D), lambda x, p: x - p),
    "rsub": ((D,), lambda x, p: p - x),
    "div": ((D,), lambda x, p: x / (2 + p.tanh())),
    "rdiv": ((D,), lambda x, p: p / (2 + x.tanh())),
    "pow": ((D,), lambda x, p: x.abs().add(0.5).pow(p)),
    "scalar": ((), lambda x, p: p.exp() * x),
    "one_entry": ((1,), lambda x, p: p * x),
    "maximum": ((D,), lambda x, p: torch.maximum(x, p)),
    "where": ((1, 1, D), lambda x, p: torch.where(x > 0, x, p)),
    "lerp": ((D,), lambda x, p: torch.lerp(x, x.flip(1), p)),
    "addcmul": ((D,), lambda x, p: torch.addcmul(p, x, x.flip(1))),
    "clamp": ((D,), lambda x, p: torch.clamp(x, max=p)),
    "masked_fill": ((), lambda x, p: x.masked_fill(x > 0.5, p)),
    "matmul": ((D, 5), lambda x, p: x @ p),
    "matmul_transposed": ((5, D), lambda x, p: x @ p.t()),
    "matmul_mT": ((5, D), lambda x, p: torch.matmul(x, p.mT)),
    "matmul_vector": ((D,), lambda x, p: (x @ p).unsqueeze(-1)),
    "matmul_left": ((5, T), lambda x, p: p @ x),
    "matmul_left_vector": ((T,), lambda x, p: (p @ x).unsqueeze(1)),
    "matmul_stack": ((2, D, 5), lambda x, p: x[:, None] @ p),
    "bmm_like_stack_left": ((2, 5, T), lambda x, p: p @ x[:, None]),
    "mm": ((D, 5), lambda x, p: torch.mm(x[:, 0], p)),
    "mm_flat": ((D, 5), lambda x, p: torch.mm(x.reshape(-1, D), p).view(x.shape[0], -1, 5)),
    "addmm": ((D, 5), lambda x, p: torch.addmm(torch.zeros(5).to(x), x[:, 0], p)),
    "addmm_bias": ((D,), lambda x, p: torch.addmm(p, x[:, 0], p.diag())),
    "addmm_bias_row": ((1, D), lambda x, p: torch.addmm(p, x[:, 0], p.t() @ p)),
    "addmm_bias_one": ((1, 1), lambda x, p: torch.addmm(p, x[:, 0], p.expand(D, 5))),
    "addmm_bias_of_samples": ((D, 5), lambda x, p: torch.addmm(x[:, 0, :1], x[:, 0], p)),
    "tensordot": ((D, 5), lambda x, p: torch.tensordot(x, p, dims=([2], [0]))),
    "tensordot_negative": ((5, D), lambda x, p: torch.tensordot(x, p, ([-1], [-1]))),
    "tensordot_of_two": ((T, D, 2, 3), lambda x, p: torch.tensordot(x, p)),
    "tensordot_crossed": ((D, 5, T), lambda x, p: torch.tensordot(x, p, ([1, 2], [2, 0]))),
    "tensordot_parameter_first": ((5, D, 2), lambda x, p: torch.tensordot(p, x, ([1], [2])).movedim(2, 0)),
    "tensordot_outer": ((5,), lambda x, p: torch.tensordot(x, p, dims=0)),
    "tensordot_flat": ((D, 5), lambda x, p: torch.tensordot(x.reshape(-1, D), p, 1).view(x.shape[0], -1, 5)),
    "cdist": ((7, D), lambda x, p: torch.cdist(x, p)),
    "cdist_rows": ((30, D), lambda x, p: torch.cdist(x[:, 0], p)),
    "cdist_parameter_first": ((7, D), lambda x, p: torch.cdist(p, x, p=1.0)),
    "cdist_rows_parameter_first": ((7, D), lambda x, p: torch.cdist(p, x[:, 0]).t()),
    "cdist_flat": ((7, D), lambda x, p: torch.cdist(x1=x.reshape(-1, D), x2=p).view(x.shape[0], -1)),
    "cdist_of_parameters": ((7, D), lambda x, p: x.sum(-1) * torch.cdist(p, p.flip(0) + 1).sum()),
    "cosine_similarity": ((7, D), lambda x, p: F.cosine_similarity(x[:, :, None], p[None, None], dim=3)),
    "pairwise_distance": ((D,), lambda x, p: F.pairwise_distance(x, p)),
    "vecdot": ((T, D), lambda x, p: torch.linalg.vecdot(x, p)),
    "broadcast_tensors": ((D,), lambda x, p: torch.mul(*torch.broadcast_tensors(x, p))),
    "linear": ((5, D), lambda x, p: F.linear(x, p)),
    "linear_weight_norm": ((5, D), lambda x, p: F.linear(x, p / p.norm(dim=1, keepdim=True))),
    "linear_sequence_first": ((5, D), lambda x, p: F.linear(x.transpose(0, 1), p).transpose(0, 1)),
    "einsum": ((D, 2, 3), lambda x, p: torch.einsum("btd,dhk->bthk", x, p)),
    "einsum_shared": ((T, D), lambda x, p: torch.einsum("btd,td->bt", x, p)),
    "conv1d": ((5, D, 2), lambda x, p: F.conv1d(x.transpose(1, 2), p, padding=1)),
    "layer_norm": ((D,), lambda x, p: F.layer_norm(x, (D,), p)),
    "layer_norm_flat": ((D,), lambda x, p: F.layer_norm(x.reshape(-1, D), (D,), p).view_as(x)),
    "group_norm_flat": ((D,), lambda x, p: F.group_norm(x.reshape(-1, D, 1), 2, p).view_as(x)),
    "prelu": ((D,), lambda x, p: F.prelu(x.transpose(1, 2), p)),
    "expand": ((1, 1, D), lambda x, p: torch.cat([p.expand(x.shape[0], -1, -1), x], dim=1)),
    "expand_as": ((D,), lambda x, p: x + p.expand_as(x)),
    "broadcast_to": ((D,), lambda x, p: x + torch.broadcast_to(p, x.shape)),
    "repeat": ((1, 2, D), lambda x, p: torch.cat([p.repeat(x.shape[0], 1, 1), x], dim=1)),
    "repeat_interleave": ((1, 2, D), lambda x, p: torch.cat([p.repeat_interleave(x.shape[0], 0), x], dim=1)),
    "unsqueeze_expand": ((D,), lambda x, p: p[None, None].expand(x.shape[0], 1, D) * x),
    "table_slice": ((9, D), lambda x, p: x + p[:T]),
    "table_const_ids": ((9, D), lambda x, p: x + p[torch.tensor([0, 0, 2])]),
    "embedding_const_ids": ((9, D), lambda x, p: x + F.embedding(torch.tensor([[0, 1, 1]]), p)),
    "table_ids": ((9, D), lambda x, p: p[_ids(x)] * x),
    "table_ids_vector": ((9,), lambda x, p: p[_ids(x)][..., None] * x),
    "table_ids_wide": ((9, 2, 2), lambda x, p: p[_ids(x)].flatten(2) * x),
    "index_select": ((9, D), lambda x, p: p.index_select(0, _ids(x)[:, 0])[:, None] * x),
    "embedding": ((9, D), lambda x, p: F.embedding(_ids(x), p) * x),
    "setitem": ((D,), lambda x, p: _assigned(x, p)),
    "attention_bias": ((2, T, T), lambda x, p: F.scaled_dot_product_attention(*_heads(x), attn_mask=p)),
    "attention_bias_leading_one": (
        (1, 2, T, T),
        lambda x, p: F.scaled_dot_product_attention(*_heads(x), attn_mask=p),
    ),
    "softmax_of_parameter": ((T, T), lambda x, p: p.softmax(-1) @ x),
    "concatenated_parameters": ((2, D), lambda x, p: F.linear(x, torch.cat([p, p.flip(0)]))),
    "chunks": ((6, D), lambda x, p: torch.cat([F.linear(x, w) for w in p.chunk(3)], -1)),
    "interpolated": ((1, D, 2), lambda x, p: x + F.interpolate(p, size=T, mode="linear").transpose(1, 2)),
    "alone_then_sample": ((D, D), lambda x, p: x * (p @ p.t()).diagonal()),
}


def _ids(x: Tensor) -> Tensor:
    return (x.detach().abs().sum(-1) * 7).long() % 9


def _heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = x.view(x.shape[0], T, 2, 2).transpose(1, 2)
    return q, q.flip(2), q.flip(3)


def _assigned(x: Tensor, p: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = p
    return y * x


class One(nn.Module):
    def __init__(self, shape: tuple[int, ...], use: Use):
        super().__init__()
        self.before, self.p, self.use = nn.Linear(D, D), nn.Parameter(torch.randn(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(torch.tanh(self.before(x)), self.p).tanh()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("size", [1, T, 4])
@pytest.mark.parametrize("name", list(USES))
def test_a_rule(name: str, size: int, mode: str) -> None:
    shape, use = USES[name]
    wrapped = check(One(shape, use), torch.randn(size, T, D), mode=mode)
    assert wrapped.plan.rung("p") == "tracked", wrapped.plan["p"].why


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize(
    "use",
    [
        lambda x, p: torch.cdist(x, p[None].expand(x.shape[0], -1, -1)),
        lambda x, p: torch.inner(x, p),
        lambda x, p: torch.linalg.solve(p + 9 * torch.eye(D).to(x), x.mT).mT,
        lambda x, p: torch.einsum("...d,dk->...k", x, p),
        lambda x, p: p[:, _ids(x) % 4].sum(0)[..., None] * x,
        lambda x, p: torch.stack([row @ p for row in x]),
    ],
)
def test_functions_without_a_rule_are_taken_as_a_subtree(use: Use, mode: str) -> None:
    check(One((D, D), use), torch.randn(3, T, D), mode=mode)


UNUSUAL: dict[str, tuple[tuple[int, ...], Use]] = {
    "a stack of matrices on rows of samples": ((2, D, 5), lambda x, p: (x[:, 0] @ p).transpose(0, 1)),
    "a stack of rows on rows of samples": ((2, 1, 5), lambda x, p: (x[:, 0, :1] @ p).transpose(0, 1)),
    "addmm with scales": ((5,), lambda x, p: torch.addmm(p, x[:, 0], torch.ones(D, 5).to(x), beta=2)),
    "einsum that names the batch in the parameter": ((1, D), lambda x, p: torch.einsum("bd,bd->bd", x[:, 0], p)),
    "one entry for each row": ((1, D), lambda x, p: (x.reshape(-1, D) * p.expand(x.shape[0] * T, D)).view_as(x)),
    "columns picked by the data": ((D, 9), lambda x, p: p.index_select(1, _ids(x)[:, 0]).t()[:, None] * x),
    "entries of a parameter replaced": ((D,), lambda x, p: _replaced(p) * x),
    "assigned to all rows": ((D,), lambda x, p: _overwritten(x, p) * x),
    "assigned by a mask and a slice": ((2,), lambda x, p: _masked(x, p) * x),
    "masked_fill in place": ((), lambda x, p: _filled(x, p)),
    "input of a linear layer whose weight is a batch": ((5, D), lambda x, p: F.linear(p, x[:, 0]).t()),
    "distances to a set of sets": ((7, D), lambda x, p: torch.cdist(x[:, 0], p[None])[0][:, None]),
    "bias made from the sample": ((D, D), lambda x, p: torch.stack([F.linear(r, p, r.mean(0)) for r in x])),
    "the largest of a bag": ((9, D), lambda x, p: F.embedding_bag(_ids(x), p, mode="max")[:, None] * x),
}


def _filled(x: Tensor, p: Tensor) -> Tensor:
    y = x.clone()
    y.masked_fill_(x > 0.5, p)
    return y


def _replaced(p: Tensor) -> Tensor:
    q = p * 1
    q[0] = 3.0
    return q


def _overwritten(x: Tensor, p: Tensor) -> Tensor:
    y = x.reshape(-1, D).clone()
    y[:] = p
    return y.view_as(x)


def _masked(x: Tensor, p: Tensor) -> Tensor:
    y = x.clone()
    y[x[..., 0] > 0, :2] = p
    return y


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", list(UNUSUAL))
def test_an_unusual_use_is_left_to_the_subtree(name: str, mode: str) -> None:
    """Guards: each rule's own check that it understands the use; without it the gradient is wrong, or a crash."""
    shape, use = UNUSUAL[name]
    wrapped = check(One(shape, use), torch.randn(4, T, D), mode=mode)
    assert wrapped.plan.rung("p") in ("functorch", "loop")


def test_a_contraction_of_the_samples_is_refused_or_left_to_the_subtree() -> None:
    from gsm.wrapper import GradSampleModule

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.Parameter(torch.randn(9, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensordot(x, self.each[: len(x)], ([0], [0])).mean(-1)

    with pytest.raises(ValueError, match="Samples influence each other"):
        GradSampleModule(Summed())(torch.randn(4, D))
    wrapped = GradSampleModule(Summed(), strict=False)
    wrapped(torch.randn(4, D)).sum().backward()
    assert wrapped.plan.rung("each") in ("functorch", "loop")


def test_experts_without_offsets_are_left_to_the_subtree() -> None:
    """In float32, the only type that this function knows on a CPU."""
    from gsm.wrapper import GradSampleModule

    model = One((T, D, 8), lambda x, p: F.grouped_mm(x.transpose(0, 1).contiguous(), p).transpose(0, 1))
    x = torch.randn(4, T, D)
    model(x).sum().backward()
    expected, model.p.grad, model.before.weight.grad, model.before.bias.grad = model.p.grad, None, None, None
    wrapped = GradSampleModule(model, loss_reduction="sum")
    wrapped(x).sum().backward()
    torch.testing.assert_close(wrapped.p.grad_sample.sum(0), expected)


def test_batch_statistics_by_function_are_refused() -> None:
    from gsm.wrapper import GradSampleModule

    wrapped = GradSampleModule(One((D,), lambda x, p: F.batch_norm(x[:, 0], None, None, p, training=True)))
    with pytest.raises(ValueError, match="Batch normalisation in training mode"):
        wrapped(torch.randn(4, T, D))


class Leaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.temperature = nn.Linear(D, 2), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x), self.temperature.exp()


def test_a_parameter_that_leaves_the_model_alone_is_an_error_only_if_the_loss_uses_it() -> None:
    from gsm.wrapper import GradSampleModule

    wrapped = GradSampleModule(Leaking())
    out, scale = wrapped(torch.randn(3, D))
    out.sum().backward()
    wrapped.zero_grad()
    out, scale = wrapped(torch.randn(3, D))
    with pytest.raises(RuntimeError, match="temperature without combining it with any sample"):
        (out * scale).sum().backward()
