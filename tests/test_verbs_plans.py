"""The line that `tinylm forecast` prints trains what the sweep's law is about."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from tinylm.laws.plan import cell
from tinylm.model.decoder import ModelConfig
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import cells
from tinylm.sweep.presets import LAPTOP
from tinylm.train import run
from tinylm.train.optim import OptimConfig
from tinylm.verbs.plans import train_flags

SWEEP = Path(__file__).parents[1] / "experiments/results/laptop/sweep"


def test_the_printed_flags_give_the_ladders_model_and_the_rules_rate(tmp_path):
    records = run.table(sorted(p.parent for p in SWEEP.glob("*/record.json")))
    model = replace(LAPTOP.base, D=152, tied=False)
    target = cell(LAPTOP.target, model.shape, LAPTOP.batch)
    (tmp_path / "text").mkdir()
    flags = train_flags(tmp_path, records, model, target, LAPTOP.batch)

    def taken(out: str, text: Path, model: ModelConfig = ModelConfig(),  # noqa: B008
              optim: OptimConfig = OptimConfig(), steps: int = 1000, batch: int = 512):  # noqa: B008
        return PretrainConfig(model, optim, steps, batch)

    got = tyro.cli(taken, args=shlex.split("--out x " + flags))
    wanted = cells.config(target, [model], LAPTOP.optim, LAPTOP.rule, LAPTOP.batch, "")
    assert got.optim.lr == pytest.approx(wanted.optim.lr, rel=1e-5)
    assert replace(got, optim=replace(got.optim, lr=wanted.optim.lr)) == wanted
