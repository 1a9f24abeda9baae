"""The rate and vocabulary experiments run whole at toy size and write the table they promise."""

import csv

import pytest
from command import experiment
from test_stages_pretrain import story

from tinylm import files

TOYS = {
    "rate_rule": ("--rates", "0.002", "0.004", "--cells", "8", "2e8", "8", "4e8", "--V", "128",
                  "--results"),
    "vocab_size": ("--cells", "100", "8", "128", "8", "--flops", "2e8", "--csv"),
    "lr_by_width": ("--widths", "8", "16", "--seeds", "1", "--steps", "20", "--V", "128",
                    "--results"),
    "optimisers": ("--widths", "8", "--seeds", "1", "--steps", "20", "--V", "128",
                   "--rates", "0.002", "0.004", "0.008", "--results"),
    "trunks": ("--widths", "8", "--flops", "2e8", "3e8", "--V", "128", "--csv"),
    "kaplan_vs_chinchilla": ("--budgets", "5e8", "1e9", "2e9", "--widths", "8", "12", "16", "20",
                             "--per-budget", "4", "--spread", "8", "--V", "128", "--results"),
    "smeared_keys": ("--width", "8", "--flops", "2e8", "--seeds", "1", "--steps", "2", "--tasks",
                     "300", "--asked", "2", "--V", "128", "--results"),
    "bf16_loss": ("--shapes", "--widths", "8", "--seeds", "2", "--steps", "20", "--results"),
}
ROWS = {"rate_rule": 4, "vocab_size": 2, "lr_by_width": 10, "optimisers": 7, "trunks": 4,
        "kaplan_vs_chinchilla": 48, "smeared_keys": 2, "bf16_loss": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOYS))
def test_the_experiment_runs_at_toy_size_and_writes_its_table(tmp_path, name):
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(story(n, 80) for n in range(40)))
    place = tmp_path if "--results" in TOYS[name] else tmp_path / f"{name}.csv"
    done = experiment(name, "--out", tmp_path / "runs", "--corpus", text, *TOYS[name], place)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    assert len({(row.get("way"), row["id"]) for row in rows}) == len(rows) == ROWS[name]
    if name == "lr_by_width":
        assert files.read_json(tmp_path / "lr_by_width.json")["factor_smallest_to_largest"] >= 1
    if name == "rate_rule":
        found = files.read_json(tmp_path / "rate_rule.json")
        assert [c["at_edge"] for c in found["cells"]] == [True] * 2  # of two rates one is best
        assert all(c["cost_nats"] >= 0 for c in found["cells"]) and len(found["fitted"]["lr0"]) == 3
    if name == "kaplan_vs_chinchilla":
        found = files.read_json(tmp_path / "kaplan_vs_chinchilla.json")
        assert set(found["exponents"]) == {row["way"] for row in rows}
        warm = {row["way"]: {int(r["warmup_steps"]) for r in rows if r["way"] == row["way"]}
                for row in rows}
        assert warm["tuned"] == {0} and len(warm["fixed warmup"]) == 1 < max(warm["fixed warmup"])
    if name == "optimisers":
        found = files.read_json(tmp_path / "optimisers.json")["8"]
        assert {row["kind"] for row in rows} == {"adamw", "muon"} and found["seconds_ratio"] > 0


@pytest.mark.slow
def test_plain_pairs_differ_in_the_plan_alone(tmp_path):
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(story(n, 80) for n in range(40)))
    done = experiment("bf16_loss", "--out", tmp_path / "runs", "--corpus", text, "--shapes",
                      "--widths", "8", "--seeds", "2", "--steps", "20", "--kinds", "plain", "f32",
                      "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "f32_loss.csv").read_text().splitlines()))
    assert len(rows) == 4 and len({row["id"] for row in rows}) == 2
    found = files.read_json(tmp_path / "f32_loss.json")["D=8"]
    assert abs(found["mean_nats"]) < 0.02 and found["plain_nats"] > 0  # a spike parts a pair
    places = {kind: list((tmp_path / "runs" / f"runs-D=8-{kind}").glob("*/plan.json"))
              for kind in ("plain", "f32")}
    assert [len(found) for found in places.values()] == [2, 2]
    for plan in map(files.read_json, places["plain"]):
        assert not plan["native"] and not plan["onednn"]
