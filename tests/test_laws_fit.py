"""Fits against planted laws, published tables and numeric gradients."""

import math
from pathlib import Path

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.laws import fit
from tinylm.laws.fit import Problem, Runs, fit_frontier, fit_surface, read_csv
from tinylm.laws.forms import Frontier, Surface

PUBLISHED = Path(__file__).parents[2] / "shared" / "published-runs"
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


def published(name: str) -> Path:
    if not (PUBLISHED / name).exists():
        pytest.skip(f"{name} of the published runs is not beside this checkout")
    return PUBLISHED / name


@pytest.mark.parametrize("estimator", ["huber", "lad", "ls"])
def test_a_planted_surface_is_recovered(estimator):
    got = fit_surface(planted(), estimator)
    assert constants(got.law) == pytest.approx(constants(LAW), rel=1e-4)
    assert got.certificate["agree_share"] > 0


@pytest.mark.parametrize("rows, estimator, want, objective", [
    (240, "huber", (477.8259, 2143.417, 1.817218, 0.347310, 0.367172), 1.0182740178e-3),
    (240, "lad", (482.0005, 2085.440, 1.81686, 0.34781, 0.36585), 1.1294947),
    (240, "ls", (567.81, 7581.9, 1.88281, 0.35762, 0.42762), 0.0832038),
    (245, "huber", (495.73, 12845.6, 1.89134, 0.34931, 0.45305), 1.82601e-3),
])
def test_chinchilla_fits_are_those_published(rows, estimator, want, objective):
    runs = read_csv(published("chinchilla_epoch.csv"))
    got = fit_surface(runs.keep(slice(245 - rows, None)), estimator)
    assert constants(got.law) == pytest.approx(want, rel=2e-5)
    assert got.objective == pytest.approx(objective, rel=3e-6)
    assert got.objective <= objective * (1 + 1e-6)
    assert got.certificate["agree_share"] == 1.0 and got.certificate["gradient_norm"] < 1e-6


def test_the_absolute_fit_passes_through_as_many_runs_as_it_has_constants():
    got = fit_surface(planted(noise=0.01), "lad")
    assert (np.abs(got.residuals) < 1e-9).sum() == 5
    assert got.objective == pytest.approx(np.abs(got.residuals).sum())


def test_robust_fits_ignore_an_outlier_that_bends_least_squares():
    runs = planted(noise=1e-4)
    runs.loss[3] *= 1.3
    off = {e: abs(fit_surface(runs, e).law.E - LAW.E) for e in ("huber", "lad", "ls")}
    assert off["huber"] < 0.02 and off["lad"] < 0.02 < off["ls"]


@pytest.mark.parametrize("estimator, delta", [("huber", 1e-2), ("huber", math.inf), ("ls", 1)])
def test_the_analytic_gradient_equals_the_numeric_one(estimator, delta):
    runs = planted(noise=0.03)
    logs = np.log([runs.params, runs.tokens])
    weights = np.random.default_rng(1).uniform(0.5, 2, len(runs.loss))
    problem = Problem(logs - logs.mean(1)[:, None], runs.loss, weights, True, estimator, delta)
    theta = np.array([-1.0, -0.8, 0.3, 0.4, 0.7])
    _, gradient = fit.objective(theta, problem)
    steps = 1e-6 * np.eye(5)
    numeric = [(fit.objective(theta + h, problem)[0] - fit.objective(theta - h, problem)[0]) / 2e-6
               for h in steps]
    assert gradient == pytest.approx(numeric, rel=1e-5)


def test_units_of_params_tokens_and_loss_do_not_change_the_law():
    runs = planted(noise=0.01)
    other = Runs(runs.params / 1e6, runs.tokens / 1e9, runs.flops, runs.loss / math.log(2))
    a, b = fit_surface(runs).law, fit_surface(other).law
    assert (b.alpha, b.beta) == pytest.approx((a.alpha, a.beta), rel=1e-5)
    assert b.E * math.log(2) == pytest.approx(a.E, rel=1e-5)
    assert b.A * math.log(2) * 1e6**b.alpha == pytest.approx(a.A, rel=1e-4)


