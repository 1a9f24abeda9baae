"""Pretrain one model on one dataset, or a population of one shape; evaluate, write the records.

A trunk is a run that never decays and keeps its checkpoints at the steps where runs branch off. A
branch goes on from such a checkpoint and decays to its own horizon: bit for bit the run that its
config would be without a parent, for the decay's compute alone.
"""

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import files, leases, machine
from tinylm.config import BadInput, canonical, digest, from_json, identity, require, to_json
from tinylm.evaluate.heldout import eval_id, heldout
from tinylm.laws.accounting import STATE_BYTES, flops_per_token, parameters, six_nd
from tinylm.model.decoder import ModelConfig, Params, init
from tinylm.text.shards import Dataset
from tinylm.train import batch, checkpoint, loop, losses, optim, population, run, step
from tinylm.train.optim import OptimConfig

MOST_EPOCHS = 4.0


@dataclass(frozen=True)
class Parent:
    """Where a branch leaves its trunk."""

    id: str
    """of the trunk"""
    step: int
    """optimiser steps that are the trunk's"""


@dataclass(frozen=True)
class PretrainConfig:
    """What is trained, on what and for how long: the whole of it is the run's id."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    """optimiser steps"""
    batch: int = 512
    """tokens a step"""
    seed: int = 0
    """of the initial parameters and of the order of the data"""
    data_id: str = ""
    """identity of the dataset, its tokenizer included"""
    forecast_sha256: str = ""
    """of the forecast that this run tests; empty for none"""
    parent: Parent | None = None
    """of a branch"""
    branches: tuple[int, ...] = ()
    """of a trunk: the steps whose checkpoints are kept for branches"""
    init_scale: float = 1.0
    """factor on the standard deviations of the initial parameters"""

    def __post_init__(self):
        if self.steps < 1:
            raise BadInput(f"steps={self.steps} is below 1; choose 1 or more")
        require("seed", self.seed, 0, 2**32 - 1)
        require("init_scale", self.init_scale, 0, 1e6)
        if self.parent:  # later than that the rate falls
            require("parent.step", self.parent.step, 1,
                    self.steps - max(1.0, self.optim.decay * self.steps))
            if not self.optim.warmup_steps:
                raise BadInput("a branch has no optim.warmup_steps; give those of its trunk, since "
                               "a share of its own steps would be another schedule")
        for at in self.branches:
            require("branches", at, 1, self.steps)
        if self.batch < 1 or self.batch % self.model.T:
            low = max(1, self.batch // self.model.T) * self.model.T
            raise BadInput(f"batch={self.batch} tokens is not a multiple of the context "
                           f"T={self.model.T}; choose {low} or {low + self.model.T}")

    @property
    def rows(self) -> int:
        """Sequences a step."""
        return self.batch // self.model.T

    @property
    def program(self) -> str:
        """What the compiled program depends on: members of a population share it."""
        return canonical([to_json(self.model), to_json(self.optim.program), self.rows])

    @property
    def tokens(self) -> int:
        """Tokens trained on in all."""
        return self.steps * self.batch

    @property
    def flops(self) -> float:
        """Exact training FLOPs (see laws/accounting); a branch counts its trunk's part too."""
        return flops_per_token(self.model.shape) * self.tokens

    @property
    def first(self) -> int:
        """The step it begins at."""
        return self.parent.step if self.parent else 0

    @property
    def spent(self) -> float:
        """Training FLOPs that this run itself takes."""
        return self.flops * (self.steps - self.first) / self.steps

    @property
    def kind(self) -> Literal["pretrain", "branch", "trunk"]:
        """What its record is called."""
        return "branch" if self.parent else "trunk" if self.branches else "pretrain"

    @property
    def unbranched(self) -> "PretrainConfig":
        """What a branch shares with its trunk, and both with the same run trained alone."""
        return replace(self, steps=1, parent=None, branches=(),
                       optim=replace(self.optim, decay=0.0))


def check(config: PretrainConfig, data: Dataset, plan: machine.Plan) -> float:
    """Refuse what cannot be trained, before anything is compiled; return the epochs."""
    if config.data_id != data.id:
        raise BadInput(f"the config is for dataset {config.data_id!r}, {data.folder} is "
                       f"{data.id}; give that dataset or a new folder")
    if config.model.V != data.V:
        raise BadInput(f"the model has V={config.model.V}, the tokenizer {data.V}; choose "
                       f"V={data.V}")
    step.check_rows(config.rows, plan.devices, plan.micro)
    batch.windows(data.heldout, config.model.T)
    held = batch.windows(data.train, config.model.T) * config.model.T
    if config.tokens > MOST_EPOCHS * held:
        raise BadInput(f"{config.tokens} tokens are {config.tokens / held:.1f} epochs of the "
                       f"{held} held; at most {MOST_EPOCHS:g} are allowed: bring more text or "
                       "train fewer steps")
    return config.tokens / held


