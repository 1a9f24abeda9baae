"""One battery for every law: planted constants, gradients, units, and designs that say nothing."""

import math

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.laws.descent import residuals, slopes
from tinylm.laws.fit import fit_law
from tinylm.laws.forms import (
    Coupled,
    DataConstrained,
    Frontier,
    Kaplan,
    OverTraining,
    Saturating,
    Surface,
)
from tinylm.laws.runs import Runs

LAWS = [
    Surface(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37),
    Coupled(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37, k=1.6),
    Kaplan(A=6.4e13**0.076, B=1.8e13**0.103, alpha=0.076, beta=0.103),
    Saturating(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37, ceiling=6.9),
    OverTraining(E=1.8, A=166.0, B=287.0, alpha=0.27),
    DataConstrained(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37, R_D=15.0, R_N=5.0),
    Frontier(E=1.5, A=60.0, gamma=0.09),
]
GIVEN = {Saturating: {"ceiling": 6.9}}
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)


def planted(law, noise: float = 0.0) -> Runs:
    """Five budgets of seven sizes within 4 times of the optimum, with 1, 4 and 20 epochs."""
    best = LAWS[0]
    rows = [(n, flops / 6 / n, flops) for flops in np.geomspace(1e16, 1e20, 5)
            for n in best.optimum(flops)[0] * np.geomspace(0.25, 4, 7)]
    params, tokens, flops = np.array(rows).T
    runs = Runs(params, tokens, flops, flops, None, tokens / np.resize([1, 4, 20], len(rows)))
    loss = law.loss(*(runs._asdict()[name] for name in law.columns))
    return runs._replace(loss=loss + noise * np.random.default_rng(0).standard_normal(len(rows)))


def refit(law, runs: Runs, estimator="huber", **given):
    return fit_law(runs, type(law), estimator, **{**GIVEN.get(type(law), {}), **given})


@each_law
@pytest.mark.parametrize("estimator", ["huber", "lad", "ls"])
def test_planted_constants_are_recovered(law, estimator):
    got = refit(law, planted(law), estimator)
    assert np.exp(got.law.theta()) == pytest.approx(np.exp(law.theta()), rel=1e-4)
    assert got.certificate["agree_share"] >= 0.5 and got.certificate["at_bound"] == []


@each_law
@pytest.mark.parametrize("logs", [True, False])
def test_the_jacobian_and_the_gradient_equal_the_numeric_ones(law, logs):
    got = refit(law, planted(law, 0.02))
    weights = np.random.default_rng(1).uniform(0.5, 2, 35)
    problem = got.problem._replace(logs=logs, weights=weights, delta=0.01)
    theta = got.theta + 0.03 * np.random.default_rng(2).standard_normal(len(got.theta))
    h = 1e-6 * np.eye(len(theta))
    above, below = (residuals(theta + s * h, problem)[0] for s in (1, -1))
    assert residuals(theta, problem)[1] == pytest.approx((below - above) / 2e-6, abs=1e-7)
    above, below = (slopes(theta + s * h, problem).value for s in (1, -1))
    numeric = (above - below) / 2e-6
    assert slopes(theta[None], problem).gradient[0] == pytest.approx(numeric, abs=1e-7)


@each_law
def test_units_do_not_change_what_a_law_says(law):
    runs, unit = planted(law, 0.01), math.log(2)
    other = Runs(runs.params / 1e6, runs.tokens / 1e9, runs.flops / 1e15, runs.loss / unit, None,
                 runs.unique / 1e9)
    given = {k: v / unit for k, v in GIVEN.get(type(law), {}).items()}
    a, b = refit(law, runs), refit(law, other, **given)
    said = [fitted.law.loss(*(table._asdict()[name][:9] for name in law.columns))
            for fitted, table in ((a, runs), (b, other))]
    assert said[1] * unit == pytest.approx(said[0], rel=1e-7)
    for name, value in zip(law.names(), law.theta(), strict=True):
        if name in ("alpha", "beta", "gamma", "k", "R_D", "R_N"):
            got = [dict(zip(law.names(), f.law.theta(), strict=True))[name] for f in (a, b)]
            assert got[1] == pytest.approx(got[0], rel=1e-4), (name, value)


