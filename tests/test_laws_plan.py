"""Plans: cells at their budget, sizes around the centre, refusals."""

import pytest

from tinylm.config import BadInput
from tinylm.laws.accounting import Shape, flops_per_token, parameters
from tinylm.laws.plan import cell, centre, isoflop_grid

LADDER = [Shape(800, D, 2, D // 8, D // 8, 8, 3 * D, 128, True) for D in range(16, 200, 8)]


def test_cells_meet_their_budget_in_whole_steps():
    cells = isoflop_grid([1e11, 1e12], LADDER, per_budget=5, spread=4, batch_tokens=512)
    assert [c.budget for c in cells] == [1e11] * 5 + [1e12] * 5
    for c in cells:
        assert isinstance(c.steps, int) and c.tokens == 512 * c.steps
        assert c.params == parameters(c.shape).law
        assert c.flops == flops_per_token(c.shape) * c.tokens
        assert c.flops == pytest.approx(c.budget, rel=0.01)


def test_sizes_are_different_and_lie_within_the_spread_on_both_sides_of_the_centre():
    for budget in (3e11, 5e12):
        cells = isoflop_grid([budget], LADDER, per_budget=6, spread=3, batch_tokens=512)
        ratios = [c.params / centre(budget) for c in cells]
        assert len(set(ratios)) == 6 and ratios == sorted(ratios)
        assert 1 / 3 <= ratios[0] < 0.6 and 1.6 < ratios[-1] <= 3


def test_the_centre_is_the_callers_to_choose():
    cells = isoflop_grid([1e12], LADDER, 4, 2.0, 512, centre=lambda flops: 3e5)
    assert all(1.5e5 <= c.params <= 6e5 for c in cells)


def test_the_default_centre_is_the_pilots_law():
    assert centre(1e12) == 113e3
    assert centre(1e13) / centre(1e12) == pytest.approx(10**0.489)


def test_fewer_sizes_than_a_parabola_needs_are_refused():
    with pytest.raises(BadInput, match="2 sizes at 1e.12 FLOPs.*4 are needed.*add shapes"):
        isoflop_grid([1e12], LADDER[8:10], 7, 4, 512)
    with pytest.raises(BadInput, match="3 sizes"):
        isoflop_grid([1e12], LADDER, 3, 4, 512)


def test_a_budget_under_half_a_step_is_refused():
    with pytest.raises(BadInput, match="under half a step"):
        cell(1e6, LADDER[0], 512)
