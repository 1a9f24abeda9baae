"""A reward model: a tuned checkpoint with a scalar head, trained on ranked responses.

Bradley-Terry over all pairs of a prompt at once, the score read at the response's last token
(InstructGPT, 2203.02155); one epoch unless told otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import leases, machine
from tinylm.config import BadInput, require
from tinylm.evaluate.rates import share
from tinylm.laws.accounting import flops_per_token
from tinylm.model import heads
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.preferences import Ranked
from tinylm.train import batch, checkpoint, loop, losses, optim, rowwise, run, step
from tinylm.train.optim import OptimConfig
from tinylm.train.rollout import Rollout

BINS = 10
"""of the calibration curve"""


@dataclass(frozen=True)
class RewardConfig:
    """Which checkpoint becomes a reward model, on which rankings, for how long."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, decay=1.0))
    parent: str = ""
    """id of the run whose final checkpoint is given a head"""
    data_id: str = ""
    """hash of the rankings of both splits"""
    steps: int = 200
    """optimiser steps"""
    prompts: int = 16
    """prompts a step, each with all its responses"""
    center: float = 0.0
    """pull of the two scores' sum to 0"""
    ceiling: float = 0.0
    """accuracy of a perfect judge on these noisy labels; 0: unknown"""
    seed: int = 0
    """of the head and the order of the prompts"""

    def __post_init__(self):
        require("steps", self.steps, 1, 1e9)
        require("prompts", self.prompts, 1, 1e6)
        require("center", self.center, 0, 1e6)
        require("ceiling", self.ceiling, 0, 1)
        require("seed", self.seed, 0, 2**32 - 1)


def reward(folder: Path, config: RewardConfig, parent: Path, train: Ranked, held: Ranked,
           tokenizer_id: str, text: Path, plan: machine.Plan,
           event: loop.Event | None = None) -> dict[str, Any]:
    """Train on one split of the rankings, judge on the other, return the record.

    Its `preferences` hold accuracy with interval, the ceiling, nats a pair (ln 2 knows nothing),
    the calibration curve, and the scores' mean and deviation on the training responses, by which
    `checkpoint.final_scorer` normalises the head.
    """
    folder = Path(folder)
    with leases.hold(folder):
        if run.planned(folder) is None:
            checkpoint.usable(parent)
            check(config, train, held, plan)
        plan = run.settle(folder, config, "reward", plan, text)
        if (done := run.record(folder)) is not None:
            return done
        check(config, train, held, plan)
        model, mesh = config.model, machine.mesh(plan.devices)
        tx = optim.optimiser(config.optim, model, mesh)
        trunk = checkpoint.final_params(parent, model)
        state = step.start(heads.with_head(model, trunk, jax.random.key(config.seed)), tx,
                           optim.hyper(config.optim, config.steps))
        loss = losses.ranking(model, config.center, plan)
        chunk = step.make_chunk(step.make_step(
            loss, tx, mesh, plan.micro, config.optim.nonfinite == "skip"))

        def batch_at(t: int) -> Ranked:
            rows = batch.order(len(train.tokens), config.seed, t, config.prompts)
            return Ranked(*(of[rows] for of in train))

        read = config.prompts * train.mask.shape[1] * train.mask.shape[2]
        with loop.Clock(folder) as clock:
            state, (finite,) = loop.train(
                folder, [loop.Member(folder / "metrics.jsonl", config.steps, event)], state, chunk,
                batch_at, read, plan, mesh, clock)
            with clock.doing("evaluate"):
                judged = judge(model, state.params, train, held) if finite else None
        finite = finite and all(map(math.isfinite, (
            judged["nats_per_pair"], *judged["scores"].values())))
        return run.finish(
            folder, config, "reward", "ok" if finite else "diverged",
            parent={"id": config.parent, "step": "final"}, data_id=config.data_id,
            tokenizer_id=tokenizer_id, eval_id=config.data_id, seed=config.seed,
            tokens=config.steps * read, epochs=config.steps * config.prompts / len(train.tokens),
            loss=None, preferences=judged if finite else None,
            flops={"exact": flops_per_token(model.shape) * config.steps * read, "six_nd": None})


def check(config: RewardConfig, train: Ranked, held: Ranked, plan: machine.Plan) -> None:
    """Refuse what cannot be trained, before anything is compiled."""
    if (found := f"{train.id}{held.id}") != config.data_id:
        raise BadInput(f"the config is for rankings {config.data_id!r}, these are {found!r}; give "
                       "those or a new folder")
    step.check_rows(config.prompts, plan.devices, plan.micro)


def judge(model: ModelConfig, params: Params, train: Ranked, held: Ranked) -> dict[str, Any]:
    """Measure a reward model on held-out rankings, and its scores on the training responses."""
    scores, told = scored(model, params, held), scored(model, params, train)
    gaps = scores[:, :, None] - scores[:, None, :]
    right = ((np.sign(gaps) + 1) / 2 * held.wins).sum((1, 2)) / held.wins.sum((1, 2))
    found, apart = share(jnp.asarray(right), jnp.ones(len(right))), gaps[held.wins > 0]
    real = told[train.mask.max(axis=2) > 0]
    return {"prompts": len(right), "pairs": len(apart), "accuracy": float(found.rate),
            "low95": float(found.low), "high95": float(found.high),
            "nats_per_pair": float(np.mean(np.logaddexp(0.0, -apart))),
            "calibration": calibration(apart),
            "scores": {"mean": float(real.mean()), "deviation": float(max(real.std(), 1e-6))}}


def calibration(apart: np.ndarray) -> list[dict[str, float]]:
    """Give, by bin of what it thought of a pair, the mean thought, the share right and the count.

    `apart` are preferred minus other scores; every pair counts from its higher score's side.
    """
    sure = 1 / (1 + np.exp(-np.abs(apart)))
    right, bins = (np.sign(apart) + 1) / 2, np.minimum((2 * sure - 1) * BINS, BINS - 1).astype(int)
    return [{"thought": float(sure[bins == b].mean()), "right": float(right[bins == b].mean()),
             "pairs": int((bins == b).sum())} for b in np.unique(bins)]


def judge_of(model: ModelConfig, params: Params) -> Callable[[Rollout, np.ndarray], np.ndarray]:
    """Make a reward model the judge of a policy's rollouts."""
    def judged(rolled: Rollout, prompts: np.ndarray) -> np.ndarray:
        wins = np.zeros((len(rolled.tokens), 1, 1), np.float32)
        return scored(model, params, Ranked(rolled.tokens[:, None], rolled.mask[:, None], wins)
                      )[:, 0]

    return judged


def scored(model: ModelConfig, params: Params, ranked: Ranked) -> np.ndarray:
    """Give every response's score, [prompts, R]."""
    return rowwise.each(_scores, model, params, ranked)


def _scores(model: ModelConfig, params: Params, row: Ranked) -> jax.Array:
    return losses.response_scores(model, params, jax.tree.map(lambda a: a[None], row))[0]
