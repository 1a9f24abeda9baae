"""Published tables, reproduced from the runs of ../shared; each has a sibling on planted runs."""

import time

import numpy as np
import pytest
from test_laws_fit import minimum, value

from tinylm.laws.fit import fit_law, resample
from tinylm.laws.forms import OverTraining, Surface
from tinylm.laws.runs import drop_worst, read_csv


@pytest.fixture(scope="module")
def chinchilla(shared):
    return read_csv(shared / "published-runs" / "chinchilla_epoch.csv")


@pytest.mark.parametrize("drop, estimator, want, objective, digits", [
    (5, "huber", (1.817218, 477.8259, 2143.417, 0.347310, 0.367172), 1.0182740178e-3, 1e-10),
    (5, "lad", (1.81686, 482.00572, 2085.43420, 0.34781, 0.36585), 1.1294947, 1e-7),
    (5, "ls", (1.88281, 567.81, 7581.9, 0.35762, 0.42762), 0.0832038, 1e-7),
    (0, "huber", (1.89134, 495.73, 12845.6, 0.34931, 0.45305), 1.82601e-3, 1e-8),
])
def test_every_row_of_the_chinchilla_table_is_reproduced(chinchilla, drop, estimator, want,
                                                         objective, digits):
    got = fit_law(drop_worst(chinchilla, drop), Surface, estimator)
    assert tuple(vars(got.law).values()) == pytest.approx(want, rel=2e-5)
    assert got.objective == pytest.approx(objective, abs=digits)
    assert got.certificate["agree_share"] == 1.0 and got.certificate["gradient_norm"] < 2e-5
    if estimator == "huber":
        assert minimum(got.problem, got.theta) >= got.objective * (1 - 1e-8)


def test_the_rounded_published_constants_lie_above_the_runs(chinchilla):
    law, runs = Surface(1.69, 406.4, 410.7, 0.34, 0.28), drop_worst(chinchilla, 5)
    above = law.loss(runs.params, runs.tokens) - runs.loss
    assert above.mean() == pytest.approx(0.0447, abs=5e-5)


def test_four_thousand_refits_give_the_published_errors_each_at_its_minimum(chinchilla):
    got = fit_law(drop_worst(chinchilla, 5), Surface)
    began = time.process_time()
    refits = resample(got, 4000)
    assert time.process_time() - began < 10
    spread, want = refits.std(axis=0), np.array([0.02566, 124.49, 1293.17, 0.01540, 0.02059])
    assert spread == pytest.approx(want, rel=1e-3)  # other seeds: sd(B) from 2% less to 12% more
    low, high = np.percentile(refits, [2.5, 97.5], axis=0)
    assert (low[3], high[3], low[4], high[4]) == pytest.approx((0.317, 0.373, 0.331, 0.415),
                                                               abs=6e-4)
    drawn = np.random.RandomState(42).randint(0, 240, (4000, 240))
    for i in np.random.default_rng(0).choice(4000, 50, replace=False):
        times = np.bincount(drawn[i], minlength=240).astype(float)
        problem = got.problem._replace(weights=times)
        least = minimum(problem, got.theta)
        assert value(refits[i], got, problem) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("params, tokens_per_param, error", [(1.44e9, 640, 0.7103),
                                                             (6.89e9, 20, 0.7320)])
def test_gadres_held_out_errors_are_those_published(shared, params, tokens_per_param, error):
    runs = read_csv(shared / "published-runs" / "gadre_c4val.csv", {"ds": "rpj"}, {"loss": "c4"})
    ratio = np.round(runs.tokens / runs.params)
    small = (runs.params < 5e8) & (ratio == 20) | (runs.params < 2e7) & (ratio == 320)
    law = fit_law(runs.keep(small), OverTraining, "ls").law
    (at,) = np.flatnonzero((ratio == tokens_per_param) & (abs(runs.params / params - 1) < 0.01))
    off = law.loss(runs.params[at], runs.tokens[at]) / runs.loss[at] - 1
    assert small.sum() == 5 and 100 * abs(off) == pytest.approx(error, abs=0.001)
