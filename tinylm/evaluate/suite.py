"""One row of the table that compares base, tuned and optimised models on the instruction suite.

The tasks are drawn once by seed, about words that no training task holds (text/tasks.py); a rate
comes with its 95% interval. Answers are the likeliest tokens; KL and entropy are of samples at
temperature 1, the KL exact over the whole vocabulary at every token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import machine
from tinylm.config import BadInput, require
from tinylm.evaluate.rates import share, win_rate
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text import rubric, tasks
from tinylm.text.chat import read, render
from tinylm.text.tasks import Task
from tinylm.text.tokenizer import Tokenizer
from tinylm.train import step
from tinylm.train.rollout import Judge, Rollout, measured, padded, rollout

Gold = Callable[[Task, str, bool], float]
"""score of a task's answer, which closed its turn or did not"""
AT_ONCE = 128
"""prompts answered together"""
REPEAT = 4
"""an answer repeats itself if it holds a run of so many tokens twice"""


@dataclass(frozen=True)
class SuiteConfig:
    """Which tasks are asked and how answers are drawn."""

    each: int = 500
    """tasks a family, without a rule; a rule gets as many over all families"""
    split: tasks.Split = "test"
    """test: words unseen in training; reworded: phrases unseen too"""
    budget: int = 32
    """tokens of an answer at most"""
    seed: int = 0
    """of the tasks and the draws"""
    sentences: int = 0
    """plain sentences asked, whose grades win or lose; 0: as many as of the other families"""

    def __post_init__(self):
        require("each", self.each, 1, 1e5)
        require("budget", self.budget, 1, 1e6)
        require("seed", self.seed, 0, 2**32 - 1)
        require("sentences", self.sentences, 0, 1e5)


