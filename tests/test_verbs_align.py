"""The chain from a tuned run to reward model, policies and their table, by the command line."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from command import loaded, tinylm
from test_stages_pretrain import story

from tinylm import files
from tinylm.config import from_json
from tinylm.model.decoder import ModelConfig
from tinylm.stages.policy import Dials
from tinylm.sweep.presets import PRESETS
from tinylm.train.rollout import Rollout
from tinylm.verbs import models


def last(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def written(folder) -> list[str]:
    """Name what a folder holds beside the lock of who would write in it."""
    return sorted(p.name for p in folder.glob("*") if p.name != ".lease")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A base run, tuned on generated tasks, with rankings of two answers to forty questions."""
    folder = tmp_path_factory.mktemp("chain")
    text = folder / "stories.txt"
    text.write_text("\n".join(story(n, 40) for n in range(30)))
    last(tinylm("train", "--out", folder / "base", "--corpus", text, "--model.V", 128, "--model.D",
                16, "--model.T", 96, "--batch", 192, "--steps", 20, "--json"))
    last(tinylm("sft", folder / "base", "--out", folder / "sft", "--corpus", text, "--tasks", 300,
                "--replay", 0.25, "--steps", 20, "--rows", 8, "--probe-every", 8, "--json"))
    rows = [{"prompt": f"Say: {a}{b}", "chosen": a + b, "rejected": b + a}
            for a in "bdgklmnr" for b in "aeiou"]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_tuning_mixes_tasks_and_replays_base_text(chain):
    record = files.read_json(chain / "sft/record.json")
    assert record["config"]["replay"] == 0.25 and record["epochs"] > 0
    answers = record["answers_nats_per_token"]
    assert answers["after"] < answers["before"]
    looks = [row["step"] for row in files.read_lines(chain / "sft/metrics.jsonl")
             if "heldout/answers_nats_per_token" in row]
    assert looks == [16]  # the end of the chunk that holds steps 8 and 16


def test_rankings_make_a_reward_model_that_policies_are_tuned_against(chain):
    ranked = chain / "ranked.jsonl"
    told = last(tinylm("reward", chain / "sft", "--out", chain / "rm", "--data", ranked,
                       "--prompts", 4, "--json"))
    assert told["preferences"]["prompts"] == 4 and told["kind"] == "reward"
    asked = ("--reward", chain / "rm", "--family", "copy", "--count", 20, "--policy.rollouts", 2,
             "--policy.prompts", 2, "--policy.responses", 4, "--policy.budget", 8)
    for method in ("grpo", "ppo"):
        command = (method, chain / "sft", "--out", chain / method, *asked)
        found = last(tinylm(*command, "--json"))
        assert found["kind"] == method and found["config"]["judge"] == told["id"]
    said = re.search(r"sampling took ([\d.]+) s, learning ([\d.]+)", tinylm(*command).stdout)
    timing, = files.read_rows(chain / "ppo/timing.jsonl")
    assert [float(s) for s in said.groups()] == [
        round(timing[f"{kind}_seconds"], 1) for kind in ("sample", "compute")]
    best = last(tinylm("best-of-n", chain / "sft", "--reward", chain / "rm", "--family", "copy",
                       "--count", 4, "--samples", 4, "--n", 1, 4, "--budget", 8, "--json"))["rows"]
    assert [row["n"] for row in best] == [1, 4] and best[0]["kl_bound_nats"] == 0
    assert max(abs(row["proxy"]) for row in best) < 50  # what ranks the unended last is no score
    table = last(tinylm("eval", chain / "sft", "--tasks", 11, "--budget", 8, "--reward",
                        chain / "rm", "--best-of", 3, "--json"))
    one, chosen = table["runs"].values()
    assert table["reward"]["accuracy"] == told["preferences"]["accuracy"]
    assert chosen["kl_nats"] == pytest.approx(math.log(3) - 2 / 3) and one["kl_nats"] == 0
    assert chosen["entropy_nats"] is None and one["entropy_nats"] > 0
    assert chosen["stops"]["rate"] > one["stops"]["rate"]  # of three samples one ends sooner
    again = tinylm("grpo", chain / "sft", "--out", chain / "grpo", "--reward", chain / "rm",
                   "--family", "copy", "--count", 20, "--policy.rollouts", 3, "--policy.prompts", 2,
                   "--policy.responses", 4, "--policy.budget", 8)
    assert again.returncode == 2 and "rollouts=2" in again.stderr
    assert tinylm("verify", chain).returncode == 0
    mute = tinylm("chat", chain / "rm", "--prompt", "hi")
    assert mute.returncode == 2 and "is a reward model and says nothing" in mute.stderr


