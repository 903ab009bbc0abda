"""The comparison tool itself: it computes what it says, and it does complain."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tests.loop import assert_close_per_sample, per_sample_loop, projection_loss


def test_the_loop_agrees_with_vmap():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss(output):
        return output.square().sum()

    def one(params, x):
        return loss(functional_call(model, params, (x[None],)))

    expected = vmap(grad(one), (None, 0))(dict(model.named_parameters()), x)
    assert_close_per_sample(per_sample_loop(model, x, loss=loss), expected, rtol=1e-12)


def test_the_model_is_left_alone_and_run_in_float64():
    model = nn.Linear(3, 2)
    found = per_sample_loop(model, torch.randn(4, 3))
    assert found["weight"].dtype == torch.float64 and model.weight.dtype == torch.float32
    assert model.weight.grad is None


@dataclass
class Answer:
    first: Tensor
    rest: tuple


class Keywords(nn.Module):
    """Time first inputs by name, an option, a parameter that is not reached, and an output of several parts."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.unused = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, *, x, scale):
        return Answer(self.used(x) * scale, ({"sum": x.sum(-1)}, "text"))


def test_keywords_batch_dim_and_structured_output():
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    found = per_sample_loop(Keywords(), {"x": x, "scale": 2.0}, batch_dim=1)
    assert set(found) == {"used.weight", "used.bias", "unused"}
    assert found["used.weight"].shape == (4, 2, 3) and found["unused"].eq(0).all()
    only_second = per_sample_loop(Keywords(), {"x": x[:, 1:2], "scale": 2.0}, batch_dim=1)
    # neither model has the other's weights, and the layer is linear in its input: the same gradients
    torch.testing.assert_close(found["used.weight"][1:2], only_second["used.weight"])


def test_the_projection_of_a_batch_is_the_sum_over_its_samples():
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    summed = per_sample_loop(model, x)["weight"].sum(0)
    batch = torch.autograd.grad(projection_loss(model(x)), model.weight)[0]
    torch.testing.assert_close(batch, summed, rtol=1e-12, atol=1e-12)


def test_a_function_of_parameters():
    w = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    x = torch.randn(4, 3, dtype=torch.float64)
    found = per_sample_loop(lambda x: x @ w, x, params={"w": w}, loss=lambda y: y.square().sum())
    torch.testing.assert_close(found["w"], 2 * torch.einsum("bi,bj->bij", x, x @ w))
    with pytest.raises(TypeError, match="params="):
        per_sample_loop(lambda x: x @ w, x)


def test_dropout_with_a_seed_and_an_empty_batch():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5))
    x = torch.ones(4, 3)
    found = per_sample_loop(model, x, seed=1)["0.weight"]
    assert (found == found[:1]).all()
    assert per_sample_loop(model, x[:0])["0.weight"].shape == (0, 8, 3)


def test_outputs_without_anything_to_differentiate():
    with pytest.raises(ValueError, match="nothing to differentiate"):
        projection_loss({"loss": torch.ones(())})


@pytest.mark.parametrize("error", [1e-6, float("nan"), float("inf")])
def test_a_difference_in_one_sample_is_named(error):
    expected = {"a.weight": torch.randn(3, 4, dtype=torch.float64), "a.bias": torch.ones(3, 2, dtype=torch.float64)}
    actual = {name: value.clone() for name, value in expected.items()}
    assert_close_per_sample(actual, expected)
    actual["a.weight"][1, 2] += error
    with pytest.raises(AssertionError, match=r"a\.weight: samples \[1\] differ"):
        assert_close_per_sample(actual, expected)
    with pytest.raises(AssertionError, match="parameters differ"):
        assert_close_per_sample({"a.weight": expected["a.weight"]}, expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_per_sample({**expected, "a.bias": torch.ones(3, 1, 2)}, expected)
