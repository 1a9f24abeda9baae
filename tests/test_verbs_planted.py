"""Verbs on planted records and patched models: what they print, write and refuse, untrained."""

import io
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command import experiment, tinylm
from rich.console import Console

from tinylm import files
from tinylm.config import identity, to_json
from tinylm.evaluate import samples
from tinylm.laws.plan import centre
from tinylm.look import progress
from tinylm.model import generate
from tinylm.model.decoder import ModelConfig
from tinylm.stages import pretrain
from tinylm.stages import sft as tuning
from tinylm.sweep import cells
from tinylm.sweep.presets import RateRule
from tinylm.sweep.trunks import shared
from tinylm.train import checkpoint
from tinylm.train.optim import OptimConfig
from tinylm.verbs import folders, models, plans

RULE = RateRule(5e-3, 1e5, 0.3)
OPTIM = OptimConfig(kind="muon", beta2=0.95, warmup_steps=20, weight_decay=0.1)
LADDER = cells.ladder(ModelConfig(V=128, T=32, L=3, H=1, tied=False, rope_theta=1e3),
                      range(8, 200, 4))
GRID = [cells.config(c, LADDER, OPTIM, RULE, 256, "d", 7)
        for c in cells.grid(LADDER, (1e11, 3.2e11, 1e12), 7, 3.0, 256)]


def record(config: pretrain.PretrainConfig) -> dict:
    size = pretrain.counts(config.model)
    off = math.log((size["head"] + size["blocks"]) / centre(config.flops))
    loss = 20 * config.flops**-0.07 + 0.1 * off**2
    return {"schema": 1, "id": identity(config), "kind": config.kind, "status": "ok",
            "config": to_json(config), "params": size, "tokens": config.tokens, "code_id": "c",
            "eval_id": "e", "loss": {"nats_per_token": loss, "bits_per_byte": loss},
            "flops": {"exact": config.flops}}