def test_reward_models_judge_together_by_their_mean_or_the_least(chain):
    for seed in (1, 2):
        last(tinylm("reward", chain / "sft", "--out", chain / f"rm{seed}", "--data",
                    chain / "ranked.jsonl", "--prompts", 4, "--steps", 4, "--seed", seed, "--json"))
    both = ("--reward", chain / "rm1", chain / "rm2")
    asked = ("--family", "copy", "--count", 20, "--policy.rollouts", 1, "--policy.prompts", 2,
             "--policy.responses", 4, "--policy.budget", 8)
    found = last(tinylm("grpo", chain / "sft", "--out", chain / "least", *both, "--ensemble",
                        "least", *asked, "--json"))
    ids = [files.read_json(chain / f"rm{n}/record.json")["id"] for n in (1, 2)]
    assert found["config"]["judge"] == f"least of {' '.join(ids)}"
    other = tinylm("grpo", chain / "sft", "--out", chain / "least", *both, *asked)
    assert other.returncode == 2 and "config.judge" in other.stderr
    record = files.read_json(chain / "sft/record.json")
    model = from_json(ModelConfig, record["config"]["model"], "model")
    _, _, learnt = models.opened(chain / "sft", None)
    rng = np.random.default_rng(0)
    rolled = Rollout(rng.integers(8, 128, (5, 30)).astype(np.int32), np.ones((5, 29), np.float32),
                     np.ones(5, np.float32), np.zeros(5, np.float32))
    places = (chain / "rm1", chain / "rm2")
    each = np.array([models.judge(one, model, learnt, None)[0](rolled, np.arange(5))
                     for one in places])
    for how, joined in (("mean", each.mean(0)), ("least", each.min(0))):
        judge, _ = models.ensemble(places, how, model, learnt, None)
        np.testing.assert_allclose(judge(rolled, np.arange(5)), joined, atol=1e-6)
    assert np.abs(each[0] - each[1]).max() > 1e-3
    best = ("best-of-n", chain / "sft", "--family", "copy", "--count", 4, "--samples", 2, "--n", 1)
    assert tinylm(*best, *both, "--budget", 40).returncode == 0
    for given, words in ((("--reward", chain / "rm1", chain / "rm1"), "twice; name each once"),
                         (("--reward", chain / "rm1", "--ensemble", "least"), "names 1; name"),
                         (("--ensemble", "least"), "names 0; name more")):
        done = tinylm(*best, *given)
        assert done.returncode == 2 and words in done.stderr