def few(runs):
    return runs.keep(slice(4))


def one_budget(runs):
    return runs.keep(slice(7))


def two_sizes(runs):
    return runs.keep([0, 1] * 4)


def ladder(runs):
    n = np.geomspace(1e6, 1e9, 9)
    return Runs(n, 20 * n, 120 * n**2, 2 + n**-0.1, None, 5 * n)


def line(runs):
    n = np.geomspace(1e6, 1e9, 9)
    return Runs(n, n**1.4, 6 * n**2.4, 2 + n**-0.1, None, n**1.4)


@pytest.mark.parametrize("law", LAWS[:-1], ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("design, words", [
    (few, "4 different runs cannot give a .* train"), (two_sizes, "2 different runs .* train"),
    (one_budget, "one budget, 1e.16 FLOPs; add runs at two|7 different runs .* train 8"),
    (ladder, "20 tokens a parameter.*add runs with 4 times more"),
    (line, "one line .* add runs of other sizes"),
])
def test_designs_that_identify_nothing_are_refused_with_the_runs_that_would(law, design, words):
    with pytest.raises(BadInput, match=words) as caught:
        refit(law, design(planted(law)))
    assert "\n" not in str(caught.value)


def test_one_budget_cannot_give_a_frontier():
    with pytest.raises(BadInput, match="1 budgets cannot give a frontier's 3 numbers; add runs"):
        refit(LAWS[-1], one_budget(planted(LAWS[-1])))


def test_repeats_that_no_run_has_cannot_be_weighed():
    law = LAWS[5]
    runs = planted(law)
    with pytest.raises(BadInput, match="cannot tell R_D.*add runs of 4 or more epochs"):
        refit(law, runs._replace(unique=runs.tokens))
    with pytest.raises(BadInput, match="no unique tokens; give a column"):
        refit(law, runs._replace(unique=None))
    with pytest.raises(BadInput, match="Saturating has no ceiling; give one"):
        fit_law(planted(LAWS[3]), Saturating)


N, D = np.array([1e7, 3e8, 2e9]), np.array([5e9, 2e9, 8e10])


def test_the_laws_are_those_of_the_papers():
    surface, coupled, kaplan, saturating, over, repeats, _ = LAWS
    assert Coupled(1.8, 480.0, 2100.0, 0.35, 0.37, 1.0).loss(N, D) == pytest.approx(
        surface.loss(N, D))
    want = ((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103
    assert kaplan.loss(N, D) == pytest.approx(want)
    C, M, eta = 6 * N * D, D / N, 0.135
    want = 1.8 + 6**eta * (166 * M**eta + 287 * M**-eta) * C**-eta
    assert over.loss(N, D) == pytest.approx(want)
    R = 480 / N**0.35 + 2100 / D**0.37
    assert saturating.loss(N, D) == pytest.approx(1.8 + 1 / (1 / R + 1 / 5.1))
    assert saturating.loss(1, 1) == pytest.approx(6.9, abs=0.02)


def test_repeated_tokens_and_spare_params_count_as_muennighoff_has_them():
    law, U = LAWS[5], D / 10
    best = (0.35 * 480 * U**0.37 / (0.37 * 2100)) ** (1 / 0.35)
    tokens = U + U * 15 * (1 - np.exp(-9 / 15))
    spare = np.maximum(N / best - 1, 0)
    params = np.minimum(N, best) * (1 + 5 * (1 - np.exp(-spare / 5)))
    assert (spare > 0).any() and (spare == 0).any()
    assert law.loss(N, D, U) == pytest.approx(1.8 + 480 / params**0.35 + 2100 / tokens**0.37)
    assert law.loss(best[2], U[2], U[2]) == pytest.approx(LAWS[0].loss(best[2], U[2]))


def test_a_coordinate_that_is_given_is_not_fitted():
    got = fit_law(planted(LAWS[0], 0.01), Surface, E=1.0)
    assert abs(got.law.E - 1) < 1e-12
    assert got.objective > fit_law(planted(LAWS[0], 0.01), Surface).objective
