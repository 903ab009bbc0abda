"""Two processes: one joint Poisson sample, one model, one account, through the engine and Opacus's optimizers."""

import os
import socket
import warnings
from pathlib import Path

import opacus.optimizers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn

from gsm.private_training import make_private
from tests.gsm.training import RECORDS, flat, parts


def both_clippings(rank: int, world: int, port: int, out: Path) -> None:
    """One rank. All ranks are seeded alike, as scripts do that begin with ``torch.manual_seed``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for clipping in ("flat", "per_layer"):
        torch.save(private_epoch(clipping), out / f"{clipping}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def private_epoch(clipping: str) -> dict:
    model, _, loader = parts()
    model = DifferentiallyPrivateDistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = [1.0] * 4 if clipping == "per_layer" else 1.0
    model, optimizer, loader = make_private(
        model, optimizer, loader, noise_multiplier=1.0, mode="hooks", clipping=clipping, max_grad_norm=bound
    )
    drawn = [[i.item() for i in batch] for batch in loader.batch_sampler]
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {
        "drawn": drawn,
        "weights": flat(model),
        "history": optimizer.accountant.history,
        "optimizer": isinstance(optimizer, opacus.optimizers.DPOptimizer),
        "batch": optimizer.expected_batch_size,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks reported, by clipping."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(both_clippings, args=(2, port, out), nprocs=2)
    return {name: [torch.load(out / f"{name}-{rank}.pt") for rank in range(2)] for name in ("flat", "per_layer")}


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_ranks_train_one_model_on_disjoint_shares_of_one_sample(results, clipping):
    first, second = results[clipping]
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["weights"], flat(parts()[0]))
    assert first["history"] == second["history"] == [(1.0, 1 / 6, 6)]
    assert first["optimizer"] and first["batch"] == 10
    ours, theirs = (set(sum(side["drawn"], [])) for side in (first, second))
    assert not ours & theirs and ours | theirs <= set(range(RECORDS))
    assert [len(b) for b in first["drawn"]] != [len(b) for b in second["drawn"]]


def test_what_is_not_available_over_processes_is_named():
    from gsm.preparation import private_optimizer

    common = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "expected_batch_size": 10,
        "loss_reduction": "mean",
        "generator": None,
        "distributed": True,
        "clipping_options": {},
    }
    with pytest.raises(ValueError, match="DistributedDataParallel takes clipping='flat' or 'per_layer'.*'ghost'"):
        private_optimizer(parts()[1], clipping="flat", mode="ghost", secure_mode=False, **common)
    with pytest.raises(ValueError, match="secure_mode is not available"):
        private_optimizer(parts()[1], clipping="flat", mode="hooks", secure_mode=True, **common)


def test_a_batch_released_twice_is_said(tmp_path, recwarn):
    """One process is enough: the optimizer is Opacus's."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, _, loader = parts()
        model = DifferentiallyPrivateDistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.0, mode="hooks")

        def step(x, y):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        for x, y in loader:
            step(x, y)
        assert not [w for w in recwarn if "more releases" in str(w.message)]
        with pytest.warns(UserWarning, match="more releases than batches drawn"):
            step(x, y)
        assert sum(entry[2] for entry in optimizer.accountant.history) == len(loader) + 1
    finally:
        dist.destroy_process_group()
