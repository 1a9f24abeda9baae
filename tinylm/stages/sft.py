"""Instruction tuning: the same step, on conversations, with the loss on what the assistant says."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinylm import config as configs
from tinylm import files, leases, machine
from tinylm.config import BadInput, require
from tinylm.evaluate.heldout import eval_id, heldout
from tinylm.laws.accounting import flops_per_token
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text import tasks
from tinylm.text.chat import Packed, conversations, pack, render
from tinylm.text.corpora import Corpus, Document
from tinylm.text.shards import Dataset
from tinylm.text.tokenizer import Tokenizer
from tinylm.train import batch, checkpoint, loop, losses, optim, rowwise, run, step
from tinylm.train.optim import OptimConfig

HELD = 2000
"""rows of held-out conversations to pack, about"""
PROBED = 128
"""of these that are looked at while training"""
TALKS = 0.25
"""rows of a corpus's conversations for one of tasks, where there are enough"""
CHARACTERS = 6
"""a token at most, on average"""


@dataclass(frozen=True)
class SftConfig:
    """Which checkpoint is tuned, on what, for how long."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(decay=1.0))
    parent: str = ""
    """id of the run whose final checkpoint is tuned"""
    data_id: str = ""
    """hash of the packed conversations"""
    steps: int = 200
    """optimiser steps"""
    rows: int = 16
    """rows a step"""
    replay: float = 0.0
    """share of the rows that are base text, one at least, so that it is not forgotten; all of their
    tokens are learnt from, so of the loss they are more: at .25, of short answers, half"""
    seed: int = 0
    """of the order of the rows"""
    probe_every: int = 100
    """steps between two looks at held-out answers, in metrics.jsonl; 0: none"""

    def __post_init__(self):
        require("steps", self.steps, 1, 1e9)
        require("rows", self.rows, 1, 1e6)
        require("replay", self.replay, 0, 1)
        require("probe_every", self.probe_every, 0, 1e9)
        require("seed", self.seed, 0, 2**32 - 1)

    @property
    def replayed(self) -> int:
        """Rows of base text a step."""
        return min(self.rows - 1, max(round(self.replay * self.rows), int(self.replay > 0)))


def conversations_id(train: Packed, held: Packed) -> str:
    """Hash the packed conversations of both splits: 16 hex digits."""
    arrays = [getattr(p, name) for p in (train, held) for name in ("tokens", "mask", "segments")]
    return configs.digest([files.sha256_of(np.ascontiguousarray(a)) for a in arrays])[:16]


def sft(
    folder: Path,
    config: SftConfig,
    parent: Path,
    train: Packed,
    held: Packed,
    data: Dataset,
    plan: machine.Plan,
    event: loop.Event | None = None,
) -> dict[str, Any]:
    """Tune the parent's final checkpoint and return the record.

    The record holds the held-out loss on assistant tokens before and after, and that on base text.
    """
    folder = Path(folder)
    with leases.hold(folder):
        if run.planned(folder) is None:  # refuse before anything of the run is written
            checkpoint.usable(parent)
            check(config, train, held, plan)
        plan = run.settle(folder, config, "sft", plan, data.folder.parent)
        if (done := run.record(folder)) is not None:
            return done
        check(config, train, held, plan)
        model, mesh = config.model, machine.mesh(plan.devices)
        tx = optim.optimiser(config.optim, model, mesh)
        before = checkpoint.final_params(parent, model)
        state = step.start(before, tx, optim.hyper(config.optim, config.steps))
        loss = losses.next_token(model, config.optim.z_loss, plan)
        chunk = step.make_chunk(step.make_step(
            loss, tx, mesh, plan.micro, config.optim.nonfinite == "skip"))

        def batch_at(t: int) -> batch.Batch:
            base = config.replayed
            rows = batch.order(len(train.tokens), config.seed, t, config.rows - base)
            talks = batch.Batch(train.tokens[rows], train.mask[rows], train.segments[rows])
            if not base:
                return talks
            text = batch.batch(data.train, config.seed, t, base, model.T)
            text = text._replace(segments=np.ones_like(text.tokens))
            spread = np.arange(config.rows).reshape(-1, plan.devices).T.reshape(-1)
            return batch.Batch(*(np.concatenate(both)[spread]
                                 for both in zip(talks, text, strict=True)))

        tokens = config.steps * config.rows * model.T
        some = Packed(*(of[:PROBED] for of in held[:3]), 0)
        with loop.Clock(folder) as clock:
            with clock.doing("evaluate"):
                answers = {"before": answers_nll(model, before, held)}
            state, (finite,) = loop.train(
                folder, [loop.Member(folder / "metrics.jsonl", config.steps, event)], state, chunk,
                batch_at, config.rows * model.T, plan, mesh, clock, probe=lambda now: {
                    "heldout/answers_nats_per_token": answers_nll(model, now.params, some)},
                probe_every=config.probe_every)
            with clock.doing("evaluate"):
                scored = heldout(model, state.params, data)._asdict() if finite else None
                answers["after"] = answers_nll(model, state.params, held)
                finite = finite and math.isfinite(answers["after"])
        return run.finish(folder, config, "sft", "ok" if finite else "diverged",
                          parent={"id": config.parent, "step": "final"}, data_id=config.data_id,
                          tokenizer_id=data.tokenizer_id, eval_id=eval_id(data, model.T),
                          seed=config.seed, tokens=tokens,
                          epochs=config.steps * (config.rows - config.replayed)
                          / len(train.tokens), loss=scored,
                          answers_nats_per_token=answers if finite else None,
                          flops={"exact": flops_per_token(model.shape) * tokens, "six_nd": None})


def check(config: SftConfig, train: Packed, held: Packed, plan: machine.Plan) -> None:
    """Refuse what cannot be tuned, before anything is compiled."""
    if (wanted := conversations_id(train, held)) != config.data_id:
        raise BadInput(f"the config is for conversations {config.data_id!r}, these are "
                       f"{wanted}; give those or a new folder")
    step.check_rows(config.rows, plan.devices, plan.micro)
    if not len(train.tokens) or not len(held.tokens):
        raise BadInput(f"{len(train.tokens)} training and {len(held.tokens)} held-out rows of "
                       "conversations; bring two or more with user and assistant turns")


def pack_splits(corpus: Corpus, tokenizer: Tokenizer, T: int, steps: int,
                rows: int = SftConfig.rows, count: int = 0, seed: int = 0) -> list[Packed]:
    """Render and pack the conversations (or neighbouring lines) of both splits, tasks among them.

    Of more text than `steps` of `rows` rows can read, or HELD rows held out, every n-th document
    is taken; beside `count` generated tasks, TALKS rows of conversations for one of tasks at most.
    """
    among = asked(count, tokenizer, T, seed) if count else []
    room = [math.ceil(TALKS * len(side.tokens)) for side in among] or [math.inf, math.inf]
    packed = [_pack(split, tokenizer, T, most, some) for split, most, some in zip(
        (corpus.train, corpus.heldout), (steps * rows, HELD), room, strict=True)]
    return mixed(packed, among, seed) if count else packed


def _pack(documents: list[Document], tokenizer: Tokenizer, T: int, rows: int,
          most: float) -> Packed:
    size = sum(len(d.text) for d in documents)
    documents = documents[::max(1, size // (rows * (T + 1) * CHARACTERS))]
    return pack(conversations(documents, tokenizer, T), T, most)


def asked(count: int, tokenizer: Tokenizer, T: int, seed: int) -> list[Packed]:
    """Render and pack generated tasks (text/tasks.py, of training's split): trained on, held out.
    """
    rendered = [render(tasks.conversation(t), tokenizer) for t in tasks.mixed("train", seed, count)]
    held = max(1, count // 25)
    return [pack(part, T) for part in (rendered[held:], rendered[:held])]


def mixed(packed: list[Packed], among: list[Packed], seed: int) -> list[Packed]:
    """Join the rows of two kinds, split by split."""
    return [joined([few, many], seed) for few, many in zip(packed, among, strict=True)]


def joined(parts: list[Packed], seed: int) -> Packed:
    """Join packed rows and shuffle them, so that every split of them holds a share of each."""
    rows = sum(len(part.tokens) for part in parts)
    order = batch.permute(np.arange(rows), rows, seed, 0)
    arrays = (np.concatenate([part[i] for part in parts])[order] for i in range(3))
    return Packed(*arrays, sum(part.dropped for part in parts))


def answers_nll(model: ModelConfig, params: Params, held: Packed) -> float:
    """Give the held-out loss on supervised tokens, nats a token."""
    sums = rowwise.each(_sums, model, params, batch.Batch(*held[:3]))
    nats, weight = (sums[key].sum(dtype=np.float64) for key in ("nats_per_token", "weight"))
    return float(nats / max(weight, 1.0))


def _sums(model: ModelConfig, params: Params, row: batch.Batch) -> losses.Sums:
    return losses.next_token(model)(params, jax.tree.map(lambda a: a[None], row))[1]