def test_weights_count_as_repeated_runs():
    runs = planted(noise=0.01)
    twice = runs.keep(np.concatenate([np.arange(35), np.arange(7)]))
    weights = np.where(np.arange(35) < 7, 2.0, 1.0)
    a, b = fit_surface(twice, "ls"), fit_surface(runs, "ls", weights=weights)
    assert constants(a.law) == pytest.approx(constants(b.law), rel=1e-4)


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
    assert fit_frontier(flops, loss, False, sigma).law.gamma == pytest.approx(0.065, rel=1e-3)


def test_the_optimum_of_a_surface_is_the_least_of_a_scan():
    for kappa in (6.0, 7.5):
        params, tokens, loss = LAW.optimum(1e20, kappa)
        assert kappa * params * tokens == pytest.approx(1e20)
        scan = params * np.geomspace(0.5, 2, 2001)
        losses = LAW.loss(scan, 1e20 / kappa / scan)
        assert loss <= losses.min() and scan[losses.argmin()] == pytest.approx(params, rel=1e-3)


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
    refused(lambda: fit_surface(runs.keep(slice(5))), "5 different runs", "6 or more")
    refused(lambda: fit_surface(runs.keep(slice(7))), "one budget", "1e+17", "add")
    n = np.geomspace(1e6, 1e9, 9)
    ladder = Runs(n, 20 * n, 120 * n**2, LAW.loss(n, 20 * n))
    refused(lambda: fit_surface(ladder), "20 tokens a parameter", "4 times more")
    line = Runs(n, n**1.5, 6 * n**2.5, LAW.loss(n, n**1.5))
    refused(lambda: fit_surface(line), "one line", "other sizes")
    refused(lambda: fit_frontier([1e9, 1e10], [3.0, 2.9], floor=True), "2 budgets", "3 or more")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_losses_that_are_no_losses_are_refused(bad):
    runs = planted()
    runs.loss[4] = bad
    refused(lambda: fit_surface(runs), "loss[4]", str(bad), "drop")


def write(tmp_path, text):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def test_two_of_three_sizes_suffice_and_exact_flops_are_kept(tmp_path):
    runs = read_csv(write(tmp_path, "params,flops,loss\n10,1200,3\n20,1200,2.9\n"))
    assert runs.tokens.tolist() == [20, 10] and runs.sigma is None
    runs = read_csv(write(tmp_path, "N,tokens,loss,sigma\n10,20,3,.1\n"))
    assert runs.flops.tolist() == [1200] and runs.sigma.tolist() == [0.1]
    path = write(tmp_path, "tag,N,tokens,C,loss\na,10,20,1500,3\nb,1,1,1,1\n")
    runs = read_csv(path, {"tag": "a"})
    assert runs.flops.tolist() == [1500] and len(runs.loss) == 1


@pytest.mark.parametrize("text, words", [
    ("params,tokens,loss\n1,2,3\n1,x,3\n", ("runs.csv:3", "tokens='x'", "number")),
    ("params,tokens,loss\n1,2,-3\n", ("runs.csv:2", "loss=-3", "above 0")),
    ("params,tokens,loss\n1,2\n", ("runs.csv:2", "loss=None")),
    ("params,loss\n1,2\n", ("params, loss", "two of")),
    ("params,tokens,loss\n", ("no runs",)),
    ("", ("needs loss",)),
])
def test_bad_tables_are_refused_by_file_and_line(tmp_path, text, words):
    refused(lambda: read_csv(write(tmp_path, text)), *words)


def test_a_missing_table_or_column_is_refused(tmp_path):
    refused(lambda: read_csv(tmp_path / "none.csv"), "none.csv", "cannot be read")
    path = write(tmp_path, "params,tokens,loss\n1,2,3\n")
    refused(lambda: read_csv(path, {"tag": "x"}), "no column 'tag'")
