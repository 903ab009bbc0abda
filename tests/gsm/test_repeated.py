"""Items of a dataset that are the same record; what a training says is in ``tests/attacks/test_3_once.py``."""

import warnings

import pytest
from torch.utils.data import ConcatDataset, Subset

from gsm.repeated import warn_if_repeated
from tests.attacks.tools import data


@pytest.mark.parametrize("indices", [[], range(4), [3, -2], (0, 5)])
def test_parts_without_repetition(indices):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_repeated(ConcatDataset([Subset(data(8), indices), Subset(data(8), [1])]))


def test_how_many_items_are_repeated_is_said():
    part = Subset(data(8), [1, 2, 3])
    with pytest.warns(UserWarning, match="holds 4 of its 7 items more than once"):
        warn_if_repeated(ConcatDataset([part, part, Subset(part, [0])]))
