"""A finished run opened to be used: the config of its model, its token files, its tokenizer."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from tinylm import files
from tinylm.config import BadInput, from_json
from tinylm.model.decoder import ModelConfig
from tinylm.stages.reward import judge_of
from tinylm.text import prepare
from tinylm.text.shards import Dataset
from tinylm.text.tokenizer import Tokenizer
from tinylm.train import checkpoint
from tinylm.train.rollout import Judge
from tinylm.verbs import folders


def tuned(folder: Path) -> bool:
    """Tell whether a finished run has learnt the chat template."""
    return folders.finished(folder)["kind"] not in ("pretrain", "branch")


def opened(folder: Path, text: Path | None,
           judge: bool = False) -> tuple[ModelConfig, Dataset, Tokenizer]:
    """Open a finished run's model config, token files and tokenizer.

    A reward model is opened as a `judge` only.
    """
    record = folders.finished(folder)
    if record["kind"] == "reward" and not judge:
        raise BadInput(f"{folder} is a reward model and says nothing; give a run that speaks")
    link = files.read_json(folder / "environment.json").get("text", "")
    place = text or Path(os.path.normpath(folder.absolute() / link))
    for part in ("tokenizer", "tokens"):
        if not (place / part).exists():
            raise BadInput(f"{place} holds no {part}; give the run's prepared folder with --text "
                           "(look and lens: --prepared)")
    data, learnt = prepare.open_text(place)
    if learnt.id != record["tokenizer_id"]:
        raise BadInput(f"{place} has tokenizer {learnt.id}, the run {record['tokenizer_id']}; "
                       "give the prepared folder it was trained on with --text")
    model = from_json(ModelConfig, record["config"]["model"], "model")
    return model, data, learnt


def judge(reward: Path, model: ModelConfig, learnt: Tokenizer,
          text: Path | None) -> tuple[Judge, str]:
    """Open a reward model as the judge of that model's responses; give it and its id."""
    record = folders.finished(reward)
    if record["kind"] != "reward":
        raise BadInput(f"{reward} is a {record['kind']} run; give a folder of tinylm reward")
    if record["tokenizer_id"] != learnt.id:
        raise BadInput(f"{reward} reads tokenizer {record['tokenizer_id']}, the run {learnt.id}; "
                       "give a reward model of the same lineage")
    own, _, _ = opened(reward, text, judge=True)
    if own.T < model.T:
        raise BadInput(f"{reward} reads T={own.T} tokens and the run's context is T={model.T}; "
                       "give a reward model of that context")
    return judge_of(own, checkpoint.final_scorer(reward, own)), record["id"]


def ensemble(rewards: tuple[Path, ...], how: Literal["mean", "least"], model: ModelConfig,
             learnt: Tokenizer, text: Path | None) -> tuple[Judge, str]:
    """Open reward models that judge together, by the mean or the least of their scores."""
    each = [judge(one, model, learnt, text) for one in rewards]
    if len(each) == 1:
        return each[0]
    scores, names = zip(*each, strict=True)
    if len(set(names)) < len(names):
        raise BadInput(f"--reward names {max(names, key=names.count)} twice; name each once")
    joined = {"mean": np.mean, "least": np.min}[how]
    return (lambda rolled, asked: joined([score(rolled, asked) for score in scores], axis=0),
            f"{how} of {' '.join(names)}")
