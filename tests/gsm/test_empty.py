"""Empty batches through models that cannot run on zero rows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gsm.optimizer import DPOptimizer
from gsm.wrapper import GradSampleModule
from tests.compare import MODES


class Reshaping(nn.Module):
    """`view(0, 2, -1)` is ambiguous: the model itself stops on zero rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x).view(x.shape[0], 2, -1)
        return {"out": self.b(h).sum(1), "hidden": h}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [True, False])
def test_a_release_without_samples_is_noise_alone(mode: str, first: bool) -> None:
    model = Reshaping()
    with pytest.raises(RuntimeError):
        model(torch.zeros(0, 4))
    before = [p.detach().clone() for p in model.parameters()]
    wrapped = GradSampleModule(model, mode=mode)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4
    )
    for x in [torch.zeros(0, 4)] if first else [torch.randn(3, 4), torch.zeros(0, 4)]:
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        out = wrapped(x)["out"]
        assert out.shape == (len(x), 2)
        nn.functional.cross_entropy(out, torch.zeros(len(x), dtype=torch.long)).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_a_model_that_fails_on_one_row_too_shows_its_own_error() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"cannot take {x.shape[0]} rows")

    with pytest.raises(ValueError, match="cannot take 0 rows"):
        GradSampleModule(Failing(2, 2))(torch.zeros(0, 2))


class Folded(nn.Module):
    """`layer` sees `[B * T, *shape]`, a row for every position."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.first, self.layer, self.shape = nn.Linear(8, 8), layer, shape

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.layer(h.reshape(h.shape[0] * 3, *self.shape))
        y = y[0] if isinstance(y, tuple) else y
        return y.reshape(h.shape[0], 3, y[0].numel() if len(y) else 1)


class Ids(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x[..., 0] > 0).long().reshape(-1, *([1] * isinstance(self.layer, nn.EmbeddingBag))))


FOLDED = {
    "group norm": (nn.GroupNorm(2, 8), 8),
    "group norm of maps": (nn.GroupNorm(2, 4), 4, 2),
    "instance norm": (nn.InstanceNorm1d(4, affine=True), 4, 2),
    "layer norm": (nn.LayerNorm(8), 8),
    "RMS norm": (nn.RMSNorm(8), 8),
    "linear": (nn.Linear(8, 5), 8),
    "convolution": (nn.Conv1d(4, 3, 2), 4, 2),
    "transposed convolution": (nn.ConvTranspose1d(4, 3, 2), 4, 2),
    "PReLU": (nn.PReLU(4), 4, 2),
    "GRU": (nn.GRU(4, 3, batch_first=True), 2, 4),
    "attention": (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 2, 4),
}


@pytest.mark.parametrize("mode", ["auto", "ghost", "hooks"])
@pytest.mark.parametrize("name", [*FOLDED, "embedding", "bag"])
def test_rows_of_nobody_folded_into_positions_have_gradients_of_nobody(name: str, mode: str) -> None:
    ids = {"embedding": nn.Embedding(3, 4), "bag": nn.EmbeddingBag(3, 4, mode="sum")}
    plain = Ids(ids[name]) if name in ids else Folded(*FOLDED[name])  # type: ignore[arg-type]
    model = GradSampleModule(plain, mode=mode)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4
    )
    for size in (4, 0):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(torch.randn(size, 3, 8)).square().sum().backward()
        optimizer.step()
        assert size or all(map(torch.equal, model.parameters(), before))
    model.remove_hooks()


class Shuffled(nn.Module):
    """The forward of `PixelShuffle` runs on zero rows, its backward does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shuffle, self.calls = nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x))


