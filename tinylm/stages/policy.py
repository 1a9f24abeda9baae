"""Policy optimisation against a judge: PPO in InstructGPT's form, and GRPO with its relatives.

Each rollout samples responses to the next prompts, has them judged, reads log-probabilities, the
exact KL to the reference and (PPO) values off full forward passes, and takes `epochs` x
`minibatches` steps of the usual kind. The state is a run's: a killed one goes on to the same bits.
PPO's parameters hold a second trunk, `value`, beside the policy's.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinylm import files, leases, machine
from tinylm.config import BadInput, require
from tinylm.evaluate.heldout import eval_id, heldout
from tinylm.laws.accounting import flops_per_token
from tinylm.model import heads
from tinylm.model.decoder import ModelConfig, Params, rebuild
from tinylm.text.shards import Dataset
from tinylm.train import batch, checkpoint, loop, losses, optim, rewards, rowwise, run, step
from tinylm.train.optim import OptimConfig
from tinylm.train.rollout import Judge, Measured, Rollout, measured, padded, rollout


@dataclass(frozen=True)
class Dials:
    """How responses are sampled, learnt from and guarded."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4, decay=1.0))
    """the optimiser and its schedule"""
    rollouts: int = 50
    """times that responses are sampled"""
    prompts: int = 16
    """prompts a rollout"""
    responses: int = 8
    """to each prompt"""
    budget: int = 32
    """tokens of a response at most"""
    temperature: float = 1.0
    """of the sampler, and of every log-probability here"""
    beta: float = 0.05
    """reward that a nat of KL to the reference costs"""
    kl: Literal["reward", "k1", "k2", "k3"] = "reward"
    """where that cost is: in the reward, or as such an estimate in the loss (GRPO only)"""
    epochs: int = 1
    """times that a rollout's responses are learnt from"""
    minibatches: int = 1
    """steps an epoch"""
    clip_low: float = 0.2
    """the ratio to the sampler's policy is held above 1 minus this"""
    clip_high: float = 0.2
    """and below 1 plus this"""
    value_clip: float = 0.2
    """values are held this near to those of the rollout (PPO)"""
    value_weight: float = 0.1
    """of the value loss (PPO)"""
    lam: float = 0.95
    """of the generalised advantage (PPO); its gamma is 1"""
    baseline: Literal["mean", "others"] = "mean"
    """of a group: with the response itself, or without (RLOO)"""
    scale: Literal["none", "group", "batch"] = "none"
    """what a group's advantages are divided by the deviation of"""
    length: Literal["response", "tokens", "budget"] = "tokens"
    """what counts once: a response's mean, a token, or a response over the budget"""
    truncated: float = -1.0
    """most that a response is scored that does not close its turn within the budget"""
    max_kl: float = 50.0
    """nats of KL to the reference, a response, at which the run ends"""
    min_entropy: float = 0.0
    """nats a token below which the run ends"""
    max_truncated: float = 1.0
    """share of truncated responses above which the run ends"""
    seed: int = 0
    """of the order of the prompts and of all draws"""

    def __post_init__(self):
        for name, low, high in (
                ("rollouts", 1, 1e9), ("prompts", 1, 1e6), ("responses", 1, 1e6), ("beta", 0, 1e6),
                ("budget", 1, 1e6), ("temperature", 1e-3, 1e3), ("epochs", 1, 1e3),
                ("minibatches", 1, 1e6), ("clip_low", 0, 1), ("clip_high", 0, 1e6),
                ("value_clip", 0, 1e6), ("value_weight", 0, 1e6), ("lam", 0, 1),
                ("truncated", -1e6, 1e6), ("max_kl", 0, 1e30), ("min_entropy", 0, 1e3),
                ("max_truncated", 0, 1), ("seed", 0, 2**32 - 1)):
            require(name, getattr(self, name), low, high)
        if self.rows % self.minibatches:
            raise BadInput(f"{self.rows} responses a rollout do not divide into "
                           f"minibatches={self.minibatches}; choose a divisor")

    @property
    def rows(self) -> int:
        """Responses a rollout."""
        return self.prompts * self.responses

    @property
    def updates(self) -> int:
        """Optimiser steps a rollout."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class PolicyConfig(Dials):
    """Which checkpoint is tuned, against which judge, on which prompts, by which method."""

    method: Literal["ppo", "grpo"] = "grpo"
    """ppo: value model and GAE; grpo: the other responses to the prompt are the baseline"""
    model: ModelConfig = field(default_factory=ModelConfig)
    parent: str = ""
    """id of the run that is tuned, and that stays the reference"""
    judge: str = ""
    """id of the reward model, or the name of the rubric"""
    data_id: str = ""
    """hash of the prompts"""

    def __post_init__(self):
        super().__post_init__()
        if self.method == "ppo" and self.kl != "reward":
            raise BadInput(f"kl={self.kl!r} is GRPO's; PPO's KL is in the reward")
        if self.method == "grpo" and self.responses < 2:
            raise BadInput("responses=1 leaves GRPO no baseline; choose 2 or more, or PPO")


class Experience(NamedTuple):
    """What a policy loss reads: the rows, and what was true of them when they were sampled."""

    tokens: Any
    mask: Any
    old: Any
    ref: Any
    advantages: Any
    old_values: Any
    returns: Any


def policy(folder: Path, config: PolicyConfig, parent: Path, prompts: Sequence[np.ndarray],
           judge: Judge, data: Dataset, plan: machine.Plan,
           event: loop.Event | None = None, watch: Judge | None = None) -> dict[str, Any]:
    """Tune the parent's final checkpoint against a judge and return the record.

    `prompts` are ids that end with <|assistant|>; the config's data_id is theirs (`prompts_id`).
    `watch` scores the rollouts too, by a rubric that the policy does not learn from (train/gold).
    The record's `policy` holds the first and the last rollout's means; `ended` the guard that
    stopped it, if one did; its tokens are those of the rows, padding included, and its FLOPs those
    of the policy's learning alone.
    """
    folder = Path(folder)
    with leases.hold(folder):
        if run.planned(folder) is None:
            checkpoint.usable(parent)
            check(config, prompts, plan)
        plan = run.settle(folder, config, config.method, replace(plan, chunk=config.updates),
                          data.folder.parent)
        if (done := run.record(folder)) is not None:
            return done
        check(config, prompts, plan)
        model, mesh = config.model, machine.mesh(plan.devices)
        ref = step.replicate(mesh, checkpoint.final_params(parent, model))
        tx = optim.optimiser(config.optim, model, mesh)
        steps = config.rollouts * config.updates
        state = step.start(started(config, ref), tx, optim.hyper(config.optim, steps))
        update = jax.jit(step.make_step(policy_loss(config, plan), tx, mesh, plan.micro,
                                        config.optim.nonfinite == "skip"))
        metrics, guard = folder / "metrics.jsonl", folder / "guard.json"

        if guard.exists() and files.read_json(guard)["step"] not in checkpoint.held(folder):
            guard.unlink()  # the end that it speaks of was lost with the process; it comes again

        def batch_at(t: int) -> np.ndarray:
            return batch.order(len(prompts), config.seed, t // config.updates, config.prompts)

        with loop.Clock(folder) as clock:
            chunk = functools.partial(turn, config, ref, prompts, judge, watch, update, mesh, clock,
                                      guard)
            state, (finite,) = loop.train(
                folder, [loop.Member(metrics, steps, event)], state, chunk, batch_at,
                config.rows * config.budget // config.updates, plan, mesh, clock,
                over=guard.exists)
            with clock.doing("evaluate"):
                scored = heldout(model, spoken(state.params), data)._asdict() if finite else None
        rows = files.read_lines(metrics)
        ended = files.read_json(guard)["reason"] if guard.exists() else ""
        wide = padded(prompts) + config.budget - 1
        tokens = rows[-1]["step"] // config.updates * config.rows * wide
        return run.finish(
            folder, config, config.method, "ok" if finite else "diverged", ended=ended,
            parent={"id": config.parent, "step": "final"}, data_id=config.data_id,
            tokenizer_id=data.tokenizer_id, eval_id=eval_id(data, model.T), seed=config.seed,
            tokens=tokens, epochs=rows[-1]["step"] / config.updates * config.prompts / len(prompts),
            loss=scored, policy={"first": rows[0], "last": rows[-1]},
            flops={"exact": flops_per_token(model.shape) * tokens * config.epochs, "six_nd": None})


def check(config: PolicyConfig, prompts: Sequence[np.ndarray], plan: machine.Plan) -> None:
    """Refuse what cannot be tuned, before anything is compiled."""
    if config.data_id != (found := prompts_id(prompts)):
        raise BadInput(f"the config is for prompts {config.data_id!r}, these are {found!r}; give "
                       "those or a new folder")
    if (width := padded(prompts)) + config.budget > config.model.T + 1:
        raise BadInput(f"prompts of up to {width} and responses of {config.budget} tokens do not "
                       f"fit T={config.model.T}; lower the budget or bring shorter prompts")
    step.check_rows(config.rows // config.minibatches, plan.devices, plan.micro)
    step.check_rows(config.prompts, plan.devices, 1)


def prompts_id(prompts: Sequence[np.ndarray]) -> str:
    """Hash prompts in their order: 16 hex digits."""
    return files.sha256_of(b"".join(np.int32([len(p), *p]).tobytes() for p in prompts))[:16]


def started(config: PolicyConfig, ref: Params) -> Params:
    """Give the parameters before the first step: PPO's value trunk is the policy's, its head 0."""
    if config.method == "grpo":
        return ref
    value = heads.with_head(config.model, ref, jax.random.key(config.seed))
    head = jax.tree.map(jnp.zeros_like, value["score_head"])
    return jax.tree.map(jnp.copy, {**ref, "value": {**value, "score_head": head}})


def spoken(params: Params) -> Params:
    """Give the policy without its value trunk."""
    return {name: of for name, of in params.items() if name != "value"}


def policy_loss(config: PolicyConfig, plan: machine.Plan) -> losses.Loss:
    """Build the loss of the method on Experience, its advantages constant to it."""
    def loss(params: Params, seen: Experience) -> tuple[Array, losses.Sums]:
        tokens, model = seen.tokens, config.model
        own = rebuild(model, spoken(params), plan)
        x, logits = own.states(tokens[:, :-1], mixed=True), own.ending()
        logp = losses.where_counted(
            lambda x, t: losses.token_logp(logits(x), t, config.temperature), seen.mask, x,
            tokens[:, 1:])
        if config.method == "ppo":
            values = heads.scores(model, params["value"], tokens[:, :-1], plan=plan)
            return losses.ppo(logp, values, seen.old, seen.old_values, seen.advantages,
                              seen.returns, seen.mask, clip=config.clip_low,
                              value_clip=config.value_clip, value_weight=config.value_weight)
        inside = config.kl != "reward"
        return losses.grpo(logp, seen.old, seen.ref, seen.advantages[:, 0], seen.mask,
                           low=config.clip_low, high=config.clip_high, length=config.length,
                           beta=config.beta if inside else 0.0, budget=config.budget,
                           kl=config.kl if inside else "k2")

    return loss


def turn(config: PolicyConfig, ref: Params, prompts: Sequence[np.ndarray], judge: Judge,
         watch: Judge | None, update: step.Step, mesh: jax.sharding.Mesh, clock: loop.Clock,
         guard: Path, state: step.State, batches: Array, n: int
         ) -> tuple[step.State, step.Metrics]:
    """Sample, judge and learn once: what loop.train calls a chunk, of `updates` steps."""
    number = int(state.step) // config.updates
    asked = np.repeat(np.asarray(batches)[0], config.responses)
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    place = step.by_row(mesh)
    with clock.doing("sample"):
        rolled = rollout(config.model, spoken(state.params), [prompts[i] for i in asked],
                         padded(prompts), config.budget, key, config.temperature, place)
    scores = judge(rolled, asked)
    scores = np.where(rolled.ended > 0, scores, np.minimum(scores, config.truncated))
    found = measured(config.model, spoken(state.params), ref, rolled, config.temperature)
    told = summary(rolled, scores, found)
    if watch:
        told["gold"] = float(watch(rolled, asked).mean())
    if reason := tripped(config, told):
        files.write_json(guard, {"reason": f"rollout {number}: {reason}",
                                 "step": int(state.step) + n})
        still = {**told, "policy_loss": 0.0}
        return state._replace(step=state.step + n), {k: np.full(n, v) for k, v in still.items()}
    seen = experience(config, state.params, rolled, scores.astype(np.float32), found)
    order = batch.order(config.rows, config.seed, number, config.epochs * config.rows)
    log = []
    for rows in order.reshape(n, -1):
        state, metrics = update(state, Experience(*(of[rows] for of in seen)))
        log.append(metrics)
    return state, {**{k: np.full(n, v) for k, v in told.items()},
                   **{k: np.array([row[k] for row in log]) for k in log[0]}}


def summary(rolled: Rollout, scores: np.ndarray, found: Measured) -> dict[str, float]:
    """Give a rollout's means: of responses, and of tokens for entropy and nats a token."""
    mask, count = rolled.mask, rolled.mask.sum()
    return {"reward": float(scores.mean()), "reward_sd": float(scores.std()),
            "kl_nats": float((found.kl * mask).sum(1).mean()),
            "entropy_nats": float((found.entropy * mask).sum() / count),
            "nats_per_token": -float((found.logp * mask).sum() / count),
            "length_tokens": float(mask.sum(1).mean()), "ended_share": float(rolled.ended.mean()),
            "leaked_share": float(rolled.leaked.mean()),
            "truncated_share": float(1 - (rolled.ended + rolled.leaked).mean())}


