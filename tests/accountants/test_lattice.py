"""Lattice laws: what the cells admit to be wrong by moves mass to the safe side, and parts of a law stay bounds."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from accountants import lattice
from accountants.lattice import Lattice, optimistic, pessimistic
from accountants.pairs import Cells, SubsampledGaussian

from .test_pairs import exact


@dataclass(frozen=True)
class Doubtful(SubsampledGaussian):
    """The same pair, one of its numbers off by an error that it admits, or by mass outside the cells."""

    what: str = ""
    much: float = 0.0

    def cells(self, edges: np.ndarray) -> Cells:
        cells = super().cells(edges)
        unit = cells.p if self.what.endswith("_error") else 1.0
        return replace(cells, **{self.what: getattr(cells, self.what) + self.much * unit})


def laws(make, what: str, much: float, step: float = 1e-2) -> tuple[Lattice, Lattice]:
    return (
        make(SubsampledGaussian(1.0, 0.1), step, 1e-12, 1e-20),
        make(Doubtful(1.0, 0.1, what=what, much=much), step, 1e-12, 1e-20),
    )


def delta(law: Lattice, epsilon: float) -> float:
    return float(law.mass @ np.maximum(-np.expm1(epsilon - law.losses), 0.0)) + law.infinite


def q_mass(law: Lattice) -> float:
    return float(law.mass @ np.exp(-law.losses))


def test_the_mass_of_a_cell_is_rounded() -> None:
    sure, doubtful = laws(pessimistic, "p_error", 1e-3)
    assert doubtful.mass.sum() >= sure.mass.sum() + 0.999e-3
    sure, doubtful = laws(optimistic, "p_error", 1e-3)
    assert doubtful.mass.sum() <= sure.mass.sum() - 0.999e-3
    assert q_mass(doubtful) >= q_mass(sure) * (1 - 1e-9)  # less P-mass with as much of the other: smaller losses


@pytest.mark.parametrize(("make", "side"), [(pessimistic, 1), (optimistic, -1)])
def test_the_excess_of_a_cell_is_rounded(make, side: int) -> None:
    # The excess tells a cell's loss: more of it, or less, at the same mass.
    sure, doubtful = laws(make, "excess_error", 1e-4)
    assert side * (q_mass(sure) - q_mass(doubtful)) >= 0.9e-4 * q_mass(sure) * 0.9
    for epsilon in (0.0, 0.2, 1.0):
        assert side * (delta(doubtful, epsilon) - delta(sure, epsilon)) > 0


def test_mass_outside_the_cells_is_rounded_up_from_above() -> None:
    for what, place in (("below", 0), ("above", -1)):
        sure, doubtful = laws(pessimistic, what, 1e-3)
        assert doubtful.losses[place] == sure.losses[place]
        assert doubtful.mass[place] >= sure.mass[place] + 0.999e-3
    sure, doubtful = laws(pessimistic, "above_excess", 1e-3)
    assert doubtful.infinite == pytest.approx(sure.infinite + 1e-3)


@pytest.mark.parametrize("excess", [1.0, 3.0])
def test_no_mass_is_negative_however_much_the_cells_admit(excess: float) -> None:
    for make in (pessimistic, optimistic):
        assert (laws(make, "excess_error", excess)[1].mass >= 0).all()


def test_where_a_merged_cell_lies_is_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = SubsampledGaussian(1.0, 0.1)
    sure = optimistic(pair, 1e-3, 1e-12, 1e-20)
    monkeypatch.setattr(lattice, "UNIT", 1e-5)
    doubtful = optimistic(pair, 1e-3, 1e-12, 1e-20)
    assert q_mass(doubtful) >= q_mass(sure) * (1 + 2e-5)


@pytest.mark.parametrize("pair", [SubsampledGaussian(1.0, 0.1), SubsampledGaussian(1.0, 0.1, add=True)])
def test_parts_on_different_meshes_cover_the_law_from_above_and_leave_some_out_from_below(pair) -> None:
    border = 0.0437
    masses = exact(pair, None, border)[0], exact(pair, border, None)[0]
    for make, side in ((pessimistic, 1), (optimistic, -1)):
        whole = make(pair, 1e-3, 1e-12, 1e-20)
        parts = [make(pair, 1e-2, 1e-12, 1e-20, -math.inf, border), make(pair, 1.7e-2, 1e-12, 1e-20, border, math.inf)]
        for part, mass in zip(parts, masses, strict=True):
            assert side * (float(part.mass.sum()) - float(mass)) > 1e-4
        for epsilon in (0.0, 0.04, 0.1):
            assert side * (sum(delta(part, epsilon) for part in parts) - delta(whole, epsilon)) >= -1e-12


def test_every_part_keeps_the_infinite_losses() -> None:
    pair = SubsampledGaussian(1.0, 0.1)
    whole = pessimistic(pair, 1e-2, 1e-12, 1e-3)
    assert pessimistic(pair, 1e-2, 1e-12, 1e-3, -math.inf, 0.05).infinite >= 0.99 * whole.infinite > 0


def test_a_mesh_too_fine_to_hold_is_an_error() -> None:
    with pytest.raises(OverflowError, match="lattice points"):
        pessimistic(SubsampledGaussian(1.0, 0.1), 1e-9, 1e-12, 1e-20)


@pytest.mark.parametrize("second", [1.0, 1e-3, 1e-9])
@pytest.mark.parametrize("first", [1.0, 1e-3, 1e-9])
def test_two_cells_merged_lose_no_more_than_apart(first: float, second: float) -> None:
    step, edges = 0.1, np.array([0.0, 0.3, 0.6])
    for inner in ([0.07, 0.02], [0.25, 0.28], [0.0, 0.3], [0.11, 0.19]):
        for centre in (0.0, 0.033, 0.078):
            given = np.array([first, second]), np.array(inner), edges, step, centre
            index, mass = lattice._merge_pairs(*given, slice(0, 2))
            merged = Lattice(centre, step, np.bincount(index + 5, weights=mass))
            losses = np.array([inner[0], 0.3 + inner[1]])
            for epsilon in np.linspace(-0.2, 0.7, 37):
                apart = float(given[0] @ np.maximum(-np.expm1(epsilon - losses), 0.0))
                together = float(merged.mass @ np.maximum(-np.expm1(epsilon + 0.5 - merged.losses), 0.0))
                assert together <= apart * (1 + 1e-9) + 1e-15 * (first + second)
