"""Verbs that learn from preferences and rewards: reward, dpo, ppo, grpo, best-of-n."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional

from tinylm.config import BadInput, require
from tinylm.evaluate import pool, suite
from tinylm.evaluate.rates import best_of_n as expected_best
from tinylm.look import alignment, progress
from tinylm.model.decoder import ModelConfig
from tinylm.stages import dpo as preferring
from tinylm.stages import policy as policies
from tinylm.stages import reward as judging
from tinylm.sweep.times import spent
from tinylm.text import preferences, rubric, tasks
from tinylm.text.preferences import Ranked
from tinylm.text.tokenizer import Tokenizer
from tinylm.train import checkpoint
from tinylm.train.optim import OptimConfig
from tinylm.train.rollout import Judge
from tinylm.verbs import folders, models

By = tuple[tuple[Path, ...], Literal["mean", "least"]]
"""reward models, and how they judge together"""
MOST = 100_000
"""tasks a family that can be asked for"""


def reward(parent: Positional[Path], out: Path, data: tuple[Path, ...] = (), sampled: int = 0,
           family: tuple[str, ...] = ("sentence",), responses: int = 4, sharpness: float = 4.0,
           budget: int = 32, heldout: float = 0.1,
           optim: OptimConfig = OptimConfig(lr=1e-3, decay=1.0),  # noqa: B008
           steps: int = 0, prompts: int = 16, center: float = 0.0, seed: int = 0,
           text: Path | None = None, skip_bad_lines: bool = False, json: bool = False) -> None:
    """Train a reward model on ranked responses, from a tuned run.

    Args:
        parent: folder of the run that is given a head
        out: folder of the new run
        data: .jsonl files of {"prompt" or "messages", and "chosen", "rejected" or "responses"}
        sampled: without data: tasks a family to which the parent's own responses are ranked, by a
            graded rubric where they ask for a sentence, by the exact answer elsewhere
        family: of those tasks
        responses: sampled for each
        sharpness: a pair is labelled right with p = sigmoid(sharpness x gap of those grades)
        budget: tokens of a sampled response at most
        heldout: share of the rows, whole prompts, that judge it
        optim: the optimiser and its schedule
        steps: optimiser steps; 0: one epoch
        prompts: prompts a step, each with all its responses
        center: pull of two responses' scores to 0
        seed: of the head and the order of the prompts
        text: the prepared folder of the parent, where it has moved
        skip_bad_lines: put bad lines of the data into OUT/quarantine.jsonl instead of refusing
        json: print the record on the last line
    """
    model, tokens, learnt = models.opened(parent, text)
    judging.RewardConfig(model, optim, steps=steps or 1, prompts=prompts, center=center, seed=seed)
    aside = folders.Aside(out, skip_bad_lines)
    train, held, ceiling = _rankings(
        parent, model, learnt, data, aside, heldout, seed,
        Sampling(sampled, family, responses, sharpness, budget))
    steps = steps or max(1, len(train.tokens) // prompts)
    config = judging.RewardConfig(model, optim, folders.finished(parent)["id"],
                                  f"{train.id}{held.id}", steps, prompts, center, ceiling, seed)
    plan = folders.plan_of(out, prompts, model.shape, model.compute)
    with aside.kept(), progress.bar("reward model", steps) as event:
        record = judging.reward(out, config, parent, train, held, tokens.tokenizer_id,
                                tokens.folder.parent, plan, event)
    progress.outcome(record, json, alignment.judged(record))


def dpo(parent: Positional[Path], out: Path, data: tuple[Path, ...] = (), sampled: int = 0,
        family: tuple[str, ...] = ("sentence",), responses: int = 4, sharpness: float = 4.0,
        budget: int = 32, heldout: float = 0.1,
        optim: OptimConfig = OptimConfig(lr=3e-4, decay=1.0),  # noqa: B008
        steps: int = 0, pairs: int = 32, beta: float = 0.5, smoothing: float = 0.0, seed: int = 0,
        text: Path | None = None, skip_bad_lines: bool = False, json: bool = False) -> None:
    """Tune a run on ranked responses directly, without a reward model.

    Args:
        parent: folder of the tuned run, which stays the reference
        out: folder of the new run
        data: .jsonl files of {"prompt" or "messages", and "chosen", "rejected" or "responses"}
        sampled: without data: tasks a family to which the parent's own responses are ranked, as
            `tinylm reward` ranks them
        family: of those tasks
        responses: sampled for each
        sharpness: a pair is labelled right with p = sigmoid(sharpness x gap of their grades)
        budget: tokens of a sampled response at most
        heldout: share of the rows, whole prompts, that judge it
        optim: the optimiser and its schedule
        steps: optimiser steps; 0: one epoch
        pairs: pairs a step
        beta: nats of reward that a nat of log-probability is worth
        smoothing: share of labels taken to be flipped
        seed: of the order of the pairs
        text: the prepared folder of the parent, where it has moved
        skip_bad_lines: put bad lines of the data into OUT/quarantine.jsonl instead of refusing
        json: print the record on the last line
    """
    model, tokens, learnt = models.opened(parent, text)
    preferring.DpoConfig(model, optim, steps=steps or 1, pairs=pairs, beta=beta,
                         smoothing=smoothing, seed=seed)
    aside = folders.Aside(out, skip_bad_lines)
    train, held, _ = _rankings(parent, model, learnt, data, aside, heldout, seed,
                               Sampling(sampled, family, responses, sharpness, budget))
    steps = steps or max(1, int(train.wins.sum()) // pairs)
    config = preferring.DpoConfig(model, optim, folders.finished(parent)["id"],
                                  f"{train.id}{held.id}", steps, pairs, beta, smoothing, seed)
    plan = folders.plan_of(out, pairs, model.shape, model.compute)
    with aside.kept(), progress.bar("dpo", steps) as event:
        record = preferring.dpo(out, config, parent, train, held, tokens, plan, event)
    progress.outcome(record, json, alignment.preferred(record))


def ppo(parent: Positional[Path], out: Path, reward: tuple[Path, ...] = (),
        ensemble: Literal["mean", "least"] = "mean",
        family: tuple[str, ...] = ("sentence",), count: int = 2000, text: Path | None = None,
        json: bool = False,
        policy: policies.Dials = policies.Dials()) -> None:  # noqa: B008
    """Optimise a tuned run's policy with a value model (PPO), against a rubric or a reward model.

    Args:
        parent: folder of the tuned run, which stays the reference
        out: folder of the new run
        reward: folders of reward models; none: the tasks' own exact reward
        ensemble: how several judge together: by the mean or the least of their scores
        family: of the tasks that are asked
        count: training tasks a family
        text: the prepared folder of the parent, where it has moved
        json: print the record on the last line
        policy: how responses are sampled, learnt from and guarded
    """
    _optimised("ppo", parent, out, (reward, ensemble), family, count, text, json, policy)


def grpo(parent: Positional[Path], out: Path, reward: tuple[Path, ...] = (),
         ensemble: Literal["mean", "least"] = "mean",
         family: tuple[str, ...] = ("sentence",), count: int = 2000, text: Path | None = None,
         json: bool = False,
         policy: policies.Dials = policies.Dials()) -> None:  # noqa: B008
    """Optimise a tuned run's policy against the other responses to the same prompt (GRPO).

    Args:
        parent: folder of the tuned run, which stays the reference
        out: folder of the new run
        reward: folders of reward models; none: the tasks' own exact reward
        ensemble: how several judge together: by the mean or the least of their scores
        family: of the tasks that are asked
        count: training tasks a family
        text: the prepared folder of the parent, where it has moved
        json: print the record on the last line
        policy: how responses are sampled, learnt from and guarded
    """
    _optimised("grpo", parent, out, (reward, ensemble), family, count, text, json, policy)


def best_of_n(target: Positional[Path], reward: tuple[Path, ...] = (),
              ensemble: Literal["mean", "least"] = "mean",
              family: tuple[str, ...] = ("sentence",), count: int = 64, samples: int = 16,
              n: tuple[int, ...] = (1, 2, 4, 8, 16), budget: int = 32, seed: int = 0,
              text: Path | None = None, json: bool = False) -> None:
    """Say what the best of n samples by a reward model would score by the exact reward.

    Args:
        target: folder of the tuned run that is sampled
        reward: folders of reward models; none: the exact reward itself
        ensemble: how several judge together: by the mean or the least of their scores
        family: of the test tasks that are asked
        count: test tasks a family
        samples: drawn for each task; every n is estimated from all of them
        n: how many the best is chosen from
        budget: tokens of a response at most
        seed: of the tasks and the draws
        text: the prepared folder of the run, where it has moved
        json: print the table on the last line
    """
    for name, value, most in (("count", count, MOST), ("samples", samples, 1e5),
                              *(("n", one, samples) for one in n)):
        require(name, value, 1, most)
    require("seed", seed, 0, 2**32 - 1)
    if not n:
        raise BadInput("--n names no number to choose from; give one or more, such as 1 4 16")
    model, _, learnt = models.opened(target, text)
    require("budget", budget, 1, model.T)
    chosen, _ = _fitting(model, _tasks(family, "test", count, seed), learnt, budget)
    judge, _ = _judge((reward, ensemble), model, chosen, learnt, text)
    drawn = pool.sampled(model, checkpoint.final_params(target, model), learnt, chosen, samples,
                         budget, rubric.exact, seed)
    if not drawn.ended.any():
        raise BadInput(f"none of {drawn.ended.size} responses ended within {budget} tokens, so "
                       "there is none to choose; raise --budget or tune the run for longer")
    owner = np.repeat(np.arange(len(chosen)), samples)
    scores = judge(drawn.rollout, owner).reshape(-1, samples)
    scores = jnp.where(drawn.ended > 0, scores, scores.min())  # what does not end is no answer
    gold = jnp.asarray(drawn.gold)
    rows = [{"n": one, "gold": float(expected_best(scores, gold, one).mean()),
             "proxy": float(expected_best(scores, scores, one).mean()),
             "kl_bound_nats": math.log(one) - (one - 1) / one} for one in n]
    progress.answer({"tasks": len(chosen), "samples": samples, "rows": rows}, json, "\n".join(
        f"best of {r['n']:3d}: reward {r['gold']:.3f}, by its judge {r['proxy']:+.3f}, at most "
        f"{r['kl_bound_nats']:.2f} nats from the run" for r in rows))


def _optimised(method: Literal["ppo", "grpo"], parent, out, by: By, family, count, text, json,
               given: policies.Dials) -> None:
    model, tokens, learnt = models.opened(parent, text)
    chosen, prompts = _fitting(model, _tasks(family, "train", count, given.seed), learnt,
                               given.budget)
    judge, name = _judge(by, model, chosen, learnt, text)
    config = policies.PolicyConfig(**{
        **vars(given), "method": method, "model": model, "judge": name,
        "parent": folders.finished(parent)["id"], "data_id": policies.prompts_id(prompts)})
    rows = math.gcd(config.prompts, config.rows // config.minibatches)
    plan = folders.plan_of(out, rows, model.shape, model.compute)
    with progress.bar(method, config.rollouts * config.updates) as event:
        record = policies.policy(out, config, parent, prompts, judge, tokens, plan, event)
    progress.outcome(record, json, alignment.optimised(record, spent(out)))


def _tasks(family: tuple[str, ...], split: tasks.Split, count: int, seed: int) -> list[tasks.Task]:
    require("count", count, 1, MOST)
    if not family:
        raise BadInput(f"--family names none; choose one or more of {', '.join(tasks.FAMILIES)}")
    each = [tasks.draw(one, "plain", split, seed, count) for one in family]
    return list(itertools.chain(*zip(*each, strict=True)))  # in turn: a split holds out of each


def _fitting(model: ModelConfig, drawn: list[tasks.Task], learnt: Tokenizer,
             budget: int) -> tuple[list[tasks.Task], list[np.ndarray]]:
    """Give the tasks that fit and their prompts; say how many do not."""
    chosen, prompts = suite.fitting(model, drawn, learnt, budget)
    if len(chosen) < len(drawn):
        lost = Counter(t.family for t in drawn) - Counter(t.family for t in chosen)
        progress.say(f"{lost.total()} of {len(drawn)} tasks left out: no room for {budget} tokens "
                     f"in T={model.T} ({', '.join(f'{n} {name}' for name, n in lost.items())})")
    return chosen, prompts


def _judge(by: By, model: ModelConfig, chosen: list[tasks.Task], learnt: Tokenizer,
           text: Path | None) -> tuple[Judge, str]:
    """Give the judge of responses to the chosen tasks, and what names it in a config."""
    rewards, how = by
    if how != "mean" and len(rewards) < 2:
        raise BadInput(f"--ensemble {how} joins two or more reward models and --reward names "
                       f"{len(rewards)}; name more or leave it out")
    if not rewards:
        return (lambda rolled, asked: suite.golds([chosen[i] for i in asked],
                                                  suite.texts(rolled, learnt), rolled.ended),
                f"exact {tasks.tasks_id(chosen)}")
    return models.ensemble(rewards, how, model, learnt, text)


class Sampling(NamedTuple):
    """How responses are drawn to be ranked, where no file of rankings is given."""

    tasks: int = 0
    family: tuple[str, ...] = ("sentence",)
    responses: int = 4
    sharpness: float = 4.0
    budget: int = 32


def _rankings(parent: Path, model: ModelConfig, learnt: Tokenizer, data: tuple[Path, ...],
              aside: folders.Aside, heldout: float, seed: int,
              how: Sampling) -> tuple[Ranked, Ranked, float]:
    """Give rankings to train on and to judge by, and a perfect judge's accuracy (0: unknown)."""
    if bool(data) == bool(how.tasks):
        raise BadInput("give either --data with rankings or --sampled with the number of tasks "
                       "to sample and rank")
    if data:
        for name, value in how._asdict().items():
            if value != Sampling._field_defaults[name]:
                raise BadInput(f"--{name} is for --sampled responses and --data {data[0]} has its "
                               "own; leave it out")
        read = folders.read_lines(data, preferences.read_jsonl, aside)
        (train, lost), (held, more) = (preferences.ranked(side, learnt, model.T)
                                       for side in preferences.split(read, heldout))
        if lost + more:
            progress.say(f"{lost + more} of {len(read)} prompts left out: fewer than two responses "
                         f"fit T={model.T} tokens")
        return train, held, 0.0
    require("heldout", heldout, 1e-6, 1 - 1e-6)
    require("sampled", how.tasks, 1, MOST)
    require("budget", how.budget, 1, model.T)
    require("responses", how.responses, 2, 64)
    require("sharpness", how.sharpness, 0, math.inf)
    chosen = _tasks(how.family, "train", how.tasks, seed)
    drawn = pool.sampled(model, checkpoint.final_params(parent, model), learnt, chosen,
                         how.responses, how.budget, rubric.graded, seed)
    (train, _), (held, ceiling) = (pool.labelled(side, how.sharpness, seed)
                                   for side in pool.split(drawn, heldout))
    return train, held, ceiling