class Packed(nn.Module):
    """A packed sequence needs lengths above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.gru(packed)[1][-1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [Shuffled, Packed])
def test_backwards_that_fail_and_lengths_of_zero(kind: type[nn.Module], first: bool, mode: str) -> None:
    x = torch.randn(4, 1, 4, 4) if kind is Shuffled else torch.randn(4, 5, 4)
    inputs = (x,) if kind is Shuffled else (x, torch.tensor([2, 5, 3, 1]))
    shape = kind()(*inputs).shape
    model = GradSampleModule(kind(), mode=mode)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4
    )
    for size in [0, 4, 0] if first else [4, 0]:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        out = model(*[t[:size] for t in inputs])
        assert out.shape == (size, *shape[1:])
        out.square().sum().backward()
        optimizer.step()
        assert all(map(torch.equal, model.parameters(), before)) is (size == 0)


@dataclass(frozen=True)
class Output:
    policy: torch.distributions.Distribution
    value: Tensor
    name: str = "policy"


class Policy(Reshaping):
    def __init__(self, law: str) -> None:
        super().__init__()
        self.law = law

    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        out = super().forward(x)["out"]
        if self.law == "categorical":
            return Output(torch.distributions.Categorical(logits=out), out)
        normal = torch.distributions.Normal(out, out.new_tensor([1.0, 2.0]))
        return Output(torch.distributions.Independent(normal, 1, validate_args=False), out)


@pytest.mark.parametrize("law", ["categorical", "normal"])
def test_dataclasses_and_distributions_are_cut(law: str) -> None:
    model = GradSampleModule(Policy(law))
    out = model(torch.zeros(0, 4))
    assert out.name == "policy" and out.value.shape == (0, 2)
    assert out.policy.batch_shape == (0,) == out.policy.sample().shape[:1]
    if law == "categorical":
        result = out.policy.log_prob(torch.zeros(0))
    else:  # torch's own log_prob of Independent fails on zero rows
        result = out.policy.base_dist.log_prob(out.policy.rsample())
    assert len(result) == 0
    result.sum().backward()
    assert all(p.grad_sample.shape == (0, *p.shape) for p in model.parameters())


def test_a_model_that_runs_on_zero_rows_is_not_run_on_a_made_up_one() -> None:
    class Counting(nn.Linear):
        rows: list[int] = []
        kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.rows.append(len(x))
            self.last = x * 1
            self.kept.append(self.last)
            return super().forward(x)

    plain = Counting(2, 2)
    model = GradSampleModule(nn.Sequential(plain, nn.Tanh()))
    state = torch.get_rng_state()
    model(torch.zeros(0, 2)).sum().backward()
    assert plain.last is plain.kept[0]
    assert plain.rows == [0, 0] and torch.equal(torch.get_rng_state(), state)
    model(torch.zeros(0, 2)).sum().backward()
    assert plain.rows == [0, 0, 0]  # tried without the capture once only


class Projected(nn.Module):
    """Its backward needs what a buffer was during the forward."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(5, 2)
        features = torch.randn(4, 5)
        self.register_buffer("features", features.to_sparse() if layout == "sparse" else features)
        self.sparse = layout == "sparse"

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.outer(torch.sparse.mm(self.features.t(), h.t()).t() if self.sparse else h @ self.features)


@pytest.mark.parametrize("layout", ["strided", "sparse"])
@pytest.mark.parametrize("mode", MODES)
def test_trying_the_backward_leaves_the_buffers_to_the_forward(mode: str, layout: str) -> None:
    """The buffers were put back by writing to them, after the forward had saved them: its backward was refused."""
    model = GradSampleModule(Projected(layout), mode=mode)
    for size in (4, 0, 3, 0):
        model(torch.randn(size, 3)).square().sum().backward()
        model.zero_grad()


def test_a_frozen_model_gives_its_input_a_gradient_on_zero_rows() -> None:
    model = GradSampleModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
    for p in model.parameters():
        p.requires_grad_(False)
    for size in (2, 0):
        x = torch.zeros(size, 3, requires_grad=True)
        (g,) = torch.autograd.grad(model(x).sum(), x)
        assert g.shape == (size, 3)