def drawn(config: SuiteConfig) -> list[Task]:
    """Draw the suite's tasks: every family plain, every rule over all families."""
    counts = dict.fromkeys(tasks.FAMILIES, config.each)
    counts["sentence"] = config.sentences or config.each
    plain = [t for family, count in counts.items()
             for t in tasks.draw(family, "plain", config.split, config.seed, count)]
    few = -(-config.each // len(tasks.FAMILIES))
    return plain + [t for rule in tasks.RULES[1:] for family in tasks.FAMILIES
                    for t in tasks.draw(family, rule, config.split, config.seed, few)]


def fitting(model: ModelConfig, chosen: Sequence[Task], tokenizer: Tokenizer,
            budget: int) -> tuple[list[Task], list[np.ndarray]]:
    """Give the tasks whose prompt leaves room for an answer, and their prompts.

    Those are ids that end with <|assistant|>.
    """
    prompts = [render(t.messages, tokenizer, prompt=True)[0] for t in chosen]
    fit = [i for i, p in enumerate(prompts) if padded([p]) + budget <= model.T + 1]
    if not fit:
        raise BadInput(f"no task fits T={model.T} beside responses of {budget} tokens; lower the "
                       "budget")
    return [chosen[i] for i in fit], [prompts[i] for i in fit]


def answered(model: ModelConfig, params: Params, prompts: Sequence[np.ndarray], budget: int,
             seed: int = 0, temperature: float = 0.0) -> list[Rollout]:
    """Answer prompts, AT_ONCE at a time (the last repeated), over all devices, at one width."""
    width, devices = padded(prompts), math.gcd(jax.device_count(), AT_ONCE)
    at_once = min(AT_ONCE, -(-len(prompts) // devices) * devices)
    full = [*prompts, *[prompts[-1]] * (-len(prompts) % at_once)]
    mesh, out = machine.mesh(devices), []
    params, place = step.replicate(mesh, params), step.by_row(mesh)
    for n, at in enumerate(range(0, len(full), at_once)):
        key = jax.random.fold_in(jax.random.key(seed), n)
        out.append(rollout(model, params, full[at: at + at_once], width, budget, key, temperature,
                           place))
    return out


def joined(parts: Sequence[Rollout], count: int) -> Rollout:
    """Join rollouts of one width and keep the first `count` rows."""
    return Rollout(*(np.concatenate([part[i] for part in parts])[:count] for i in range(4)))


def liked(model: ModelConfig, params: Params, prompts: Sequence[np.ndarray], budget: int,
          seed: int, judge: Judge, n: int) -> Rollout:
    """Answer each prompt n times at temperature 1; keep the ended answer that the judge likes."""
    every, asked = [], np.arange(len(prompts))
    for k in range(n):
        parts = answered(model, params, prompts, budget, seed + 1 + k, 1.0)
        every.append(joined(parts, len(prompts)))
    scores = [np.where(rolled.ended > 0, judge(rolled, asked), -np.inf) for rolled in every]
    best = np.argmax(scores, axis=0)
    return Rollout(*(np.stack([rolled[i] for rolled in every])[best, asked] for i in range(4)))


def texts(rolled: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Read a rollout's responses."""
    return [read(ids, tokenizer) for ids in rolled.responses]


def golds(chosen: Sequence[Task], said: Sequence[str], ended: np.ndarray,
          grade: Gold = rubric.exact) -> np.ndarray:
    """Give each task's exact reward, or another grade of its answer and whether that ended."""
    return np.array([grade(*of) for of in zip(chosen, said, ended > 0, strict=True)], np.float32)


def table_row(config: SuiteConfig, model: ModelConfig, params: Params, ref: Params,
              tokenizer: Tokenizer, judge: Judge | None = None,
              n: int = 1) -> tuple[dict[str, Any], np.ndarray]:
    """Measure a model on the suite; give its row and the rubric's grades of plain sentences.

    `ref` is what KL is measured against, the tuned model that the others came from. A judge adds
    its mean score of plain sentences that end. With n > 1 each answer is the one of n samples that
    the judge likes best, and KL is that choice's bound, ln n - (n - 1) / n.
    """
    every = drawn(config)
    chosen, prompts = fitting(model, every, tokenizer, config.budget)
    if not any(t.family == "sentence" and t.rule == "plain" for t in chosen):
        raise BadInput(f"no sentence task, by which runs are compared, fits T={model.T} beside "
                       f"answers of {config.budget} tokens; lower the budget")
    if judge and n > 1:
        rolled = liked(model, params, prompts, config.budget, config.seed, judge, n)
    else:
        rolled = joined(answered(model, params, prompts, config.budget), len(prompts))
    said = texts(rolled, tokenizer)
    gold, grades = (golds(chosen, said, rolled.ended, by) for by in (rubric.exact, rubric.graded))
    kept = np.array([tasks.obeyed(t, text) is not None for t, text in zip(chosen, said,
                                                                          strict=True)])
    ruled = np.array([t.rule != "plain" for t in chosen])
    plain = {f: np.array([t.family == f for t in chosen]) & ~ruled for f in tasks.FAMILIES}
    rows = {f: rate(gold[where]) for f, where in plain.items() if where.any()}
    some = joined(answered(model, params, prompts[::8], config.budget, config.seed, 1.0),
                  len(prompts[::8]))
    found = measured(model, params, ref, some)
    count = some.mask.sum()
    row = {"tasks": len(chosen), "too_long": len(every) - len(chosen),
           "tasks_id": tasks.tasks_id(every), "split": config.split,
           "best_of": n, "exact": rows,
           "macro": float(np.mean([row["rate"] for row in rows.values()])),
           "grade": float(grades[plain["sentence"]].mean()),
           "micro": rate(gold[~ruled]),
           "obeyed": rate((kept * rolled.ended)[ruled]) if ruled.any() else None,
           "rules_and_answers": rate(gold[ruled]) if ruled.any() else None,
           "stops": rate(rolled.ended),
           "leaks": rate(rolled.leaked),
           "truncated": rate(1 - rolled.ended - rolled.leaked),
           "repeats": rate(np.array([repeats(ids) for ids in rolled.responses], np.float32)),
           "length_tokens": float(rolled.mask.sum(1).mean()),
           "kl_nats": (math.log(n) - (n - 1) / n if n > 1
                       else float((found.kl * some.mask).sum(1).mean())),
           "entropy_nats": (None if n > 1  # of a choice not known
                            else float((found.entropy * some.mask).sum() / count))}
    if judge:
        scores = judge(rolled, np.arange(len(chosen)))[plain["sentence"] & (rolled.ended > 0)]
        row["proxy"] = float(scores.mean()) if len(scores) else None
    return row, grades[plain["sentence"]]


def wins(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Give the rate at which one model's grades beat another's on the same tasks, ties half."""
    found = win_rate(jnp.asarray(ours), jnp.asarray(theirs), jnp.ones(len(ours)))
    return {"rate": float(found.rate), "low95": float(found.low), "high95": float(found.high)}


def rate(cases: np.ndarray) -> dict[str, float]:
    """Give a share with its 95% interval."""
    found = share(jnp.asarray(cases, jnp.float32), jnp.ones(len(cases)))
    return {"rate": float(found.rate), "low95": float(found.low), "high95": float(found.high)}


def repeats(ids: np.ndarray) -> bool:
    """Say whether a run of REPEAT tokens comes twice in a response."""
    runs = [tuple(ids[i: i + REPEAT]) for i in range(len(ids) - REPEAT + 1)]
    return len(set(runs)) < len(runs)
