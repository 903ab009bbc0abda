"""Empty batches: zero rows, the structure of a full batch, for whatever collate functions return."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import default_collate

from gsm.collate import CollateWithEmpty

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    names: list
    inner: Pair


def record(i):
    return {"x": torch.full((3,), float(i)), "y": i, "name": f"r{i}", "pair": (np.float32(i), [torch.tensor(i)])}


RECORDS = [record(i) for i in range(5)]


def shape(tree):
    """Types, shapes with the batch dimension, and dtypes; to compare structures."""
    if isinstance(tree, torch.Tensor | np.ndarray):
        return type(tree), tuple(tree.shape), tree.dtype
    if isinstance(tree, dict | UserDict):
        return type(tree), {k: shape(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree), [shape(v) for v in tree]
    return type(tree), tree


def test_default_collate_of_a_nested_record_as_the_very_first_batch():
    empty = CollateWithEmpty(default_collate, RECORDS)([])
    full = default_collate(RECORDS[:1])
    assert list(empty) == list(full)
    assert empty["x"].shape == (0, 3) and empty["x"].dtype == torch.float32
    assert empty["y"].shape == (0,) and empty["y"].dtype == torch.int64
    assert empty["name"] == []
    assert empty["pair"][0].shape == (0,) and empty["pair"][1][0].shape == (0,)
    assert type(empty["pair"]) is type(full["pair"])


def test_full_batches_pass_through():
    collate = CollateWithEmpty(list, RECORDS)
    assert collate(RECORDS[:2]) == RECORDS[:2]


COLLATES = {
    "tensor": lambda r: torch.stack([i["x"] for i in r]),
    "tuple": lambda r: (torch.stack([i["x"] for i in r]), [i["name"] for i in r]),
    "named tuple": lambda r: Pair(torch.stack([i["x"] for i in r]), torch.tensor([i["y"] for i in r])),
    "dataclass": lambda r: Batch(
        torch.stack([i["x"] for i in r]), [i["name"] for i in r], Pair(np.zeros((len(r), 2)), None)
    ),
    "ordered dict": lambda r: OrderedDict(x=torch.stack([i["x"] for i in r])),
    "default dict": lambda r: defaultdict(list, x=torch.stack([i["x"] for i in r])),
    "user dict": lambda r: UserDict(x=torch.stack([i["x"] for i in r])),
    "batch second": lambda r: torch.stack([i["x"] for i in r], dim=1),
    "record list": lambda r: list(r),
}


@pytest.mark.parametrize("name", COLLATES)
def test_structure_is_kept_and_rows_are_zero(name):
    full, empty = COLLATES[name](RECORDS[:1]), CollateWithEmpty(COLLATES[name], RECORDS)([])
    assert type(empty) is type(full)
    if name == "tensor":
        assert empty.shape == (0, 3)
    if name == "batch second":
        assert empty.shape == (3, 0)
    if name == "record list":
        assert empty == []
    if name == "dataclass":
        assert shape(empty.x)[1] == (0, 3) and empty.names == [] and empty.inner.x.shape == (0, 2)
        assert isinstance(empty.inner, Pair) and empty.inner.y is None
    if name == "named tuple":
        assert empty._fields == ("x", "y") and empty.x.shape == (0, 3) and empty.y.shape == (0,)
    if "dict" in name:
        assert list(empty) == ["x"] and empty["x"].shape == (0, 3)
    if name == "tuple":
        assert empty[0].shape == (0, 3) and empty[1] == []


def test_padded_sequences_shared_tensors_and_counts():
    def collate(records):
        x = pad_sequence([r["x"] for r in records], batch_first=True)
        return {
            "x": x,
            "position_ids": torch.arange(3)[None],
            "scale": 2.5,
            "count": len(records),
            "tokens": torch.tensor(3 * len(records)),
            "train": True,
        }

    empty = CollateWithEmpty(collate, RECORDS)([])
    assert empty["x"].shape == (0, 3)
    assert empty["position_ids"].tolist() == [[0, 1, 2]]  # the same for every batch: kept
    assert (empty["scale"], empty["count"], int(empty["tokens"]), empty["train"]) == (2.5, 0, 0, True)


def test_graph_batches_lose_nodes_and_edges():
    def collate(records):
        return {"nodes": torch.zeros(4 * len(records), 2), "edges": torch.zeros(2, 6 * len(records), dtype=torch.long)}

    empty = CollateWithEmpty(collate, RECORDS)([])
    assert empty["nodes"].shape == (0, 2) and empty["edges"].shape == (2, 0)


def test_packed_sequence():
    empty = CollateWithEmpty(lambda r: pack_sequence([i["x"] for i in r]), RECORDS)([])
    assert empty.data.shape == (0,) and int(empty.batch_sizes.sum()) == 0


def test_batch_encoding():
    transformers = pytest.importorskip("transformers", reason="the transformers extra is optional")
    collate = CollateWithEmpty(
        lambda r: transformers.BatchEncoding({"input_ids": torch.stack([i["x"].long() for i in r])}), RECORDS
    )
    empty = collate([])
    assert isinstance(empty, transformers.BatchEncoding) and empty["input_ids"].shape == (0, 3)


def test_collate_that_takes_its_records_apart():
    def collate(records):
        return torch.stack([r.pop("x") for r in records])

    class Fresh:
        def __getitem__(self, i):
            return record(i)

    assert CollateWithEmpty(collate, Fresh())([]).shape == (0, 3)


def test_dataset_that_fetches_in_batches():
    class Bulk:
        def __getitems__(self, indices):
            return [record(i) for i in indices]

    assert CollateWithEmpty(default_collate, Bulk())([])["x"].shape == (0, 3)


def test_each_empty_batch_is_its_own():
    collate = CollateWithEmpty(lambda r: {"x": torch.stack([i["x"] for i in r])}, RECORDS)
    collate([])["x"] = None
    assert collate([])["x"].shape == (0, 3)


def test_no_record_is_kept_alive_or_shown():
    empty = CollateWithEmpty(default_collate, RECORDS)([])
    assert empty["x"].untyped_storage().nbytes() == 0


@given(st.lists(st.integers(1, 4), min_size=0, max_size=3), st.integers(0, 3))
def test_any_rank_and_batch_dimension(sizes, position):
    position = min(position, len(sizes))
    records = [torch.zeros(sizes)] * 2
    empty = CollateWithEmpty(lambda r: torch.stack(r, dim=position), records)([])
    assert list(empty.shape) == sizes[:position] + [0] + sizes[position:]


class Opaque:
    pass


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda r: {"a": [Opaque()]}, r"batch\['a'\]\[0\] is a Opaque"),
        (lambda r: {"n": 7 + len(r)}, r"batch\['n'\] is 8 for one record and 9 for two"),
        (lambda r: torch.zeros(3) if len(r) == 1 else torch.zeros(2, 3), "shape"),
    ],
)
def test_what_cannot_be_emptied_is_named(collate, message):
    with pytest.raises(TypeError, match=message):
        CollateWithEmpty(collate, RECORDS)([])


def test_a_failing_collate_is_explained():
    def collate(records):
        raise KeyError("label")

    with pytest.raises(RuntimeError, match="empty batch, and collate_fn failed on the first record alone.*KeyError"):
        CollateWithEmpty(collate, RECORDS)([])
