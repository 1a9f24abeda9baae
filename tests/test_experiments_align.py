"""Over-optimisation: what is reported as such, what the laws recover, and a toy study whole."""

import csv
import json
import subprocess
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from command import ROOT, experiment, tinylm
from test_stages_pretrain import story

from tinylm import files, machine


@pytest.fixture(scope="module")
def found():
    with mock.patch.object(machine, "pin"), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments"))
        import overoptimisation
        return overoptimisation


def test_a_proxy_that_is_the_gold_is_not_over_optimised_and_one_that_is_wrong_far_out_is(found):
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(64, 256)).astype(np.float32)
    beyond = np.where(gold > 1.5, 3.0 - gold, gold)  # right in the bulk, upside down beyond
    for proxy, true, over in ((gold, gold, False), (2 * gold + 1, gold, False),
                              (gold, beyond, True)):
        golds = np.stack([np.asarray(found.best_of_n(jnp.asarray(proxy), jnp.asarray(true), n))
                          for n in found.NS])
        drop, low = found.falls(golds)
        assert (low > 0) == over, (drop, low)
        assert over or drop == 0


def test_a_policy_that_loses_gold_is_said_to_and_one_that_only_wavers_is_not(found):
    rng = np.random.default_rng(1)
    rise = np.concatenate([np.linspace(0, 1, 15), np.full(15, 1.0)])
    for late, over in ((0.0, False), (0.6, True)):
        gold = rise - np.linspace(0, late, 30)
        table = [(1000, 64, seed, 0.8, 0.9, turn, turn / 10, gold[turn] + rng.normal(0, 0.05), 0.0,
                  0.0, 0.0) for seed in range(3) for turn in range(30)]
        said, = found.lost(table, "grpo")
        assert said["over"] == over, said
    best = [(1000, 64, seed, 0.8, 0.9, n, 0.1, 0.0, 0.0, 0.3, low)
            for seed, low in enumerate((0.1, 0.2, -0.1)) for n in (1, 2)]
    assert found.lost(best, "best_of_n")[0]["over"]
    assert not found.lost([(*row[:10], -0.1) for row in best], "best_of_n")[0]["over"]


def test_reward_models_train_on_as_many_prompts_as_is_said_and_never_on_those_that_judge(found):
    of = np.arange(4096)[:, None]
    rankings = found.pool.Pool(of, of, of, of, of)
    trained, judging = zip(*(found.drawn(rankings, 2048, seed) for seed in range(3)), strict=True)
    assert [len(set(some.gold.flat)) for some in trained] == [2048] * 3
    assert set(trained[0].gold.flat) != set(trained[1].gold.flat)
    for some, rest in zip(trained, judging, strict=True):
        assert set(rest.gold.flat) == set(range(3584, 4096))
        assert not set(some.gold.flat) & set(rest.gold.flat)


@pytest.mark.parametrize("law", ["d (a - b d)", "d (a - b ln d)"])
def test_the_laws_recover_what_was_planted_and_forecast_the_larger_model(found, law, tmp_path):
    table = []
    for params in (1000, 4000, 16000):
        for seed in (0, 1):
            a, b = 1.0 + 0.1 * np.log(params), 0.6 - 0.03 * np.log(params)
            for n in found.NS:
                kl = np.log(n) - (n - 1) / n
                d = np.array([np.sqrt(kl)])
                gold = float((found.LAWS[law](d) @ (a, b))[0]) if n > 1 else 0.0
                table.append((params, 64, seed, 0.8, 0.9, n, kl, gold, 0.0, 0.0, 0.0))
    fits = [f for f in found.fitted(table) if f["law"] == law]
    assert all(f["rms"] < 1e-6 for f in fits)
    args = found.Args(tmp_path, (), tmp_path, pairs=(64,))
    said = found.forecast(args, table[: 2 * 2 * len(found.NS)], 16000)
    assert said["law"] == law
    assert said["peaks"][0]["a"] == pytest.approx(1.0 + 0.1 * np.log(16000), abs=1e-5)
    assert said["peaks"][0]["gold_peak"] == pytest.approx(
        max(row[7] for row in table if row[0] == 16000), abs=1e-5)


@pytest.mark.slow
def test_a_toy_study_of_over_optimisation_writes_its_forecast_first(tmp_path):
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(story(n, 40) for n in range(30)))
    for width in (8, 12, 16):
        made = tinylm("train", "--out", tmp_path / f"d{width}", *(
            ("--corpus", text) if width == 8 else ("--text", tmp_path / "d8/text")),
            "--model.V", 128, "--model.D", width, "--model.T", 96, "--batch", 192, "--steps", 10)
        assert made.returncode == 0, made.stderr
    done = experiment("overoptimisation", "--sft", tmp_path / "d16", "--trunks", tmp_path / "d8",
                      tmp_path / "d12", tmp_path / "d16", "--out", tmp_path / "out", "--pairs", 8,
                      16, "--seeds", 2, "--prompts", 4, "--samples", 8, "--budget", 8, "--rollouts",
                      2, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "overoptimisation.json").read_text())
    first = files.read_json(tmp_path / "out/forecast.json")
    for way in ("best_of_n", "grpo"):
        assert said[way]["forecast"]["peaks"] == first[way]["peaks"]
        assert len(said[way]["outcome"]) == 2 and len(said[way]["lost"]) == 3 * 2
    rows = list(csv.DictReader((tmp_path / "overoptimisation.csv").read_text().splitlines()))
    assert len(rows) == 3 * 2 * 2 * (4 + 2)
    assert "best_of_n, 16 pairs" in (tmp_path / "overoptimisation.svg").read_text()


@pytest.mark.slow
def test_a_toy_study_of_the_bands_fixes_what_is_asked_before_it_trains(tmp_path):
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(story(n, 40) for n in range(30)))
    done = experiment("alignment_bands", "--out", tmp_path / "out", "--corpus", text, "--widths", 8,
                      "--flops", 5e8, "--V", 128, "--tasks", 300, "--steps", 20,
                      "--ranked", 40, "--rollouts", 2, "--asked", 11, "--sentences", 13,
                      "--best-of", 2, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "alignment_bands.csv").read_text().splitlines()))
    assert len(rows) == 7 and {r["width"] for r in rows} == {"8"}
    told = json.loads((tmp_path / "alignment_bands.json").read_text())
    assert told["id"] == files.read_json(tmp_path / "out/suite.json")["id"]
    assert all(size["reward"]["ceiling"] >= 0.5 for size in told["sizes"].values())


def test_the_experiment_pins_its_process_before_jax_is_there():
    """In a process of its own: the others run inside one that has JAX already."""
    script = ROOT / "experiments/overoptimisation.py"
    asked = ("--sft", "gone", "--trunks", "gone", "--out", "gone")
    done = subprocess.run([sys.executable, script, *asked], check=False, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "name 3 or more" in done.stderr, done.stderr
