"""What the timing experiments say of two small models: every plan is timed, memory is audited."""

import csv
import math
from pathlib import Path
from unittest import mock

import pytest
from command import experiment, loaded
from test_stages_pretrain import story

from tinylm import bench, files
from tinylm.model.decoder import ModelConfig


@pytest.mark.slow
def test_every_plan_of_a_width_is_timed_and_the_rule_is_held_against_the_best(tmp_path):
    done = experiment("plan_choice", "--widths", 8, "--V", 64, "--rounds", 1, "--seconds", 0.01,
                      "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "plan_choice.csv").read_text().splitlines()))
    found = files.read_json(tmp_path / "plan_choice.json")["widths"]["8"]
    rates = {row["plan"]: float(row["tokens_per_second"]) for row in rows}
    assert len(rates) == 7 and rates[found["best"]] == max(rates.values())
    assert found["over_xla"] == pytest.approx(
        rates[found["rule"]] / max(rates["1 by XLA"], rates["2 by XLA"]))
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


@pytest.mark.slow
def test_training_is_timed_after_a_checkpoint_and_without_one(tmp_path):
    (tmp_path / "stories.txt").write_text("\n".join(story(n, 200) for n in range(40)))
    with mock.patch.dict(bench.SHAPES, toy=(ModelConfig(V=96, D=8, T=32), 2)):
        done = experiment("checkpoint_cost", "--out", tmp_path / "out", "--shapes", "toy",
                          "--corpus", tmp_path / "stories.txt", "--rounds", 2, "--block", 0.02,
                          "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    found = files.read_json(tmp_path / "checkpoint_cost.json")["shapes"]["toy"]
    low, high = found["interval_95"]
    assert low <= found["slowdown_percent"] <= high and len(found["seconds_a_save"]) == 2
    assert found["checkpoint_bytes"] > 1e4 and found["verified_bytes_per_second"] > 1e5


def test_the_held_out_run_is_varied_at_its_own_flops_and_size():
    with loaded("pilot_again") as own:
        held = own["read"](own["LAPTOP"] / "target/record.json")
        config = own["from_json"](own["PretrainConfig"], held["config"], "config")
        ways = own["choices"](config, held, own["Args"](Path("x")))
    assert list(ways) == ["seed 1", "1 layers", "4 layers", "batch 1024", "batch 2048"]
    for way in ways.values():
        assert way.flops == pytest.approx(held["flops"]["exact"], rel=2e-3)
        assert way.forecast_sha256 == "" and way != config
    assert ways["4 layers"].model.D < config.model.D < ways["1 layers"].model.D
    assert ways["batch 2048"].optim.lr == pytest.approx(2 * config.optim.lr)
    assert math.isclose(ways["seed 1"].tokens, config.tokens)
    grid = own["ladder"](config)
    assert len(grid) == 28 and (grid[-1].model.D, grid[-1].model.L, grid[-1].model.H) == (112, 4, 7)
    assert grid[-1].flops == pytest.approx(3.2e13, rel=1e-3)