@pytest.fixture(scope="module")
def forecast(tmp_path_factory):
    """A planted sweep's folder and what `tinylm forecast` said of it."""
    folder = tmp_path_factory.mktemp("planted")
    for config in GRID:
        place = folder / "sweep/runs" / cells.name(config)
        files.write_json(place / "record.json", record(config))
        files.write_json(place / "environment.json", {"text": "../../text"})
    done = tinylm("forecast", folder / "sweep", "--flops", 5e12, "--out", folder / "f.json",
                  "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_the_line_that_forecast_prints_trains_what_the_sweep_s_law_is_about(forecast, monkeypatch):
    folder, told = forecast
    words, seen = shlex.split(told["train"]), {}

    def prepared(place, *_, **__):
        seen["text"] = place
        return SimpleNamespace(id="d"), None

    def trained(out, config, *_):
        seen["config"] = config
        return {**record(config), "tokens": 0, "loss": None}

    monkeypatch.setattr(folders, "prepared", prepared)
    monkeypatch.setattr(pretrain, "pretrain", trained)
    assert tinylm(*words[1:]).returncode == 0
    assert seen["text"].resolve() == (folder / "sweep/text").resolve()
    config = seen["config"]
    assert (config.model.D, config.steps) == (told["D"], told["steps"])
    assert config.optim.lr == pytest.approx(RULE(config.tokens), rel=1e-5)
    like = GRID[0]
    assert config == replace(
        like, model=replace(like.model, D=told["D"]), steps=told["steps"],
        optim=replace(like.optim, lr=config.optim.lr), forecast_sha256=told["sha256"])


def test_the_rule_of_trunks_is_read_and_their_warmup_is_not_the_target_s():
    swept = [c for c in shared([replace(c, optim=replace(c.optim, warmup_steps=0)) for c in GRID],
                               RULE) if c.kind != "trunk"]
    assert any(c.kind == "branch" for c in swept)
    rule = plans.rate_rule(swept)
    for tokens in (1e5, 1e7):
        assert rule(tokens) == pytest.approx(RULE(tokens), rel=1e-6)
    target = plans.lone([c for c in swept if c.kind == "branch"], LADDER[3], 999, 256)
    assert (target.kind, target.optim.warmup_steps, target.optim.kind) == ("pretrain", 0, "muon")


def test_check_appends_once_to_a_ledger_beside_the_forecast_or_to_the_one_named(forecast, tmp_path):
    folder, told = forecast
    target = replace(GRID[0], model=replace(GRID[0].model, D=told["D"]), steps=told["steps"],
                     forecast_sha256=told["sha256"])
    files.write_json(folder / "target/record.json", record(target))
    said = [tinylm("check", folder / "f.json", folder / "target", *more)
            for more in ((), (), ("--ledger", tmp_path / "other.csv"))]
    assert [done.returncode for done in said] == [0, 0, 0], said[0].stderr
    for ledger in (folder / "forecasts.csv", tmp_path / "other.csv"):
        lines = ledger.read_text().splitlines()
        assert len(lines) == 2 and told["sha256"] in lines[1]
    moved = tmp_path / "moved/sweep"
    for config in GRID[1:]:
        files.write_json(moved / cells.name(config) / "record.json", record(config))
    gone = tinylm("check", folder / "f.json", folder / "target", "--runs", moved)
    assert gone.returncode == 2 and f"{identity(GRID[0])}, which {moved} has no more" in gone.stderr
    shutil.copy(folder / "f.json", moved.parent)
    other = record(GRID[0])
    other["loss"]["nats_per_token"] += 0.01
    files.write_json(moved / "x/record.json", other)
    changed = tinylm("check", moved.parent / "f.json", folder / "target")  # its sweep lies beside
    assert changed.returncode == 2 and "is scored with the runs it was made from" in changed.stderr


@pytest.mark.parametrize(("words", "said"), [
    (("--published",), "GPT-3: 1.746e+11 parameters, 3e+11 tokens, 3.14e+23 FLOPs (6ND 3.143e+23)"),
    (("--params", 70e9, "--tokens", 1.4e12), "FLOPs: 6nd 5.88e+23"),
    (("--model.V", 50257, "--model.D", 768, "--model.L", 12, "--model.H", 12, "--model.T", 1024),
     "123,561,984 parameters: 0 embedding, 84,964,608 blocks, 38,597,376 head"),
    (("--params", 1e9, "--model.D", 96), "are two models"), (("--tokens", "nan"), "tokens=nan is"),
    (("--published", "--tokens", 5), "counts models of its own"),
    (("--device", "abacus"), "device=abacus is not known")])
def test_cost_counts_any_model_and_the_published_ones(words, said):
    done = tinylm("cost", *words)
    assert said in (done.stderr if done.returncode else done.stdout)
    assert done.returncode in (0, 2) and bool(done.stderr) == bool(done.returncode)
    if not done.returncode:
        told = json.loads(tinylm("cost", *words, "--json").stdout)
        one = told["models"][2] if "models" in told else told
        assert one["bill"]["device_hours"] > 0


def opened(folder, text):
    learnt = SimpleNamespace(encode=lambda text: np.arange(6, 6 + len(text)),
                             decode=lambda ids: "ba" * len(ids))
    return ModelConfig(T=32), None, learnt


def test_a_talk_loads_its_checkpoint_once(monkeypatch):
    loads = []
    monkeypatch.setattr(models, "opened", opened)
    monkeypatch.setattr(folders, "finished", lambda folder: {"kind": "pretrain"})
    monkeypatch.setattr(checkpoint, "final_params", lambda *found: loads.append(found))
    monkeypatch.setattr(generate, "stream", lambda *_: iter([np.array([7])]))
    talk = tinylm("chat", "run", said="one\ntwo\nthree\n\n")
    assert talk.stdout.count("ba") == 3, talk.stderr
    assert len(loads) == 1


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("diverged", 1)])
def test_sft_exits_as_train_does(monkeypatch, tmp_path, status, code):
    ended = {"id": "x", "status": status, "loss": None}
    monkeypatch.setattr(models, "opened", opened)
    monkeypatch.setattr(folders, "finished", lambda folder: {"id": "x"})
    monkeypatch.setattr(folders, "plan_of", lambda *_: None)
    monkeypatch.setattr(tuning, "conversations_id", lambda *_: "c")
    monkeypatch.setattr(tuning, "sft", lambda *_: ended)
    talks = tmp_path / "talks.jsonl"
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talks.write_text(json.dumps({"messages": turn}) + "\n")
    done = tinylm("sft", "run", "--out", tmp_path / "out", "--data", talks)
    assert done.returncode == code and ("with a lower rate" in done.stderr) == (code == 1)


@pytest.mark.parametrize("words", [
    ("train", "--out", "x", "--corpus"), ("train", "--corpus", "--out", "x"),
    ("sft", "run", "--out", "x", "--data", "--steps", "3")])
def test_a_flag_that_names_no_file_does_not_mean_the_default(words):
    done = tinylm(*words)
    assert done.returncode == 2 and "names no file" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not Path("x").exists()


