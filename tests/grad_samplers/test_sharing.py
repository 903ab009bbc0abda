"""Norms of a matrix used as an embedding and as a linear layer, where the two uses cancel."""

import torch

from grad_samplers.sharing import Outer, Rows, shared_squared_norms


def cancelling() -> tuple[Outer, Rows, torch.Tensor]:
    """A linear use whose gradient is nearly the embedding's with the other sign, in float32, and the exact squares."""
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (64, 1))
    e = 100 * torch.randn(64, 1, 300)
    rows = -torch.nn.functional.one_hot(ids, 9).float()
    columns = e + 1e-4 * torch.randn(64, 1, 300)
    total = torch.bmm(rows.double().mT, columns.double())
    total.scatter_add_(1, ids.unsqueeze(2).expand(-1, 1, 300), e.double())
    return Outer(rows, columns), Rows(ids, e), total.square().sum((1, 2))


def test_uses_that_cancel_are_not_taken_for_less() -> None:
    outer, rows, exact = cancelling()
    found = shared_squared_norms([outer, rows])
    assert (found.double() >= exact).all()
    assert (found > 0).all()


def test_what_is_left_of_uses_that_cancel_to_nothing_is_at_least_the_rounding() -> None:
    _, rows, _ = cancelling()
    outer = Outer(-torch.nn.functional.one_hot(rows.ids, 9).float(), rows.gradients)
    magnitude = 2 * rows.gradients.square().sum((1, 2))
    rounding = 8 * torch.finfo(torch.float32).eps * magnitude
    assert (shared_squared_norms([outer, rows]) >= 0.99 * rounding).all()
