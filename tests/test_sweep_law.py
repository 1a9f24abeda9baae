"""The fit of a sweep's records says how its minima were counted and how far off they may be."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinylm.laws import forecast
from tinylm.look import progress
from tinylm.sweep import cells, law
from tinylm.verbs import again

SWEEP = Path(__file__).parents[1] / "experiments" / "results" / "laptop" / "sweep"


def test_the_recorded_sweep_is_fitted_with_its_bias_and_three_counts():
    records = [json.loads(p.read_text()) for p in sorted(SWEEP.glob("*/record.json"))]
    failed = {**records[0], "status": "failed", "loss": None}
    fitted = law.fit([failed, *records])
    counted = fitted["conventions"]
    assert counted["blocks+head exact"]["a"] == pytest.approx(fitted["exponents"]["a"], abs=1e-9)
    assert counted["blocks exact"]["a"] > counted["blocks 6nd"]["a"] > fitted["exponents"]["a"]
    assert len(fitted["bias"]["percent"]) == len(fitted["minima"])
    ranked = [row for row in fitted["comparison"]["laws"] if "refused" not in row]
    assert len(ranked) > 3 and ranked[0]["mean_percent"] <= ranked[-1]["mean_percent"] < 20
    said = progress.law(fitted)
    assert "the parabola misplaces the best size by up to +" in said
    assert (f"exponent by convention: blocks exact {counted['blocks exact']['a']:.3f}, blocks 6nd "
            f"{counted['blocks 6nd']['a']:.3f}") in said


@pytest.mark.parametrize("name", ["law", "forecast", "score"])
def test_the_recorded_study_is_made_again_from_its_runs(name):
    kept, made, _ = {"law": again._law, "forecast": again._forecast, "score": again._score}[name](
        SWEEP.parent / f"{name}.json", None)
    apart = again.differences(kept, made)
    far = {k: v for k, v in apart.items() if not k.endswith(".moved") and not (  # of tied starts
        all(isinstance(x, float) for x in v) and v[0] == pytest.approx(
            v[1], rel=1e-6, abs=1e-6 if k.endswith(".gradient_norm") else 1e-9))}
    assert not far, far


def test_a_wild_exponent_does_not_choose_a_wild_target():
    for a, used in ((0.5, 0.5), (1.4, 0.7), (-0.2, 0.35)):
        fitted = {"minima": [{"flops": 1e9}, {"flops": 1e10}],
                  "exponents": {"log_params": 2.0 - a * np.log(1e10), "a": a}}
        assert np.log(cells.best_params(fitted, 1e11)) == pytest.approx(2 + used * np.log(10))


def test_rates_best_at_an_edge_are_said_before_the_forecast():
    def tried(lr, loss, batch=8):
        return {"config": {"model": {"D": 16}, "steps": 800 // batch, "batch": batch,
                           "optim": {"lr": lr}}, "loss": {"nats_per_token": loss}}

    edge = law.tuning_verdict([tried(1e-3, 4.0), tried(2e-3, 3.9), tried(4e-3, 3.8)])
    warning = law.tuning_gate(edge)
    assert "0.004 of 0.001 to 0.004 at width 16" in warning
    assert law.tuning_gate(law.tuning_verdict(
        [tried(1e-3, 4.0), tried(2e-3, 3.8), tried(4e-3, 3.9)])) == ""
    by_seed = law.tuning_verdict([tried(1e-3, 3.9), tried(2e-3, 3.91), tried(4e-3, 4.0)])
    assert by_seed[0]["best"] == 1e-3 and not by_seed[0]["at_edge"]
    lost = law.tuning_verdict([{**tried(1e-3, 0), "loss": None}, {**tried(2e-3, 0), "loss": None},
                               tried(4e-3, 4.0)])
    assert lost[0]["at_edge"]
    both = law.tuning_verdict([tried(1e-3, 3.85), tried(2e-3, 3.9), tried(4e-3, 3.8)])
    assert not both[0]["at_edge"]  # no rate is worse than both its neighbours: seeds decided
    assert "no learning rates were compared" in law.tuning_gate([])
    grid = [tried(lr, 3.9 - 0.1 * (b == 8) + 0.1 * (lr != best), b)
            for b, best in ((8, 2e-3), (16, 4e-3), (33, 4e-3)) for lr in (1e-3, 2e-3, 4e-3)]
    assert [v["best"] for v in law.tuning_verdict(grid)] == [2e-3]  # the rates of the best batch
    said = law.tuning_gate(law.tuning_verdict(grid), law.batch_verdict(grid))
    assert said.startswith("the best batch lies at the edge of those tried (8 of 8 to 33 at width")
    grid += [tried(2e-3, 3.9, 4)]
    assert law.tuning_gate(law.tuning_verdict(grid), law.batch_verdict(grid)) == ""
    assert law.batch_verdict(grid[:3]) == []
    made = forecast.Forecast(2, "n", 1e9, 1.0, 1.0, 3.0, 2.9, 3.1, {}, {}, "", {}, "held 7 of 9",
                             warning, 3.0, (), "e")
    said = progress.forecast(made, "0" * 64).splitlines()
    assert said[0] == f"WARNING: {warning}" and said[-1] == "held 7 of 9"


def test_seeds_give_the_noise_and_branches_of_a_trunk_are_one_cluster():
    def ended(name, seed, loss, trunk=""):
        return {"id": name, "status": "ok", "kind": "pretrain", "loss": {"nats_per_token": loss},
                "config": {"lr": 1, "seed": seed, "parent": {"id": trunk} if trunk else None}}

    seeds = [ended("a", 0, 3.0), ended("b", 1, 3.1), {**ended("c", 2, 9.0), "status": "failed"}]
    assert law.noise(seeds) == pytest.approx(0.1 / 2**0.5)
    assert law.noise(seeds[:1]) == 0 and law.clusters(seeds) is None
    branches = [ended("a", 0, 3.0, "t"), ended("b", 0, 2.9, "t"), ended("c", 0, 2.8)]
    assert law.clusters(branches).tolist() == ["t", "t", "c"]


def test_the_best_rate_is_the_basins_bottom_and_stays_within_the_rates_given():
    rates = [4e-3, 1e-3, 8e-3, 2e-3, 1.6e-2, 3.2e-2]

    def basin(at):
        return [4 + 0.05 * np.log2(r / at) ** 2 + (1.0 if r > 3e-2 else 0.0) for r in rates]

    assert law.best_rate(rates, basin(5e-3)) == pytest.approx(5e-3)  # the spike is not among five
    assert law.best_rate(rates, basin(1e-5)) == 1e-3
    assert law.best_rate(rates, [-x for x in basin(5e-3)]) in rates  # bent down: the best given
    assert law.best_rate([2e-3, 1e-3], [4.0, 4.1]) == 2e-3