@pytest.mark.parametrize("words", [
    ("train", "--out", "x", "--batch", 0), ("plan", "--flops", 1e15, "--batch", 0),
    ("plan", "--flops", 1e15, "--per-budget", 0), ("plan", "--flops", 1e15, "--noise", "nan"),
    ("plan", "--flops", 1e15, "--dollars-per-hour", "nan"), ("bench", "decode", "--rounds", 0)])
def test_an_impossible_number_is_refused_by_its_name(words):
    done = tinylm(*words)
    assert done.returncode == 2 and not Path("x").exists()
    line, = done.stderr.splitlines()
    assert words[-2].strip("-").replace("-", "_") in line and str(words[-1]) in line


def test_a_study_refuses_a_corpus_of_no_file(tmp_path):
    done = experiment("study", "--dry-run", "--out", tmp_path / "s", "--corpus")
    assert done.returncode == 2 and "--corpus names no file" in done.stderr


def test_the_base_model_is_given_each_prompt_as_the_text_to_continue(monkeypatch, tmp_path):
    given, (_, _, learnt) = [], opened(None, None)
    monkeypatch.setattr(samples, "render", lambda *_, **__: (np.array([1]), None))
    monkeypatch.setattr(samples, "sample", lambda model, params, prompts, *_, **__: (
        given.append(prompts) or [np.array([7])] * len(prompts)))
    learnt.encode = lambda text: np.array([6 + ord(c) for c in text])
    samples.write(tmp_path / "samples.json", ModelConfig(T=128), {}, {}, learnt)
    said = ["".join(chr(i - 6) for i in ids[1:]) for ids in given[0]]
    assert said == list(samples.PROMPTS) * samples.EACH
    rows = files.read_json(tmp_path / "samples.json")["samples"]
    assert [r["model"] for r in rows] == ["base"] * 12 + ["chat"] * 12


@pytest.mark.parametrize("terminal", [False, True])
def test_the_last_table_of_a_sweep_stays(monkeypatch, terminal):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, width=120,
                                                     force_terminal=terminal))
    with progress.live("sweep") as watch:
        watch(SimpleNamespace(status={"D8": "ok"}, losses={"D8": 3.25}, steps={"D8": 9}, flops=1.0,
                              configs={"D8": SimpleNamespace(steps=9)}, total=1.0,
                              seconds_left=None))
    assert "3.250" in shown.getvalue().split("\x1b[2K")[-1]


@pytest.mark.parametrize("words", [
    ("train", "--model.D", 400_000),
    ("sweep", "--widths", 400_000, 400_004, 400_008, 400_012, 400_016, "--budgets", 1e27)])
def test_a_model_larger_than_memory_is_refused_in_a_line(monkeypatch, tmp_path, words):
    reached = SimpleNamespace(id="d", folder=tmp_path)
    monkeypatch.setattr(folders, "prepared", lambda *_, **__: (reached, None))
    monkeypatch.setattr(pretrain, "check", lambda *_: 1 / 0)
    monkeypatch.setattr(folders, "plan_of", lambda *_: 1 / 0)
    done = tinylm(*words, "--out", tmp_path / "x")
    assert done.returncode == 2 and re.search(r"D=4\d{5}, .* takes .* GB .* has \d", done.stderr)
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "x").exists()


def test_lost_checkpoints_are_named_and_the_way_out_is_told(tmp_path):
    files.write_json(tmp_path / "run/record.json", record(GRID[0]))
    done = tinylm("verify", tmp_path)
    assert done.returncode == 1 and f"{tmp_path / 'run'} has lost its checkpoints" in done.stdout
    with pytest.raises(files.Damaged, match="lost its checkpoints; delete the folder and give "):
        checkpoint.final_params(tmp_path / "run", GRID[0].model)


def test_fit_of_a_sweep_honours_its_flags_or_refuses_them(forecast):
    folder, _ = forecast
    fit = ("fit", folder / "sweep", "--json")
    few = tinylm(*fit, "--form", "frontier", "--bootstrap", 5)
    assert few.returncode == 2 and "3 minima leave nothing to resample" in few.stderr
    done = tinylm(*fit, "--form", "coupled", "--drop-worst", 1, "--bootstrap", 5)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["form"] == "coupled" and told["bootstrap"]["resamples"] == 5
    assert told["dropped"][0].startswith("dropped the 1 largest")
    for flags in (("--objective", "ls"), ("--drop-worst", 1), ("--bootstrap", 5)):
        done = tinylm(*fit, *flags)
        assert done.returncode == 2 and f"{flags[0]} is for one law; name it with --form" in (
            done.stderr), done.stderr
    done = tinylm(*fit, "--form", "frontier", "--loss-col", "nll")
    assert done.returncode == 2 and "--loss-col nll is for a CSV" in done.stderr