def test_bad_lines_are_refused_or_put_aside_with_their_reasons(chain):
    torn = chain / "torn.jsonl"
    torn.write_text((chain / "ranked.jsonl").read_text() + '{"prompt": "a"}\n{"torn": \n')
    refused = tinylm("dpo", chain / "sft", "--out", chain / "torn", "--data", torn, "--pairs", 4)
    assert refused.returncode == 2 and "torn.jsonl:41 has the fields prompt" in refused.stderr
    assert not (chain / "torn").exists()
    for verb in ("dpo", "reward"):
        done = tinylm(verb, chain / "sft", "--out", chain / f"torn-{verb}", "--data", torn,
                      "--steps", 1, "--skip-bad-lines", *(
                          ("--pairs", 4) if verb == "dpo" else ("--prompts", 4)))
        assert done.returncode == 0 and "2 bad lines of 42 left out" in done.stderr
        rows = files.read_lines(chain / f"torn-{verb}/quarantine.jsonl")
        assert [row["where"].split(":")[-1] for row in rows] == ["41", "42"]
        assert "is not JSON" in rows[1]["reason"] and rows[1]["line"] == '{"torn": '
    for out, more in ((chain / "new", ()), (chain / "torn-dpo", ("--seed", 1))):
        before = sorted(p.name for p in out.iterdir()) if more else None
        late = tinylm("dpo", chain / "sft", "--out", out, "--data", torn, "--pairs", 4, "--steps",
                      1, "--skip-bad-lines", *(more or ("--heldout", 5)))
        assert late.returncode == 2 and late.stderr.count("error: ") == 1
        assert (sorted(p.name for p in out.iterdir()) if out.exists() else None) == before
    (chain / "mine").mkdir()
    (chain / "mine/quarantine.jsonl").write_text("mine")
    mine = tinylm("dpo", chain / "sft", "--out", chain / "mine", "--data", torn, "--pairs", 4,
                  "--steps", 1, "--skip-bad-lines")
    assert mine.returncode == 2 and "holds other lines" in mine.stderr
    assert [p.read_text() for p in (chain / "mine").iterdir()] == ["mine"]
    torn.write_text('{"torn": \n')
    none = tinylm("sft", chain / "base", "--out", chain / "new", "--data", torn, "--skip-bad-lines")
    assert none.returncode == 2 and "all 1 lines are bad" in none.stderr
    assert not (chain / "new").exists()


def test_a_parent_to_start_from_is_looked_at_before_anything_is_written(chain):
    lost = chain / "lost"
    shutil.copytree(chain / "sft", lost)
    record = files.read_json(lost / "record.json")
    files.write_json(lost / "record.json", {**record, "status": "diverged", "loss": None})
    ranked = ("--data", chain / "ranked.jsonl", "--steps", 1)
    for verb, given in (("sft", ("--tasks", 100)), ("dpo", ranked), ("reward", ranked),
                        ("grpo", ("--family", "copy", "--count", 20, "--policy.budget", 8))):
        done = tinylm(verb, lost, "--out", chain / "after", *given)
        assert done.returncode == 2 and "ended as diverged; train" in done.stderr
        assert done.stderr.count("error: ") == 1 and not written(chain / "after")


def test_tasks_that_do_not_fit_are_counted_and_named(chain):
    best = ("best-of-n", chain / "sft", "--count", 6, "--samples", 2, "--n", 1)
    told = tinylm(*best, "--family", "copy", "recall", "--budget", 40)
    assert "6 of 12 tasks left out: no room for 40 tokens in T=96 (6 recall)" in told.stderr
    assert "left out" not in tinylm(*best, "--family", "copy", "--budget", 8).stderr
    none = tinylm(*best, "--family", "sentence", "--budget", 1)
    assert none.returncode == 2 and "none of 12 responses ended within 1 tokens" in none.stderr
    (chain / "one.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, '
                                     '{"role": "assistant", "content": "b"}]}\n')
    one = ("sft", chain / "base", "--out", chain / "one", "--data", chain / "one.jsonl")
    alone = tinylm(*one)
    assert alone.returncode == 2 and "0 training and 1 held-out rows" in alone.stderr
    assert "bring two or more" in alone.stderr and not written(chain / "one")
    last(tinylm("train", "--out", chain / "narrow", "--corpus", chain / "stories.txt", "--model.V",
                128, "--model.D", 16, "--model.T", 32, "--batch", 64, "--steps", 1, "--json"))
    told = tinylm("sft", chain / "narrow", "--out", chain / "tuned", "--corpus",
                  chain / "stories.txt", "--tasks", 50, "--steps", 1)
    assert "of the conversations and tasks left out: longer than T=32 tokens" in told.stderr


def test_what_is_for_sampled_responses_is_refused_beside_rankings(chain):
    for flag, value in (("family", "copy"), ("responses", 8), ("sharpness", 1), ("budget", 4)):
        done = tinylm("reward", chain / "sft", "--out", chain / "no", "--data",
                      chain / "ranked.jsonl", f"--{flag}", value)
        assert done.returncode == 2 and f"--{flag} is for --sampled responses" in done.stderr


