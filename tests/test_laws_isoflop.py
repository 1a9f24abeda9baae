"""Minima at equal compute: exact on parabolas, biased as known on surfaces, refused in words."""

import math

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.laws import isoflop
from tinylm.laws.accounting import Parameters
from tinylm.laws.forms import Surface
from tinylm.laws.isoflop import bias, conventions, exponents, minima
from tinylm.laws.runs import Runs, read_csv

CHINCHILLA = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
LOPSIDED = Surface(E=1.69, A=406.4, B=410.7, alpha=0.465, beta=0.155)


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
    assert np.mean(off) == pytest.approx(percent, abs=0.1 if percent > -10 else 0.5)


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


def test_the_pilots_table_of_minima_is_reproduced(shared):
    found = minima(read_csv(shared / "published-runs" / "pilot_small.csv", {"tag": "grid"}))
    assert [round(m.params / 1e3) for m in found] == [41, 71, 113, 217, 309]
    assert [round(m.loss, 3) for m in found] == [4.217, 3.936, 3.641, 3.406, 3.240]
    assert all(m.bracketed for m in found)
    assert exponents(found).a == pytest.approx(0.489, abs=5e-4)


@pytest.mark.parametrize("law", [CHINCHILLA, LOPSIDED])
def test_the_bias_is_estimated_without_knowing_the_law(law):
    runs = grid(8, law)
    known = [m.tokens / law.optimum(m.flops)[1] - 1 for m in minima(runs)]
    noise = 0.002 * np.random.default_rng(0).standard_normal(75)
    told = bias(runs._replace(loss=runs.loss * (1 + noise)))
    assert [b.tokens_percent for b in told] == pytest.approx([100 * k for k in known], rel=0.15)
    assert [b.flops for b in told] == pytest.approx(np.geomspace(1e17, 1e21, 5))
    assert all(b.params_percent > 0 > b.tokens_percent for b in told)
    assert bias(runs)[0].loss_percent == pytest.approx(
        100 * (minima(runs)[0].loss / law.optimum(1e17)[2] - 1), rel=1e-3)


def test_exponents_follow_the_convention_of_counting():
    runs = grid(4)
    head = 2000 * runs.params**0.5
    counts = [Parameters(int(h), int(h), int(n - h))
              for n, h in zip(runs.params, head, strict=True)]
    got = conventions(runs, counts)
    a = exponents(minima(runs)).a
    assert len(got) == 6 and got["blocks+head exact"].a == pytest.approx(a, abs=1e-4)
    assert got["blocks+head 6nd"].a == pytest.approx(a, abs=1e-3)
    best = np.array([m.params for m in minima(runs)])
    for name, counted in (("blocks", best - 2000 * best**0.5), ("all", best + 2000 * best**0.5)):
        slope, _ = np.polyfit(np.log(np.geomspace(1e17, 1e21, 5)), np.log(counted), 1)
        assert got[f"{name} exact"].a == pytest.approx(slope, abs=1e-3)
        flops = 6 * counted * np.array([m.tokens for m in minima(runs)])
        slope, _ = np.polyfit(np.log(flops), np.log(counted), 1)
        assert got[f"{name} 6nd"].a == pytest.approx(slope, abs=1e-3)
    assert got["blocks exact"].a > got["blocks 6nd"].a + 0.01 > a > got["all exact"].a


@pytest.mark.parametrize("weighted", [False, True])
def test_pulls_say_how_far_each_run_moves_each_bottom(weighted):
    runs = grid(3.0)
    if weighted:
        runs = runs._replace(sigma=0.01 * np.random.default_rng(0).uniform(1, 3, 75))
    found = minima(runs)[1:]  # of some budgets only
    got = isoflop.pulls(runs, found)
    assert got.sum(axis=1) == pytest.approx(1) and (got[:, :15] == 0).all()
    for run in (17, 22, 61):
        step = np.zeros(75)
        step[run] = 1e-6
        moved = minima(runs._replace(loss=runs.loss + step))[1:]
        hand = [(a.loss - b.loss) / 1e-6 for a, b in zip(moved, found, strict=True)]
        assert got[:, run] == pytest.approx(hand, abs=2e-3)
