"""Minima at equal compute: exact on parabolas, biased as known on surfaces, refused in words."""

import math
from pathlib import Path

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.laws import isoflop
from tinylm.laws.forms import Surface
from tinylm.laws.isoflop import exponents, minima
from tinylm.laws.runs import Runs, read_csv

CHINCHILLA = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
LOPSIDED = Surface(E=1.69, A=406.4, B=410.7, alpha=0.465, beta=0.155)
PUBLISHED = Path(__file__).parents[2] / "shared" / "published-runs"


def bowl(flops=1e12, best=1e5, low=0.3, high=4.0, sizes=7, bend=0.12, noise=0.0) -> Runs:
    """One budget whose loss is a parabola in ln params."""
    params = best * np.geomspace(low, high, sizes)
    loss = 3.5 + bend * np.log(params / best) ** 2
    loss = loss + noise * np.random.default_rng(0).standard_normal(sizes)
    return Runs(params, flops / 6 / params, np.full(sizes, flops), loss)


def grid(spread: float, law: Surface = CHINCHILLA) -> Runs:
    """Noise-free runs of a surface: 5 budgets, 15 sizes within `spread` of the optimum."""
    rows = []
    for flops in np.geomspace(1e17, 1e21, 5):
        best = law.optimum(flops)[0]
        rows += [(n, flops / 6 / n, flops) for n in best * np.geomspace(1 / spread, spread, 15)]
    params, tokens, flops = np.array(rows).T
    return Runs(params, tokens, flops, law.loss(params, tokens))


def test_the_bottom_of_a_planted_parabola_is_found_exactly():
    (m,) = minima(bowl())
    assert m.bracketed and m.reason == ""
    assert (m.params, m.loss, m.curvature) == pytest.approx((1e5, 3.5, 0.24))
    assert m.tokens == pytest.approx(1e12 / 6e5)
    u = math.log(2e5)
    c0, c1, c2 = m.coefficients
    assert c0 + c1 * u + c2 * u**2 == pytest.approx(3.5 + 0.12 * math.log(2) ** 2)


@pytest.mark.parametrize("law, spread, percent", [
    (CHINCHILLA, 16, -5.1), (CHINCHILLA, 8, -2.9), (CHINCHILLA, 4, -1.3), (CHINCHILLA, 2, -0.33),
    (LOPSIDED, 16, -23),
])
def test_the_parabola_misplaces_tokens_on_a_surface_by_the_known_bias(
        law, spread, percent, monkeypatch):
    monkeypatch.setattr(isoflop, "WINDOW", 100.0)
    found = minima(grid(spread, law))
    off = [100 * (m.tokens / law.optimum(m.flops)[1] - 1) for m in found]
    assert np.mean(off) == pytest.approx(percent, rel=0.015)


def test_the_window_keeps_a_wide_grid_as_unbiased_as_one_of_four_times():
    off = [m.tokens / CHINCHILLA.optimum(m.flops)[1] - 1 for m in minima(grid(16))]
    assert max(map(abs, off)) < 0.015


def test_exponents_of_a_planted_surface_are_found():
    got = exponents(minima(grid(2)))
    want = CHINCHILLA.beta / (CHINCHILLA.alpha + CHINCHILLA.beta)
    assert got.a == pytest.approx(want, abs=1e-3) and got.b == pytest.approx(1 - want, abs=1e-3)
    assert 0 <= got.a_se < 1e-3
    best = math.exp(got.log_params + got.a * math.log(1e19))
    assert best == pytest.approx(CHINCHILLA.optimum(1e19)[0], rel=0.01)


@pytest.mark.parametrize("runs, words", [
    (bowl(low=1.3, high=8), "below the smallest"),
    (bowl(low=0.1, high=0.8), "above the largest"),
    (bowl(sizes=3), "3 sizes"),
    (bowl(bend=-0.1), "does not bend upwards"),
    (bowl(bend=0.001, noise=0.1), "does not bend upwards"),
])
def test_a_minimum_that_the_runs_do_not_show_is_refused_in_words(runs, words):
    (m,) = minima(runs)
    assert not m.bracketed and words in m.reason
    with pytest.raises(BadInput, match="0 bracketed minima"):
        exponents([m])


def test_the_standard_error_of_the_least_loss_covers_the_truth():
    found = []
    for seed in range(200):
        noise = 0.01 * np.random.default_rng(seed).standard_normal(9)
        runs = bowl(sizes=9)
        (m,) = minima(runs._replace(loss=runs.loss + noise))
        found.append((m.loss - 3.5) / m.loss_se)
    assert 0.8 < np.std(found) < 1.5  # a t of 4-6 degrees of freedom is wider than a normal


def test_runs_within_three_percent_are_one_budget_and_labels_overrule():
    a, b = bowl(flops=1e12), bowl(flops=1.02e12)
    both = Runs(*(None if x is None else np.concatenate([x, y]) for x, y in zip(a, b, strict=True)))
    assert len(minima(both)) == 1
    assert len(minima(both, budgets=np.repeat([0, 1], 7))) == 2
    with pytest.raises(BadInput, match="3 budget labels for 14 runs"):
        minima(both, budgets=np.zeros(3))


def test_the_pilots_table_of_minima_is_reproduced():
    path = PUBLISHED / "pilot_small.csv"
    if not path.exists():
        pytest.skip("the published runs are not beside this checkout")
    found = minima(read_csv(path, {"tag": "grid"}))
    assert [round(m.params / 1e3) for m in found] == [41, 71, 113, 217, 309]
    assert [round(m.loss, 3) for m in found] == [4.217, 3.936, 3.641, 3.406, 3.240]
    assert all(m.bracketed for m in found)
    assert exponents(found).a == pytest.approx(0.489, abs=5e-4)
