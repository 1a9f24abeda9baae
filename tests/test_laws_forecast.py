"""Forecasts: right on planted laws, honest in width, proved by content, kept for ever."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import backtest_forecasts
from tinylm import files
from tinylm.config import BadInput, to_json
from tinylm.laws import forecast, intervals
from tinylm.laws.forms import Surface
from tinylm.laws.runs import Runs

LAW = Surface(E=0.9, A=30.0, B=40.0, alpha=0.28, beta=0.30)
TARGET = 3.2e13
RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def study(noise=0.005, budgets=(1e11, 3.2e11, 1e12, 2.8e12, 6.4e12)) -> Runs:
    rows = []
    for flops in budgets:
        best = LAW.optimum(flops)[0]
        rows += [(n, flops / 6 / n, flops) for n in best * np.geomspace(1 / 3, 3, 7)]
    params, tokens, flops = np.array(rows).T
    bumps = noise * np.random.default_rng(1).standard_normal(len(rows))
    return Runs(params, tokens, flops, LAW.loss(params, tokens) + bumps)


def made(runs=None, size=1.0, **more) -> forecast.Forecast:
    runs = study() if runs is None else runs
    params = size * LAW.optimum(TARGET)[0]
    ids = [f"run{i}" for i in range(len(runs.loss))]
    more = {"eval_id": "eval", "resamples": 8, **more}
    return forecast.make(runs, ids, TARGET, params, TARGET / 6 / params, **more)


@pytest.fixture(scope="module")
def one() -> forecast.Forecast:
    return made()


def record(sha, loss=2.9, eval_id="eval"):
    return {"config": {"forecast_sha256": sha}, "loss": {"nats_per_token": loss},
            "eval_id": eval_id}


def test_a_planted_study_is_forecast_at_five_times_its_compute(one):
    truth = LAW.optimum(TARGET)[2]
    assert one.predicted == pytest.approx(truth, rel=0.01)
    assert one.low < truth < one.high
    assert set(one.laws) == {"frontier_floor", "power_law_last4", "surface_near"}
    assert one.predicted == pytest.approx(math.prod(one.laws.values()) ** (1 / 3))


def test_a_target_off_the_best_size_is_forecast_higher_as_the_truth_is(one):
    params = 2 * LAW.optimum(TARGET)[0]
    excess = LAW.loss(params, TARGET / 6 / params) - LAW.optimum(TARGET)[2]
    got = made(size=2.0).predicted - one.predicted
    assert got == pytest.approx(excess, rel=0.5) and excess > 0.02


def test_the_naive_line_passes_through_the_last_two_minima():
    found = forecast.bracketed(study())
    for m in found[-2:]:
        assert forecast.naive(found, m.flops) == pytest.approx(m.loss, rel=1e-6)


def test_the_same_runs_give_the_same_bytes_in_any_order(one, tmp_path):
    runs, order = study(), np.random.default_rng(3).permutation(35)
    assert [run for run, _ in one.runs] == sorted(f"run{i}" for i in range(35))
    assert forecast.write(tmp_path / "a.json", one) == forecast.write(tmp_path / "b.json", made())
    shuffled = forecast.make(runs.keep(order), [f"run{i}" for i in order], one.target_flops,
                             one.target_params, one.target_tokens, "eval", resamples=8)
    assert shuffled.runs == one.runs
    assert shuffled.predicted == pytest.approx(one.predicted, rel=1e-6)


def test_too_few_bracketed_budgets_are_refused_with_reasons():
    with pytest.raises(BadInput, match="2 budgets have a bracketed minimum, 3 are needed"):
        made(study(budgets=(1e11, 1e12)))
    runs = study()
    one_sided = runs.keep(np.arange(35) % 7 > 3)
    with pytest.raises(BadInput, match="below the smallest size|4 or more"):
        made(one_sided)
    for ids in (["same"] * 35, [f"run{i}" for i in range(34)]):
        with pytest.raises(BadInput, match="different ids for 35 runs"):
            forecast.make(runs, ids, TARGET, 1e6, 1e6, "eval")


def test_a_forecast_survives_the_file_and_is_never_overwritten(one, tmp_path):
    path = tmp_path / "f.json"
    sha = forecast.write(path, one)
    assert forecast.read(path) == one and files.sha256(path) == sha
    assert forecast.write(path, one) == sha
    with pytest.raises(BadInput, match="never overwritten"):
        forecast.write(path, dataclasses.replace(one, predicted=1.0))
    assert files.sha256(path) == sha


def test_a_newer_schema_is_refused(one, tmp_path):
    files.write_json(tmp_path / "f.json", {**dataclasses.asdict(one), "schema": 99})
    with pytest.raises(BadInput, match="schema 99"):
        forecast.read(tmp_path / "f.json")


def test_a_score_says_by_how_much_and_whether_inside(one, tmp_path):
    sha = forecast.write(tmp_path / "f.json", one)
    score = forecast.check(tmp_path / "f.json", record(sha, one.predicted / 1.02))
    assert score.error_percent == pytest.approx(2.0) and score.inside
    assert score.naive_error_percent == pytest.approx(100 * (1.02 * one.naive / one.predicted - 1))
    assert not forecast.check(tmp_path / "f.json", record(sha, one.high * 1.001)).inside


def test_a_forecast_edited_after_the_run_began_cannot_be_scored(one, tmp_path):
    path = tmp_path / "f.json"
    sha = forecast.write(path, one)
    path.write_text(path.read_text().replace('"target"', '"better"'))
    with pytest.raises(BadInput, match="was changed after it was written"):
        forecast.check(path, record(sha))
    files.write_json(path, to_json(dataclasses.replace(one, name="better")))
    with pytest.raises(BadInput, match="the run names forecast"):
        forecast.check(path, record(sha))


@pytest.mark.parametrize("change, words", [
    ({"eval_id": "other"}, "evaluated on other"),
    ({"config": {}}, "forecast_sha256"),
    ({"loss": {"nats_per_token": math.nan}}, "finished run"),
    ({"loss": None}, "the record lacks"),
])
def test_a_record_that_does_not_fit_the_forecast_is_refused(one, tmp_path, change, words):
    sha = forecast.write(tmp_path / "f.json", one)
    with pytest.raises(BadInput, match=words):
        forecast.check(tmp_path / "f.json", {**record(sha), **change})


def test_the_ledger_only_grows_and_holds_a_forecast_once(one, tmp_path):
    path, ledger = tmp_path / "f.json", tmp_path / "ledger.csv"
    score = forecast.check(path, record(forecast.write(path, one)))
    assert forecast.append_to_ledger(ledger, score)
    before = ledger.read_bytes()
    assert not forecast.append_to_ledger(ledger, score._replace(measured=1.0))
    assert ledger.read_bytes() == before
    assert forecast.append_to_ledger(ledger, score._replace(forecast_sha256="0" * 64))
    assert ledger.read_bytes().startswith(before) and len(ledger.read_text().splitlines()) == 3
    with pytest.raises(BadInput, match="give a forecast ledger"):
        forecast.append_to_ledger(path, score)


def test_no_interval_is_narrower_than_the_record_of_misses_allows(one):
    assert intervals.record_half_width(5.0) == pytest.approx(0.03)
    assert intervals.record_half_width(25.0) == pytest.approx(0.06)
    assert intervals.record_half_width(0.5) == 0.01
    assert one.high / one.predicted - 1 >= 0.03


def test_the_interval_joins_disagreement_resampling_and_noise():
    apart = {"a": 2.7, "b": 3.3}
    assert intervals.form_disagreement(apart) == pytest.approx(0.1)
    assert intervals.half_width(apart, 0.0, 0.0, 5.0) == pytest.approx(0.1)
    joined = math.sqrt(0.1**2 + (1.645 * 0.05) ** 2 + (1.645 * 0.02) ** 2)
    assert intervals.half_width(apart, 0.05, 0.02, 5.0) == pytest.approx(joined)


def test_the_bootstrap_follows_its_seed_and_the_noise():
    runs = study()

    def mean(noisy):
        return float(noisy.loss.mean())

    a, b = (intervals.bootstrap(runs, mean, 0.1, 400, seed) for seed in (0, 0))
    assert (a == b).all() and (a != intervals.bootstrap(runs, mean, 0.1, 400, 1)).any()
    assert a.std() == pytest.approx(0.1 / math.sqrt(35), rel=0.15)


def test_a_bootstrap_that_mostly_fails_is_refused():
    def fails(noisy):
        raise BadInput("no")

    with pytest.raises(BadInput, match="0 of 5 noisy copies"):
        intervals.bootstrap(study(), fails, 0.1, 5, 0)


def test_the_backtest_finds_small_errors_on_a_planted_study():
    budgets = tuple(np.geomspace(1e11, 1e13, 7))
    rows = backtest_forecasts.backtest("planted", study(0.0, budgets))
    assert [round(r.factor, 1) for r in rows] == [2.2, 4.6, 10.0, 2.2, 4.6, 2.2]
    assert max(abs(r.combined) for r in rows) < 1 and all(r.inside for r in rows)
    assert "combined" in backtest_forecasts.table(rows)
    assert len(backtest_forecasts.as_csv(rows).splitlines()) == 7


def test_the_recorded_backtests_show_the_joined_forecast_beating_each_law():
    lines = (RESULTS / "backtest_forecasts.csv").read_text().splitlines()
    names, *rows = (line.split(",") for line in lines)
    by_law = {}
    for law in backtest_forecasts.LAWS:
        studies = {}
        for row in rows:
            if row[0] != "pilot-held-out":
                studies.setdefault(row[0], []).append(abs(float(row[names.index(law)])))
        by_law[law] = np.mean([np.mean(errors) for errors in studies.values()])
    assert min(by_law, key=by_law.get) == "combined" and by_law["combined"] < 0.5


def test_a_sweep_without_minima_is_forecast_roughly_only_if_asked():
    flops = np.repeat([1e9, 2e9, 4e9], 2)
    runs = Runs(np.tile([1e3, 2e3], 3), flops / 6e3, flops, 20 * flops**-0.07)
    ids = [str(n) for n in range(6)]
    with pytest.raises(BadInput, match="0 budgets have a bracketed minimum"):
        forecast.make(runs, ids, 2e10, 3e3, 1e6, "e")
    rough = forecast.make(runs, ids, 2e10, 3e3, 1e6, "e", rough=True)
    np.testing.assert_allclose(rough.predicted, 20 * 2e10**-0.07, rtol=1e-6)
    assert "best run of each budget, since 0 budgets" in rough.rule
    assert rough.high / rough.predicted - 1 >= 0.06
