"""Fits against planted laws: estimators, weights, refits, and what is refused."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from tinylm.config import BadInput
from tinylm.laws import fit
from tinylm.laws.descent import slopes
from tinylm.laws.fit import fit_frontier, fit_law, resample
from tinylm.laws.forms import Frontier, Surface
from tinylm.laws.runs import Runs

LAW = Surface(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
NAMES = ("A", "B", "E", "alpha", "beta")


def planted(noise: float = 0.0, law: Surface = LAW) -> Runs:
    """Five budgets of seven sizes within 4 times of the optimum."""
    rng, rows = np.random.default_rng(0), []
    for flops in np.geomspace(1e17, 1e19, 5):
        best, _, _ = law.optimum(flops)
        rows += [(n, flops / 6 / n, flops) for n in best * np.geomspace(0.25, 4, 7)]
    params, tokens, flops = np.array(rows).T
    loss = law.loss(params, tokens) * np.exp(noise * rng.standard_normal(len(rows)))
    return Runs(params, tokens, flops, loss)


def constants(law) -> list[float]:
    return [getattr(law, name) for name in NAMES]


def test_the_absolute_fit_passes_through_as_many_runs_as_it_has_constants():
    got = fit_law(planted(noise=0.01), Surface, "lad")
    assert (np.abs(got.residuals) < 1e-9).sum() == 5
    assert got.objective == pytest.approx(np.abs(got.residuals).sum())


def test_robust_fits_ignore_an_outlier_that_bends_least_squares():
    runs = planted(noise=1e-4)
    runs.loss[3] *= 1.3
    off = {e: abs(fit_law(runs, Surface, e).law.E - LAW.E) for e in ("huber", "lad", "ls")}
    assert off["huber"] < 0.02 and off["lad"] < 0.02 < off["ls"]


@pytest.mark.parametrize("law", [Frontier(0.0, 21.0, 0.065), Frontier(1.5, 60.0, 0.09)])
def test_a_planted_frontier_is_recovered(law):
    flops = np.geomspace(1e11, 1e14, 6)
    got = fit_frontier(flops, law.loss(flops), floor=True).law
    assert got.loss(1e16) == pytest.approx(law.loss(1e16), rel=1e-3)
    assert got.gamma == pytest.approx(law.gamma, rel=1e-2)


def test_a_power_law_without_floor_is_the_straight_line_in_logs():
    flops, loss = np.geomspace(1e11, 1e13, 5), np.array([4.2, 3.95, 3.6, 3.45, 3.2])
    got = fit_frontier(flops, loss, floor=False).law
    slope, level = np.polyfit(np.log(flops), np.log(loss), 1)
    assert (got.gamma, math.log(got.A)) == pytest.approx((-slope, level), rel=1e-6)


def test_a_point_with_a_large_error_hardly_moves_the_frontier():
    flops, law = np.geomspace(1e11, 1e13, 5), Frontier(0.0, 21.0, 0.065)
    loss = law.loss(flops) * np.array([1.05, 1, 1, 1, 1])
    sigma = np.array([1.0, 0.001, 0.001, 0.001, 0.001])
    runs = Runs(flops, flops, flops, loss, sigma)
    got = fit_law(runs, Frontier, delta=math.inf, E=0.0).law
    assert got.gamma == pytest.approx(0.065, rel=1e-3)


def test_the_optimum_of_a_surface_is_the_least_of_a_scan():
    for kappa in (6.0, 7.5):
        params, tokens, loss = LAW.optimum(1e20, kappa)
        assert kappa * params * tokens == pytest.approx(1e20)
        scan = params * np.geomspace(0.5, 2, 2001)
        losses = LAW.loss(scan, 1e20 / kappa / scan)
        assert loss <= losses.min() and scan[losses.argmin()] == pytest.approx(params, rel=1e-3)
    for flat in (Surface(2.0, 4e-6, 6e-6, 1e-4, 1e-4), Surface(2.0, 6e-6, 4e-6, 1e-4, 1e-4)):
        with pytest.raises(BadInput, match="this flat"):
            flat.optimum(1e17)


def test_the_budget_for_a_loss_is_the_inverse_of_the_loss_at_a_budget():
    law = Frontier(1.5, 60.0, 0.09)
    assert law.flops_at(law.loss(3e13)) == pytest.approx(3e13)
    assert law.flops_at(1.5) == math.inf


def refused(call, *words):
    with pytest.raises(BadInput) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_designs_that_cannot_identify_the_law_are_refused_in_words():
    runs = planted()
    refused(lambda: fit_law(runs.keep(slice(5)), Surface), "5 different runs", "6 or more")
    refused(lambda: fit_law(runs.keep(slice(7)), Surface), "one budget", "1e+17", "add")
    n = np.geomspace(1e6, 1e9, 9)
    ladder = Runs(n, 20 * n, 120 * n**2, LAW.loss(n, 20 * n))
    refused(lambda: fit_law(ladder, Surface), "20 tokens a parameter", "4 times more")
    line = Runs(n, n**1.5, 6 * n**2.5, LAW.loss(n, n**1.5))
    refused(lambda: fit_law(line, Surface), "one line", "other sizes")
    refused(lambda: fit_frontier([1e9, 1e10], [3.0, 2.9], floor=True), "2 budgets", "3 or more")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_losses_that_are_no_losses_are_refused(bad):
    runs = planted()
    runs.loss[4] = bad
    refused(lambda: fit_law(runs, Surface), "loss[4]", str(bad), "drop")


def test_half_the_sigma_counts_as_a_run_said_four_times():
    runs, odd = planted(noise=0.01), np.arange(35) % 2
    said = runs.keep(np.repeat(np.arange(35), np.where(odd, 4, 1)))
    sigma = np.where(odd, 0.01, 0.02)
    for estimator, of in (("ls", sigma), ("huber", sigma * runs.loss)):
        got, told = (fit_law(r, Surface, estimator).law for r in (runs._replace(sigma=of), said))
        assert constants(got) == pytest.approx(constants(told), rel=1e-4)
        assert got.alpha != pytest.approx(fit_law(runs, Surface, estimator).law.alpha, rel=1e-4)


def test_every_refit_is_the_minimum_of_its_own_resample():
    got = fit_law(planted(noise=0.01), Surface)
    refits = resample(got, 30)
    assert (refits == resample(got, 30)).all() and (refits != resample(got, 30, seed=1)).any()
    drawn = np.random.RandomState(42).randint(0, 35, (30, 35))
    for row, picked in zip(refits, drawn, strict=True):
        problem = got.problem._replace(weights=np.bincount(picked, minlength=35).astype(float))
        found = minimum(problem, got.theta)
        assert value(row, got, problem) == pytest.approx(found, rel=1e-6)
    with pytest.raises(BadInput, match="lad has no smooth refits"):
        resample(fit_law(planted(noise=0.01), Surface, "lad"), 5)


def minimum(problem, theta) -> float:
    """Find the least penalty near theta by scipy alone, scaled to be of order 1."""
    def scaled(at):
        with np.errstate(all="ignore"):  # a trial far off may have a negative loss
            got = slopes(at[None], problem)
        return np.nan_to_num(got.value[0] * 1e3, nan=1e9), np.nan_to_num(got.gradient[0] * 1e3)
    for _ in range(2):
        theta = minimize(scaled, theta, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return scaled(theta)[0] / 1e3


def value(row, got, problem) -> float:
    """Give the penalty at constants, put back on the problem's centred scale."""
    law = Surface(*row)
    c_params, c_tokens = np.exp(got.centre)
    theta = Surface(law.E / got.least, law.A * c_params**-law.alpha / got.least,
                    law.B * c_tokens**-law.beta / got.least, law.alpha, law.beta).theta()
    return slopes(theta[None], problem).value[0]


