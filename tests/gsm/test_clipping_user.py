"""All records of a user together contribute at most the bound."""

import numpy as np
import pytest
import torch

from gsm.clipping import AutomaticClipping, PerLayerClipping
from gsm.clipping_adaptive import AdaptiveClipping
from gsm.clipping_user import UserClipping
from tests.gsm.optimizer_tools import clipped_sum, deliver, gradients, parameters, private

USERS = ["a", "b", "a", "c", "a", "b"]


def per_user(grads, users, reduction):
    """``[users, ...]`` sums or means, in order of first appearance."""
    rows = [[i for i, u in enumerate(users) if u == user] for user in dict.fromkeys(users)]
    return [torch.stack([getattr(g[r], reduction)(0) for r in rows]) for g in grads]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_the_sum_is_that_of_clipped_user_gradients(reduction, scale):
    params = parameters()
    optimizer = private(params, clipping=UserClipping(reduction=reduction))
    grads = gradients(params, len(USERS), scale=scale)
    deliver(params, grads)
    optimizer.clipping.set_users(USERS)
    optimizer.step()
    for p, total in zip(params, clipped_sum(per_user(grads, USERS, reduction)), strict=True):
        torch.testing.assert_close(p.grad, total, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", [AutomaticClipping(), PerLayerClipping()])
def test_a_whole_user_moves_the_sum_by_at_most_the_sensitivity(inner):
    params = parameters()
    grads = gradients(params, len(USERS), scale=50.0)
    sums = []
    for keep in (range(6), [0, 2, 4]):
        optimizer = private(params, max_grad_norm=2.0, clipping=UserClipping(inner))
        deliver(params, [g[list(keep)] for g in grads])
        optimizer.clipping.set_users(torch.tensor([ord(USERS[i]) for i in keep]))
        optimizer.virtual_step()
        sums.append([p.summed_grad for p in params])
        optimizer.discard_pending()
    moved = sum((a - b).square().sum() for a, b in zip(*sums, strict=True)).sqrt()
    assert 1.0 < moved <= 2 * 2.0  # users b and c left, each at most 2


def test_ids_are_needed_once_per_batch_and_one_per_sample():
    params = parameters()
    optimizer = private(params, clipping=UserClipping())
    deliver(params, gradients(params, 2))
    with pytest.raises(ValueError, match="set_users"):
        optimizer.step()
    optimizer.clipping.set_users([1])
    with pytest.raises(ValueError, match="1 ids.*2 samples"):
        optimizer.step()
    optimizer.clipping.set_users([1, 2])
    optimizer.step()
    optimizer.zero_grad()
    deliver(params, gradients(params, 2))
    with pytest.raises(ValueError, match="set_users"):
        optimizer.step()


def test_a_user_spread_over_two_physical_batches_is_named():
    params = parameters()
    optimizer = private(params, clipping=UserClipping())
    for users in (["ann", "bob"], ["bob", "cem"]):
        deliver(params, gradients(params, 2))
        optimizer.clipping.set_users(users)
        if users[0] == "ann":
            optimizer.virtual_step()
    with pytest.raises(ValueError, match="'bob'.*one physical batch"):
        optimizer.step()


def test_the_same_user_may_come_back_in_the_next_release():
    params = parameters()
    optimizer = private(params, clipping=UserClipping())
    for _ in range(2):
        optimizer.zero_grad()
        deliver(params, gradients(params, 2))
        optimizer.clipping.set_users([1, 1])
        optimizer.step()


def test_an_empty_batch_has_no_users():
    params = parameters()
    optimizer = private(params, clipping=UserClipping())
    deliver(params, gradients(params, 0))
    optimizer.clipping.set_users([])
    optimizer.step()
    assert all((p.grad == 0).all() for p in params)


def test_adaptive_or_nested_user_clipping_is_refused():
    for inner in (AdaptiveClipping(), UserClipping()):
        with pytest.raises(ValueError, match="cannot be used for users"):
            UserClipping(inner)
    with pytest.raises(ValueError, match="reduction"):
        UserClipping(reduction="max")


def test_the_bound_is_the_inner_parts():
    part = UserClipping(AutomaticClipping())
    optimizer = private(parameters(), max_grad_norm=3.0, clipping=part)
    assert part.inner.max_grad_norm == part.sensitivity == optimizer.max_grad_norm == 3.0
    part.load_state_dict({"max_grad_norm": 4.0})
    assert part.state_dict() == {"max_grad_norm": 4.0}


@pytest.mark.parametrize("ids", [[torch.tensor(7) for _ in range(4)], torch.full((4,), 7), np.full(4, 7)])
def test_one_user_is_one_user_whatever_holds_the_id(ids):
    params = parameters()
    optimizer = private(params, max_grad_norm=1.0, clipping=UserClipping())
    deliver(params, gradients(params, 4, scale=50.0))
    optimizer.clipping.set_users(ids)
    optimizer.clip_and_accumulate()
    assert torch.cat([p.summed_grad.flatten() for p in params]).norm() <= 1.0


@pytest.mark.parametrize("id", [float("nan"), [1], torch.ones(2), torch.tensor(float("nan"))], ids=str)
def test_an_id_that_is_like_no_other_is_refused(id):
    with pytest.raises(ValueError, match="cannot be compared with other ids"):
        UserClipping().set_users([1, id])