def test_dpo_and_a_table_of_runs_of_one_lineage(chain):
    last(tinylm("dpo", chain / "sft", "--out", chain / "dpo", "--data", chain / "ranked.jsonl",
                "--pairs", 4, "--json"))
    table = last(tinylm("eval", chain / "sft", "--also", chain / "dpo", chain / "base", "--tasks",
                        11, "--budget", 8, "--json"))["runs"]
    sft, dpo, base = table.values()
    mine = chain / "ranked.jsonl"
    for place in (mine, chain / "base/record.json"):
        before = place.read_bytes()
        done = tinylm("eval", chain / "sft", "--tasks", 2, "--budget", 8, "--out", place)
        assert done.returncode == 2 and "holds something else" in done.stderr
        assert place.read_bytes() == before
    few = last(tinylm("eval", chain / "sft", "--tasks", 2, "--budget", 40, "--json"))["runs"]
    (few,) = few.values()
    assert "recall" not in few["exact"]  # none fits: not a rate of nothing
    assert few["macro"] == pytest.approx(np.mean([r["rate"] for r in few["exact"].values()]))
    told = files.read_json(chain / "base/record.json")["loss"]["bits_per_byte"]
    assert base["bits_per_byte"] == told == pytest.approx(
        last(tinylm("eval", chain / "base", "--json"))["bits_per_byte"], rel=1e-6)
    assert sft["kl_nats"] == 0 < dpo["kl_nats"] and sft["wins"]["rate"] == 0.5
    assert sft["tasks"] + sft["too_long"] == 11 * 11 + 3 * 11 and base["bits_per_byte"] > 0
    shown = tinylm("eval", chain / "sft", "--also", chain / "dpo", "--tasks", 2, "--budget", 8)
    assert "exact (macro)" in shown.stdout and "  recall" in shown.stdout


def test_runs_of_another_text_or_a_shorter_judge_are_refused(chain):
    text = chain / "others.txt"
    text.write_text("\n".join(story(n, 40) for n in range(40, 70)))
    for name, T in (("other", 96), ("short", 48)):
        source = ("--text", chain / "base/text") if T == 48 else ("--corpus", text)
        last(tinylm("train", "--out", chain / name, *source, "--model.V", 128, "--model.D", 16,
                    "--model.T", T, "--batch", 192, "--steps", 2, "--json"))
    done = tinylm("eval", chain / "sft", "--also", chain / "other", "--tasks", 2)
    assert done.returncode == 2 and "has another model, tokenizer or text" in done.stderr
    last(tinylm("reward", chain / "short", "--out", chain / "shortrm", "--data",
                chain / "ranked.jsonl", "--prompts", 4, "--steps", 1, "--json"))
    done = tinylm("grpo", chain / "sft", "--out", chain / "new", "--reward", chain / "shortrm")
    assert done.returncode == 2 and "reads T=48 tokens" in done.stderr
    done = tinylm("dpo", chain / "shortrm", "--out", chain / "new", "--data", "ranked.jsonl")
    assert done.returncode == 2 and "says nothing" in done.stderr
    assert not (chain / "new").exists()


