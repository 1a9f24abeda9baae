"""Pretraining: it learns, and a killed run continues to the same bits."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.model.decoder import ModelConfig
from tinylm.stages.pretrain import PretrainConfig, pretrain
from tinylm.text import corpora, prepare
from tinylm.train import checkpoint, run
from tinylm.train.run import Stopped

PLAN = machine.Plan(devices=2, micro=1, chunk=4, checkpoint_every=8)


def story(seed: int, sentences: int = 60) -> str:
    """A text with structure to learn: a made-up lexicon, some words always followed by others."""
    lexicon, rng = np.random.default_rng(0), np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(lexicon.choice(syllables, lexicon.integers(1, 4))) for _ in range(300)]
    out = []
    for _ in range(sentences):
        at = rng.integers(300, size=rng.integers(2, 6))
        out.append(" ".join(f"{words[i]} {words[(i * 7 + 1) % 300]}" for i in at).capitalize())
    return ". ".join(out) + ".\n"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(30):
        (folder / f"{n:02d}.txt").write_text(story(n))
    corpus = corpora.load(sorted(map(str, folder.glob("*.txt"))))
    return prepare.prepare(folder / "prepared", corpus, 96)[0]


@pytest.fixture(scope="session")
def config(data):
    model = ModelConfig(V=data.V, D=16, L=2, H=2, T=32)
    return PretrainConfig(model, steps=30, batch=128, data_id=data.id)


def bits(folder: Path, config: PretrainConfig) -> str:
    """Hash the final parameters and the metrics log."""
    total = hashlib.sha256((folder / "metrics.jsonl").read_bytes())
    for leaf in jax.tree.leaves(checkpoint.final_params(folder, config.model)):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def test_training_lowers_the_heldout_loss_far_below_uniform(tmp_path, data, config):
    record = pretrain(tmp_path / "run", config, data, PLAN)
    assert record["status"] == "ok"
    rows = files.read_lines(tmp_path / "run/metrics.jsonl")
    columns = set(run.METRICS) - {"heldout/answers_nats_per_token", "train/skipped"}
    assert all(set(row) == columns for row in rows) and rows[-1]["step"] == 30
    assert record["loss"]["nats_per_token"] < 0.85 * np.log(data.V)
    assert 0 < record["loss"]["stderr"] < record["loss"]["nats_per_token"]


def test_a_run_stopped_twice_ends_in_the_same_bits(tmp_path, data, config):
    pretrain(tmp_path / "whole", config, data, PLAN)
    whole = bits(tmp_path / "whole", config)
    for at in (10, 20):
        def stop(step: int, loss: float, at: int = at) -> None:
            if step >= at:
                raise Stopped("pulled the plug")

        with pytest.raises(Stopped):
            pretrain(tmp_path / "parts", config, data, PLAN, stop)
    assert run.record(tmp_path / "parts") is None
    pretrain(tmp_path / "parts", config, data, PLAN)
    assert bits(tmp_path / "parts", config) == whole
    assert (tmp_path / "parts/record.json").read_text() == (
        tmp_path / "whole/record.json").read_text()


def test_a_relative_folder_resumes_and_loads(tmp_path, monkeypatch, data, config):
    monkeypatch.chdir(tmp_path)

    def stop(step: int, loss: float) -> None:
        if step >= 20:
            raise Stopped("pulled the plug")

    with pytest.raises(Stopped):
        pretrain(Path("run"), config, data, PLAN, stop)
    assert list(Path("run/checkpoints").glob("step-*"))
    pretrain(Path("run"), config, data, PLAN)
    pretrain(tmp_path / "whole", config, data, PLAN)
    assert bits(Path("run"), config) == bits(tmp_path / "whole", config)


def test_a_finished_run_is_returned_not_trained_again(tmp_path, data, config):
    first = pretrain(tmp_path / "run", config, data, PLAN)

    def never(step: int, loss: float) -> None:
        raise AssertionError("trained again")

    assert pretrain(tmp_path / "run", config, data, PLAN, never) == first


def test_a_resume_with_another_config_is_refused_naming_the_field(tmp_path, data, config):
    pretrain(tmp_path / "run", config, data, PLAN)
    with pytest.raises(BadInput, match="config.seed=0, this is config.seed=1"):
        pretrain(tmp_path / "run", replace(config, seed=1), data, PLAN)


def test_a_run_of_schema_1_is_one_of_a_model_without_smeared_keys(tmp_path, data, config):
    old = replace(config, model=replace(config.model, smear=False))
    record = pretrain(tmp_path / "run", old, data, PLAN)
    for name in ("config.json", "record.json"):
        values = files.read_json(tmp_path / "run" / name)
        del values["config"]["model"]["smear"]
        if name == "record.json":
            values["files"]["config.json"] = files.sha256(tmp_path / "run/config.json")
        files.write_json(tmp_path / "run" / name, {**values, "schema": 1})
    assert run.record(tmp_path / "run")["config"] == record["config"]
    assert pretrain(tmp_path / "run", old, data, PLAN)["loss"] == record["loss"]
    with pytest.raises(BadInput, match="config.model.smear=False, this is config.model.smear=True"):
        pretrain(tmp_path / "run", config, data, PLAN)


@pytest.mark.parametrize(("devices", "micro"), [(4, 1), (1, 4)])
def test_devices_and_micro_batches_do_not_change_what_is_learnt(
        tmp_path, data, config, devices, micro):
    plan = replace(PLAN, devices=devices, micro=micro)
    short = replace(config, steps=6)
    one = pretrain(tmp_path / "one", short, data, PLAN)
    other = pretrain(tmp_path / "other", short, data, plan)
    np.testing.assert_allclose(one["loss"]["nats_per_token"], other["loss"]["nats_per_token"],
                               rtol=2e-5)


def test_more_than_four_epochs_are_refused(tmp_path, data, config):
    with pytest.raises(BadInput, match="epochs"):
        pretrain(tmp_path / "run", replace(config, steps=100_000), data, PLAN)


def test_divergence_is_recorded_and_keeps_no_numbers(tmp_path, data, config):
    hot = replace(config, optim=replace(config.optim, lr=1e30, clip=1e30))
    record = pretrain(tmp_path / "run", hot, data, PLAN)
    assert record["status"] == "diverged" and record["loss"] is None


def test_a_loss_that_is_finite_in_training_alone_is_divergence_too(tmp_path, data, config):
    hot = replace(config, steps=2, optim=replace(config.optim, lr=1e12, clip=1e30))
    record = pretrain(tmp_path / "run", hot, data, PLAN)
    rows = files.read_lines(tmp_path / "run/metrics.jsonl")
    assert all(row["train/nats_per_token"] < 1e30 for row in rows)
    assert record["status"] == "diverged" and record["loss"] is None
    with pytest.raises(BadInput, match="ended as diverged"):
        checkpoint.final_params(tmp_path / "run", config.model)


def test_a_tokenizer_of_another_corpus_is_not_taken_over(tmp_path):
    one, other = (corpora.load([place]) for n, place in enumerate((tmp_path / "a.txt",
                  tmp_path / "b.txt")) if place.write_text(
                      "\n".join(story(100 * n + k) for k in range(30))))
    prepare.prepare(tmp_path / "text", one, 128)
    shutil.rmtree(tmp_path / "text/tokens")  # as if it was killed before them
    with pytest.raises(BadInput, match="holds the tokenizer of corpus .*choose a new folder"):
        prepare.prepare(tmp_path / "text", other, 128)
    assert prepare.prepare(tmp_path / "text", one, 128)[0].facts["corpus_id"] == one.id