def tripped(config: PolicyConfig, told: dict[str, float]) -> str:
    """Say which guard a rollout trips; empty for none."""
    for name, value, bad in (
            ("kl_nats", config.max_kl, told["kl_nats"] > config.max_kl),
            ("entropy_nats", config.min_entropy, told["entropy_nats"] < config.min_entropy),
            ("truncated_share", config.max_truncated,
             told["truncated_share"] > config.max_truncated)):
        if bad:
            return f"{name} {told[name]:.3g} is past its limit {value:g}"
    odd = [name for name, value in told.items() if not math.isfinite(value)]
    return f"{odd[0]} is not finite" if odd else ""


def experience(config: PolicyConfig, params: Params, rolled: Rollout, scores: np.ndarray,
               found: Measured) -> Experience:
    """Turn scores into advantages, once for the whole rollout, on the host."""
    mask, zeros = jnp.asarray(rolled.mask), np.zeros_like(rolled.mask)
    logp, ref = jnp.asarray(found.logp), jnp.asarray(found.ref)
    shaped = rewards.shaped(jnp.asarray(scores), logp, ref, mask,
                            beta=config.beta if config.kl == "reward" else 0.0)
    values, returns = zeros, zeros
    if config.method == "ppo":
        values = rowwise.each(_values, config.model, params["value"], rolled.tokens) * rolled.mask
        advantages, returns = rewards.gae(shaped, jnp.asarray(values), mask, gamma=1.0,
                                          lam=config.lam)
        advantages = rewards.whitened(advantages, mask)
    else:
        totals = shaped.sum(axis=1).reshape(config.prompts, config.responses)
        each = rewards.group_advantages(totals, jnp.ones_like(totals), baseline=config.baseline,
                                        scale=config.scale)
        advantages = jnp.broadcast_to(each.reshape(-1, 1), mask.shape)
    kept = (rolled.tokens, rolled.mask, found.logp, found.ref, advantages, values, returns)
    return Experience(*map(np.asarray, kept))


def _values(model: ModelConfig, value: Params, row: Array) -> Array:
    """Give the value before each token of a row, [T]."""
    return heads.scores(model, value, row[None, :-1])[0]