def check_memory(model: ModelConfig) -> None:
    """Refuse a model whose weights, gradients and optimiser a device does not hold."""
    need, held = STATE_BYTES * sum(counts(model).values()), machine.memory()
    if need > held:
        raise BadInput(f"a model of D={model.D}, L={model.L}, V={model.V} takes {need / 1e9:,.0f} "
                       f"GB to train and a device here has {held / 1e9:,.0f}; choose a smaller one")


def pretrain(
    folder: Path,
    config: PretrainConfig,
    data: Dataset,
    plan: machine.Plan,
    event: loop.Event | None = None,
    trunk: Path | None = None,
) -> dict[str, Any]:
    """Train, evaluate and return the record; a finished run returns its record at once.

    `trunk` is the folder of a branch's trunk. A trunk itself is not evaluated.
    """
    folder = Path(folder)
    with leases.hold(folder):
        if run.planned(folder) is None:  # refuse before anything of the run is written
            check(config, data, plan)
            machine.mesh(plan.devices)
        plan = run.settle(folder, config, config.kind, plan, data.folder.parent)
        if (done := run.record(folder)) is not None:
            return done
        if plan.population > 1:
            raise BadInput(f"{folder} was begun as one of a population of {plan.population}; go on "
                           "with the sweep it belongs to, or choose a new folder")
        epochs = check(config, data, plan)
        if epochs > 1:
            print(f"{folder.name}: {epochs:.2f} epochs of the training split", file=sys.stderr)
        model, mesh = config.model, machine.mesh(plan.devices)
        begin, chunk = _program(model, config.optim.program, plan)

        def batch_at(t: int) -> batch.Batch:
            return batch.batch(data.train, config.seed, t, config.rows, model.T)

        with loop.Clock(folder) as clock:
            with clock.doing("start"):
                state = _begun(begin, config)
                if config.parent:
                    state = branched(config, state, trunk)
            state, (finite,) = loop.train(
                folder, [loop.Member(folder / "metrics.jsonl", config.steps, event)], state, chunk,
                batch_at, config.batch, plan, mesh, clock, (*config.branches, *plan.kept))
            return _conclude(folder, config, data, clock, epochs, state.params if finite else None)


