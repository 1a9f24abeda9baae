"""Plans: cells at their budget, sizes around the centre, refusals."""

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.laws.accounting import DEVICES, Shape, flops_per_token, parameters
from tinylm.laws.fit import fit_law
from tinylm.laws.forms import Coupled, Saturating, Surface
from tinylm.laws.plan import PILOT, cell, centre, expected, isoflop_grid, propose
from tinylm.laws.runs import Runs

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


def test_the_centre_is_the_pilots_law():
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


LAW = Surface(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)


def design(span: float = 100.0, spread: float = 4.0):
    """Five budgets of seven sizes, and the best size at 10 times the largest."""
    pairs = [(n, c / 6 / n) for c in np.geomspace(1e17, 1e17 * span, 5)
             for n in LAW.optimum(c)[0] * np.geomspace(1 / spread, spread, 7)]
    params, tokens = np.array(pairs).T
    return params, tokens, LAW.optimum(1e18 * span)[:2]


@pytest.mark.parametrize("span", [30.0, 100.0])
def test_the_expected_error_is_that_of_simulated_sweeps(span):
    params, tokens, target = design(span)
    told = expected(params, tokens, target, LAW, 0.005, 7.0)
    rng, said = np.random.default_rng(0), []
    for _ in range(120):
        loss = LAW.loss(params, tokens) + 0.005 * rng.standard_normal(35)
        law = fit_law(Runs(params, tokens, 6 * params * tokens, loss), Surface, "ls").law
        said.append(law.loss(*target))
    assert told.loss == LAW.loss(*target)
    assert told.stderr == pytest.approx(np.std(said), rel=0.2)


def test_the_form_risk_is_the_bias_of_a_surface_where_another_law_is_true():
    params, tokens, target = design()
    told = expected(params, tokens, target, LAW, 0.005, 7.0)
    flops, same, off = 6 * params * tokens, vars(LAW).values(), []
    for truth in (Coupled(*same, 0.7), Coupled(*same, 1.4), Saturating(*same, 7.0)):
        runs = Runs(params, tokens, flops, truth.loss(params, tokens))
        law = fit_law(runs, Surface, "ls").law
        off.append(law.loss(*target) - truth.loss(*target))
    assert list(told.biases) == ["coupled, k = 0.7", "coupled, k = 1.4", "saturating"]
    assert list(told.biases.values()) == pytest.approx(off)
    assert told.form_risk == max(map(abs, off)) and min(map(abs, off)) > 1e-3
    near = expected(params, tokens, LAW.optimum(2e19)[:2], LAW, 0.005, 7.0)
    assert near.form_risk < told.form_risk and near.stderr < told.stderr
    wide = expected(*design(1000.0)[:2], target, LAW, 0.005, 7.0)
    assert wide.stderr < told.stderr


def test_a_sweep_that_identifies_nothing_is_refused_before_it_is_run():
    params, tokens, target = design()
    with pytest.raises(BadInput, match="one budget"):
        expected(params[:7], tokens[:7], target, LAW, 0.005, 7.0)


def test_a_proposal_spends_what_is_given_on_a_sweep_and_one_larger_run():
    shapes = [Shape(800, D, 2, 2, 2, D // 2, 3 * D, 128, True) for D in range(8, 600, 4)]
    made = propose(1e15, shapes, DEVICES[0], dollars_per_hour=2.0)
    budgets = sorted({c.budget for c in made.cells})
    assert len(made.cells) == 35 and budgets[-1] / budgets[0] == pytest.approx(100)
    assert made.sweep.flops == pytest.approx(6e14, rel=0.02)
    assert made.run.flops == made.target.flops == pytest.approx(4e14, rel=0.01)
    assert made.sweep.dollars == pytest.approx(2 * made.sweep.flops / 125e12 / 0.4 / 3600)
    sizes = [np.array([getattr(c, k) for c in made.cells]) for k in ("params", "tokens")]
    at = (made.target.params, made.target.tokens)
    assert made.expected == expected(*sizes, at, PILOT, 0.003 * PILOT.loss(*at), np.log(800))
