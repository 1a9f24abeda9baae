"""What the timing experiments say of two small models: every plan is timed, memory is audited."""

import csv

import pytest
from command import experiment

from tinylm import files


@pytest.mark.slow
def test_every_plan_of_a_width_is_timed_and_the_rule_is_held_against_the_best(tmp_path):
    done = experiment("plan_choice", "--widths", 8, "--V", 64, "--rounds", 1, "--seconds", 0.01,
                      "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "plan_choice.csv").read_text().splitlines()))
    found = files.read_json(tmp_path / "plan_choice.json")["widths"]["8"]
    rates = {row["plan"]: float(row["tokens_per_second"]) for row in rows}
    assert len(rates) == 4 and rates[found["best"]] == max(rates.values())
    assert found["lost_share"] == pytest.approx(1 - rates[found["rule"]] / max(rates.values()))


@pytest.mark.slow
def test_a_step_s_memory_does_not_grow_with_its_batch(tmp_path):
    done = experiment("cost_by_size", "--shapes", "32x1x64", "64x1x64", "--rounds", 1, "--seconds",
                      0.01, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    found = files.read_json(tmp_path / "cost_by_size.json")
    rows = list(csv.DictReader((tmp_path / "cost_by_size.csv").read_text().splitlines()))
    assert found["memory_growth"] < 0.2  # eight times the rows: their tokens are in it
    assert "<svg" in (tmp_path / "cost_by_size.svg").read_text()
    assert [(int(row["D"]), row["compute"]) for row in rows] == [
        (32, "f32"), (32, "bf16"), (64, "f32"), (64, "bf16")]
    assert all(0 < float(row["utilisation"]) < 2 for row in rows)