def pretrain_population(
    folder: Path,
    members: dict[str, PretrainConfig],
    data: Dataset,
    plan: machine.Plan,
    event: Callable[[str, int, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Train configs of one program together, each in its folder folder/NAME; return the records.

    Checkpoints are of them all and lie in folder/population-ID until every record is written.
    `event` is told a member's name too. BadInput where the members share no program, are more than
    the plan's, or were begun otherwise.
    """
    configs, folder = list(members.values()), Path(folder)
    places = {name: folder / name for name in members}
    common = folder / f"population-{digest([identity(c) for c in configs])[:8]}"
    _check_population(members, data, plan)
    with contextlib.ExitStack() as held:
        for place in (common, *places.values()):
            held.enter_context(leases.hold(place))
        for name, config in members.items():
            bound = run.settle(places[name], config, "pretrain", plan, data.folder.parent)
            if bound != plan:
                raise BadInput(f"{places[name]} was begun with {bound}, this is {plan}; "
                               "go on as it was begun, or choose a new folder")
        if any(run.record(place) is None for place in places.values()):
            _train_population(common, places, configs, data, plan, event)
        shutil.rmtree(common / "checkpoints", ignore_errors=True)
        return [run.record(place) for place in places.values()]


def _check_population(members: dict[str, PretrainConfig], data: Dataset,
                      plan: machine.Plan) -> None:
    if not 2 <= plan.population >= len(members) >= 1:
        raise BadInput(f"{len(members)} members do not fit a population of {plan.population}; plan "
                       "a population of 2 or more and of as many as there are")
    (first, one), *_ = members.items()
    for name, config in members.items():
        if config.program != one.program:
            raise BadInput(f"{name} has another model, optimiser or batch than {first}; members "
                           "of a population may differ in rates, seed, scale and length: "
                           "train it apart")
        check(config, data, plan)
    machine.mesh(plan.devices)


def _train_population(common: Path, places: dict[str, Path], configs: list[PretrainConfig],
                      data: Dataset, plan: machine.Plan, event: Any) -> None:
    """Train to the last member's end, then score and record one member after the other."""
    one, mesh = configs[0], machine.mesh(plan.devices)
    begin, chunk = _program(one.model, one.optim.program, plan)

    def batch_at(t: int) -> batch.Batch:
        rows = [batch.batch(data.train, c.seed, t, c.rows, c.model.T) for c in configs]
        rows += rows[-1:] * (plan.population - len(rows))
        return jax.tree.map(lambda *each: np.stack(each), *rows)

    lines = [loop.Member(place / "metrics.jsonl", c.steps, event and functools.partial(event, name))
             for (name, place), c in zip(places.items(), configs, strict=True)]
    with loop.Clock(common) as clock:
        with clock.doing("start"):
            states = population.stack([_begun(begin, c) for c in configs], plan.population)
        states, finite = loop.train(common, lines, states, chunk, batch_at, one.batch, plan, mesh,
                                    clock)
        for i, (place, config) in enumerate(zip(places.values(), configs, strict=True)):
            if run.record(place) is None:
                state = population.member(states, i)
                if finite[i]:
                    with clock.doing("save"):
                        checkpoint.save(place / "checkpoints", state, run=identity(config))
                _conclude(place, config, data, clock, check(config, data, plan),
                          state.params if finite[i] else None)


def _conclude(folder: Path, config: PretrainConfig, data: Dataset, clock: loop.Clock,
              epochs: float, params: Params | None) -> dict[str, Any]:
    """Score the final parameters (None: the run diverged), a trunk's not; write the record."""
    model = config.model
    with clock.doing("evaluate"):
        scored = (heldout(model, params, data)._asdict()
                  if params and config.kind != "trunk" else None)
    return run.finish(folder, config, config.kind, "ok" if params else "diverged",
                      parent=to_json(config.parent) if config.parent else None,
                      tokenizer_id=data.tokenizer_id, data_id=data.id,
                      eval_id=eval_id(data, model.T), seed=config.seed, params=counts(model),
                      tokens=config.tokens, epochs=epochs, loss=scored,
                      flops={"exact": config.flops, "spent": config.spent, "six_nd": six_nd(
                          sum(counts(model)[k] for k in ("head", "blocks")), config.tokens)})


def branched(config: PretrainConfig, like: step.State, trunk: Path | None) -> step.State:
    """Give the state in which a branch leaves its trunk, its own schedule in place."""
    if trunk is None or not (trunk / "config.json").exists():
        raise BadInput(f"this branch's trunk {config.parent.id} is not there; train that first")
    kept = files.read_json(trunk / "config.json")
    theirs = from_json(PretrainConfig, kept["config"], str(trunk))
    if identity(theirs) != config.parent.id or theirs.unbranched != config.unbranched:
        raise BadInput(f"{trunk} is run {identity(theirs)}, of other settings than the trunk "
                       f"{config.parent.id} of this branch; give the folder of that trunk")
    if (kept["code_id"], kept["versions"]) != (run.code_id(), machine.versions()):
        raise BadInput(f"{trunk} was trained by other code or versions than are here; go on with "
                       "those, or choose a new folder")
    place = checkpoint.at(trunk / "checkpoints", config.parent.step)
    if not place.exists():
        raise BadInput(f"{trunk} kept no checkpoint at step {config.parent.step} (did it diverge?)"
                       "; if not, delete its folder and train it again")
    return checkpoint.restore(place, like)[0]._replace(hyper=like.hyper)


def counts(model: ModelConfig) -> dict[str, int]:
    """Count the parameters: embedding, head, blocks."""
    if model.kind == "position_weights":
        rank, head = min(model.D, model.V), model.V * model.D if model.D < model.V else 0
        return {"embedding": model.L * model.V * rank, "head": head, "blocks": 0}
    return parameters(model.shape)._asdict()


@functools.cache
def _program(model: ModelConfig, fixed: optim.OptimConfig, plan: machine.Plan):
    """Build the compiled start and chunk that all runs of one shape share."""
    mesh = machine.mesh(plan.devices)
    tx = optim.optimiser(fixed, model, mesh)
    loss = losses.next_token(model, fixed.z_loss, plan)
    begin = jax.jit(lambda key, hyper, scale: step.start(init(model, key, scale), tx, hyper))
    one = step.make_step(loss, tx, mesh, plan.micro, fixed.nonfinite == "skip")
    return begin, step.make_chunk(
        population.make_step(one, plan.vmap) if plan.population > 1 else one)


def _begun(begin: Any, config: PretrainConfig) -> step.State:
    return begin(jax.random.key(config.seed), optim.hyper(config.optim, config.steps),
                 jnp.float32(config.init_scale))