def test_a_stuck_optimiser_gives_no_law(monkeypatch):
    monkeypatch.setattr(fit, "descend", lambda theta, problem: theta)
    refused(lambda: fit_law(planted(noise=0.01), Surface), "gradient norm", "no minimum")


def test_starts_that_end_elsewhere_are_counted(monkeypatch):
    ends = fit.descend
    monkeypatch.setattr(fit, "descend", lambda theta, problem: np.concatenate(
        [ends(theta[:2], problem), theta[2:]]))
    got = fit_law(planted(noise=0.01), Surface).certificate
    assert (got["starts"], got["agree_share"]) == (8, 0.25) and got["moved"] > 0


def test_a_million_runs_are_fitted_as_fifty_thousand_are():
    few = planted(noise=0.01)
    many = few.keep(np.tile(np.arange(35), 1500))
    a, b = fit_law(few, Surface), fit_law(many, Surface)
    assert constants(b.law) == pytest.approx(constants(a.law), rel=1e-4)
    assert b.objective == pytest.approx(1500 * a.objective, rel=1e-6)


def test_a_constant_that_ends_at_its_limit_is_named():
    flops = np.geomspace(1e11, 1e14, 6)
    bent = Frontier(0.0, 21.0, 0.065).loss(flops) - 0.5
    assert fit_frontier(flops, bent, floor=True).certificate["at_bound"] == ["E"]
    assert fit_frontier(flops, bent + 1, floor=True).certificate["at_bound"] == []


def test_frontiers_that_bend_either_way_end_at_a_certified_minimum():
    met = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        budgets = int(rng.integers(3, 6))
        flops = np.geomspace(1e17, 1e17 * 10 ** rng.uniform(1, 3), budgets)
        bend = 0.002 * rng.uniform(-6, 6) * np.linspace(-1, 1, budgets)**2
        got = fit_frontier(flops, 21 * flops**-0.05 * (1 - bend), floor=True).certificate
        assert got["gradient_norm"] < 1e-5
        met += got["at_bound"] == ["E"]
    assert 10 < met < 50  # a floor at zero and one above it are both common