def test_a_dry_run_lists_as_json_what_its_table_shows(monkeypatch, tmp_path):
    text = np.zeros(10**6, np.uint16)
    data = SimpleNamespace(id="d", V=1024, train=text, heldout=text[:10**4])
    monkeypatch.setattr(folders, "prepared", lambda *_, **__: (data, None))
    asked = ("sweep", "--out", tmp_path / "x", "--widths", 8, 12, 16, 20, 24, "--spread", 30,
             "--dry-run", "--json", "--budgets")
    done = tinylm(*asked, 1e13)
    assert done.returncode == 2 and "at most 4 are allowed" in done.stderr
    done = tinylm(*asked, 1e10)
    told = json.loads(done.stdout)
    assert sorted(r["width"] for r in told["runs"]) == [8, 12, 16, 20, 24]
    assert told["flops"] == pytest.approx(sum(r["FLOPs"] for r in told["runs"]))
    assert told["runs"][0]["for"] == "sweep" and told["seconds_to_compile"] == 25


def test_a_forecast_of_what_is_known_is_refused_and_one_of_the_far_warns(forecast, tmp_path):
    folder, _ = forecast
    for flops, out, words in ((9e11, tmp_path / "a.json", "flops=9e+11 is not above the sweep's"),
                              (5e12, tmp_path, f"{tmp_path} is a folder; name the file to write")):
        done = tinylm("forecast", folder / "sweep", "--flops", flops, "--out", out)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not any(tmp_path.iterdir())
    far = tinylm("forecast", folder / "sweep", "--flops", 1e16, "--out", tmp_path / "far.json")
    assert "WARNING: 1e+04 times the sweep's largest budget is farther than" in far.stdout


@pytest.mark.parametrize(("answers", "code", "words"), [
    (["a", "a", "a", "bb", "c" * 90, "ddd"], 0, ("2 duplicate conversations dropped",
                                                 "1 of 4 conversations left out", "T=32 tokens")),
    (["x" * 90, "y" * 50], 2, ("all 2 conversations are longer than T=32 tokens, the shortest is "
                               "58; ",))])
def test_sft_says_which_conversations_it_leaves_out(monkeypatch, tmp_path, answers, code, words):
    monkeypatch.setattr(models, "opened", opened)
    monkeypatch.setattr(folders, "finished", lambda folder: {"id": "x"})
    monkeypatch.setattr(folders, "plan_of", lambda *_: None)
    monkeypatch.setattr(tuning, "sft", lambda *_: {"id": "x", "status": "ok", "loss": None})
    talks = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]
             for a in answers]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks))
    done = tinylm("sft", "run", "--out", tmp_path / "out", "--data", tmp_path / "t.jsonl")
    assert done.returncode == code and all(w in done.stderr for w in words), done.stderr


def test_text_that_is_no_prepared_folder_is_called_that(tmp_path):
    done = tinylm("train", "--out", tmp_path / "x", "--text", tmp_path / "none")
    assert done.returncode == 2 and f"--text {tmp_path / 'none'} is no prepared" in done.stderr


def test_a_far_forecast_may_be_as_wide_as_its_law_wants(forecast, tmp_path):
    folder, _ = forecast
    done = tinylm("forecast", folder / "sweep", "--flops", 1e18, "--out", tmp_path / "f.json",
                  "--json")
    assert json.loads(done.stdout.splitlines()[-1])["D"] > 252


def test_a_ledger_that_is_no_text_is_refused(forecast, tmp_path):
    folder, told = forecast
    (tmp_path / "forecasts.csv").write_bytes(b"\xff\xfe name")
    files.write_json(folder / "target/record.json", record(replace(
        GRID[0], model=replace(GRID[0].model, D=told["D"]), steps=told["steps"],
        forecast_sha256=told["sha256"])))
    done = tinylm("check", folder / "f.json", folder / "target", "--ledger",
                  tmp_path / "forecasts.csv")
    assert done.returncode == 2 and "is not UTF-8 at byte 0; give a" in done.stderr


def test_names_in_brackets_are_said_as_they_are(monkeypatch):
    monkeypatch.setattr(progress, "console", Console(file=(shown := io.StringIO()), width=80))
    progress.say("read [red]odd[/red] [x].txt")
    assert shown.getvalue() == "read [red]odd[/red] [x].txt\n"
