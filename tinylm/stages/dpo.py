"""Direct preference optimisation: the policy from ranked responses, without a reward model."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tinylm import leases, machine
from tinylm.config import BadInput, require
from tinylm.evaluate.heldout import eval_id, heldout
from tinylm.laws.accounting import flops_per_token
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.preferences import Ranked
from tinylm.text.shards import Dataset
from tinylm.train import batch, checkpoint, loop, losses, optim, rowwise, run, step
from tinylm.train.losses import Pairs
from tinylm.train.optim import OptimConfig


@dataclass(frozen=True)
class DpoConfig:
    """Which checkpoint is tuned, on which rankings, how far it may leave the reference."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4, decay=1.0))
    parent: str = ""
    """id of the run that is tuned, and that stays the reference"""
    data_id: str = ""
    """hash of the rankings of both splits"""
    steps: int = 200
    """optimiser steps"""
    pairs: int = 32
    """pairs a step"""
    beta: float = 0.5
    """nats of reward a nat of log-probability is worth"""
    smoothing: float = 0.0
    """share of labels taken to be flipped"""
    seed: int = 0
    """of the order of the pairs"""

    def __post_init__(self):
        require("steps", self.steps, 1, 1e9)
        require("pairs", self.pairs, 1, 1e6)
        require("beta", self.beta, 1e-9, 1e6)
        require("smoothing", self.smoothing, 0, 0.5)
        require("seed", self.seed, 0, 2**32 - 1)


def dpo(folder: Path, config: DpoConfig, parent: Path, train: Ranked, held: Ranked,
        data: Dataset, plan: machine.Plan, event: loop.Event | None = None) -> dict[str, Any]:
    """Tune the parent's final checkpoint on pairs and return the record.

    Its `preferences` hold the held-out loss (ln 2 a pair at the reference), accuracy, and how far
    the log-probabilities of chosen and rejected responses moved; its `loss` that on base text.
    """
    folder = Path(folder)
    with leases.hold(folder):
        if run.planned(folder) is None:
            checkpoint.usable(parent)
            check(config, train, held, plan)
        plan = run.settle(folder, config, "dpo", plan, data.folder.parent)
        if (done := run.record(folder)) is not None:
            return done
        check(config, train, held, plan)
        model, mesh = config.model, machine.mesh(plan.devices)
        tx = optim.optimiser(config.optim, model, mesh)
        before = checkpoint.final_params(parent, model)
        loss = losses.preference(model, config.beta, config.smoothing, plan)
        chunk = step.make_chunk(step.make_step(
            loss, tx, mesh, plan.micro, config.optim.nonfinite == "skip"))
        with loop.Clock(folder) as clock:
            with clock.doing("start"):
                pairs, others = (against(model, before, split) for split in (train, held))
                state = step.start(before, tx, optim.hyper(config.optim, config.steps))

            def batch_at(t: int) -> Pairs:
                rows = batch.order(len(pairs.tokens), config.seed, t, config.pairs)
                return Pairs(*(of[rows] for of in pairs))

            read = config.pairs * 2 * pairs.mask.shape[2]
            state, (finite,) = loop.train(
                folder, [loop.Member(folder / "metrics.jsonl", config.steps, event)], state, chunk,
                batch_at, read, plan, mesh, clock)
            with clock.doing("evaluate"):
                scored = heldout(model, state.params, data)._asdict() if finite else None
                judged = judge(model, state.params, others, config) if finite else None
        finite = finite and math.isfinite(judged["nats_per_pair"])
        return run.finish(
            folder, config, "dpo", "ok" if finite else "diverged",
            parent={"id": config.parent, "step": "final"}, data_id=config.data_id,
            tokenizer_id=data.tokenizer_id, eval_id=eval_id(data, model.T), seed=config.seed,
            tokens=config.steps * read, epochs=config.steps * config.pairs / len(pairs.tokens),
            loss=scored, preferences=judged if finite else None,
            flops={"exact": flops_per_token(model.shape) * config.steps * read, "six_nd": None})


def check(config: DpoConfig, train: Ranked, held: Ranked, plan: machine.Plan) -> None:
    """Refuse what cannot be tuned, before anything is compiled."""
    if (found := f"{train.id}{held.id}") != config.data_id:
        raise BadInput(f"the config is for rankings {config.data_id!r}, these are {found!r}; give "
                       "those or a new folder")
    step.check_rows(config.pairs, plan.devices, plan.micro)


def against(model: ModelConfig, params: Params, ranked: Ranked) -> Pairs:
    """Give every pair of a ranking with what the reference says of both."""
    n, i, j = np.nonzero(ranked.wins)
    tokens, mask = (np.stack([of[n, i], of[n, j]], axis=1) for of in ranked[:2])
    ref = rowwise.each(losses.of_row, model, params, (tokens, mask))
    return Pairs(tokens, mask, ref, ranked.wins[n, i, j])


def judge(model: ModelConfig, params: Params, pairs: Pairs, config: DpoConfig) -> dict[str, Any]:
    """Measure a policy on held-out pairs against its reference."""
    now = rowwise.each(losses.of_row, model, params, (pairs.tokens, pairs.mask))
    columns = (now[:, 0], now[:, 1], pairs.ref[:, 0], pairs.ref[:, 1], pairs.weights)
    _, sums = losses.dpo(*map(jnp.asarray, columns), beta=config.beta, smoothing=config.smoothing)
    means = {k: float(v) / float(sums["weight"]) for k, v in sums.items() if k != "weight"}
    moved = (now - pairs.ref).mean(axis=0)
    return {"pairs": len(now), **means, "chosen_moved_nats": float(moved[0]),
            "rejected_moved_nats": float(moved[1])}
