"""Every mode makes the update that clipping one sample at a time makes; a wrong one is found out."""

import pytest
import torch

from benchmarks import agreement, columns
from benchmarks.subtrees import REPORTED, workload
from benchmarks.workloads import WORKLOADS, Workload

OURS = [f"gsm {mode}" for mode in columns.OURS]


def _built(row: Workload) -> Workload:
    try:
        row.problem("quick")
    except ImportError as error:
        pytest.skip(f"{row.title}: {error}")
    return row


@pytest.mark.parametrize("name", WORKLOADS)
def test_all_modes_make_the_same_update(name):
    found = agreement.compare(_built(WORKLOADS[name]), OURS)
    assert {row.column: row.failure for row in found} == dict.fromkeys(OURS)
    assert {row.dtype for row in found} == {"float64"}
    assert max(row.error for row in found) < 1e-9


@pytest.mark.parametrize("kind", REPORTED)
def test_all_modes_make_the_same_update_where_parents_own_parameters(kind):
    found = agreement.compare(workload(kind), OURS)
    assert [row.failure for row in found] == [None] * len(OURS)
    assert max(row.error for row in found) < 1e-9


def test_the_expected_update_clips_each_sample():
    problem = WORKLOADS["mlp16"].problem("quick", dtype="float64")
    total = 0.0
    for i in range(len(problem.targets)):
        problem.model.zero_grad()
        problem.loss(problem.model(problem.inputs[i : i + 1]), problem.targets[i : i + 1]).backward()
        flat = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
        total = total + flat / max(1.0, float(flat.norm()) / columns.CLIP)
    want = -columns.LEARNING_RATE * total / len(problem.targets)
    torch.testing.assert_close(agreement.expected_update(problem), want)


def test_a_wrong_update_is_measured(monkeypatch):
    def halved(problem, noise):
        trainer = columns.gsm(problem, noise, mode="auto")
        before = [p.detach().clone() for p in trainer.model.parameters()]

        def step():
            trainer.step()
            with torch.no_grad():
                for p, old in zip(trainer.model.parameters(), before, strict=True):
                    p.add_(p - old, alpha=-0.5)

        return columns.Trainer(step, trainer.model)

    monkeypatch.setitem(columns.COLUMNS, "halved", halved)
    (found,) = agreement.compare(WORKLOADS["mlp16"], ["halved"])
    assert found.error == pytest.approx(0.5)


def test_opacus_agrees_up_to_its_own_slack():
    found = agreement.compare(WORKLOADS["classifier"], ["opacus hooks", "opacus ghost", "opacus ew"])
    assert [row.failure for row in found] == [None] * 3
    assert max(row.error for row in found) < 1e-5  # it divides by norm + 1e-6


def test_replaced_layers_are_compared_as_sets_of_weights():
    (found,) = agreement.compare(WORKLOADS["lstm"], ["opacus hooks"])
    assert found.dtype == "float32" and "dtype" in found.failure  # DPLSTM starts from a float32 state
    assert found.error < 1e-4