@pytest.mark.parametrize(("words", "command"), [
    ("give a folder of tinylm reward", ("best-of-n", "sft", "--reward", "sft")),
    ("either --data with rankings or --sampled", ("reward", "sft", "--out", "new")),
    ("say how many --tasks", ("eval", "sft", "--also", "base")),
    ("say how many --tasks", ("eval", "sft", "--reward", "base")),
    ("--sentences 9 is for the table", ("eval", "sft", "--sentences", 9)),
    ("nothing to choose by", ("eval", "sft", "--tasks", 2, "--best-of", 2)),
    ("no sentence task, by which runs are compared, fits T=96 beside answers of 50",
     ("eval", "sft", "--tasks", 2, "--budget", 50)),
    ("give a folder of tinylm reward", ("eval", "sft", "--tasks", 2, "--reward", "base")),
    ("either --data with rankings or --sampled", ("dpo", "sft", "--out", "new")),
    ("responses=1 is", ("dpo", "sft", "--out", "new", "--sampled", 3, "--responses", 1)),
    ("family 'poem' is unknown", ("grpo", "sft", "--out", "new", "--family", "poem")),
    ("no task fits T=96", ("grpo", "sft", "--out", "new", "--policy.budget", 96)),
    ("beta=nan", ("grpo", "sft", "--out", "new", "--policy.beta", "nan")),
    ("n=9 is", ("best-of-n", "sft", "--n", 9, "--samples", 4)),
    ("budget=0 is", ("best-of-n", "sft", "--budget", 0)),
    ("seed=-1 is", ("best-of-n", "sft", "--seed", -1)),
    ("--n names no number", ("best-of-n", "sft", "--n")),
    ("count=0 is", ("grpo", "sft", "--out", "new", "--count", 0)),
    ("count=100000000 is", ("best-of-n", "sft", "--count", 100000000)),
    ("--family names none", ("grpo", "sft", "--out", "new", "--family")),
    ("prompts=0 is", ("reward", "sft", "--out", "new", "--sampled", 3, "--prompts", 0)),
    ("budget=0 is", ("reward", "sft", "--out", "new", "--sampled", 3, "--budget", 0)),
    ("seed=-1 is", ("reward", "sft", "--out", "new", "--sampled", 3, "--seed", -1)),
    ("pairs=0 is", ("dpo", "sft", "--out", "new", "--data", "ranked.jsonl", "--pairs", 0)),
    ("tasks=-5 is", ("sft", "base", "--out", "new", "--tasks", -5)),
    ("both hold conversations", ("sft", "base", "--out", "new", "--data", "ranked.jsonl",
                                 "--corpus", "ranked.jsonl")),
    ("none.jsonl judge one run", ("eval", "sft", "--pairs", "none.jsonl", "--tasks", 2)),
    ("cannot be read", ("eval", "sft", "--pairs", "none.zip")),
    ("is for the table", ("eval", "sft", "--out", "new")),
    ("knows no system prompt", ("chat", "base", "--system", "be nice", "--prompt", "hi")),
    ("was begun with kind='sft'", ("dpo", "base", "--out", "sft", "--data", "ranked.jsonl",
                                   "--pairs", 4)),
    ("no such file", ("dpo", "sft", "--out", "new", "--data", "none.jsonl"))])
def test_mistakes_are_one_line_and_write_nothing(chain, words, command):
    places = ("sft", "base", "new", "none.jsonl", "ranked.jsonl")
    done = tinylm(command[0], *(chain / c if c in places else c for c in command[1:]))
    assert done.returncode == 2 and words in done.stderr.lower() + done.stderr, done.stderr
    assert done.stderr.strip().count("\n") <= 1 and not (chain / "new").exists()


def test_a_study_is_aligned_once_and_one_that_cannot_be_goes_on(chain):
    folder = chain / "study"
    for name, source in (("target", "base"), ("chat", "sft"), ("base/text", "base/text")):
        shutil.copytree(chain / source, folder / name)
    toy = dataclasses.replace(PRESETS["smoke"], ranked=12, asked=2, policy=Dials(
        rollouts=2, prompts=2, responses=4, budget=8))
    with loaded("study") as study, contextlib.redirect_stderr(io.StringIO()) as said:
        study["align"](folder, dataclasses.replace(toy, family="poem"))
        assert "no further" in said.getvalue() and not (folder / "reward").exists()
        study["align"](folder, toy)
        assert said.getvalue().count("no further") == 1
        before = {p: p.read_bytes() for p in folder.rglob("*.json")}
        study["align"](folder, toy)
    assert {p: p.read_bytes() for p in folder.rglob("*.json")} == before
    policy = files.read_json(folder / "policy/record.json")
    assert policy["config"]["judge"] == files.read_json(folder / "reward/record.json")["id"]
    assert list(files.read_json(folder / "alignment.json")["runs"]) == ["chat", "target", "policy"]
