"""Turn cells of a compute plan into run configs: the ladder of widths and the rate rule."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tinylm.config import BadInput, identity
from tinylm.laws.accounting import parameters
from tinylm.laws.plan import Cell, cell, centre, isoflop_grid
from tinylm.model.decoder import ModelConfig
from tinylm.stages.pretrain import MOST_EPOCHS, PretrainConfig
from tinylm.stages.sft import SftConfig
from tinylm.sweep.presets import RateRule, Study
from tinylm.text.shards import Dataset
from tinylm.train.batch import windows
from tinylm.train.optim import OptimConfig

PLAUSIBLE = (0.35, 0.7)
"""exponents of the best size by compute: what published studies span, by every convention"""


def ladder(base: ModelConfig, widths: Sequence[int]) -> list[ModelConfig]:
    """Give one model a width; everything else stays or follows from the width."""
    return [replace(base, D=width) for width in widths]


def grid(models: Sequence[ModelConfig], budgets: Sequence[float], per_budget: int,
         spread: float, batch: int) -> list[Cell]:
    """Choose the cells of an isoFLOP sweep over the ladder (see laws/plan)."""
    return isoflop_grid(list(budgets), [m.shape for m in models], per_budget, spread, batch)


def config(cell: Cell, models: Sequence[ModelConfig], optim: OptimConfig, rule: RateRule,
           batch: int, data_id: str, seed: int = 0) -> PretrainConfig:
    """Give the run of one cell, its rate by the rule."""
    model = next(m for m in models if m.shape == cell.shape)
    return PretrainConfig(model, replace(optim, lr=rule(cell.tokens)), cell.steps, batch, seed,
                          data_id)


def check_tokens(study: Study, models: Sequence[ModelConfig], data: Dataset) -> None:
    """Refuse a corpus too small for the study's hungriest run, before anything is trained."""
    largest = grid(models, study.budgets, study.per_budget, study.spread, study.batch)
    target = cell(study.target, nearest(models, centre(study.target)).shape, study.batch)
    T = study.base.T
    need, held = max(c.tokens for c in [*largest, target]), windows(data.train, T) * T
    if need > MOST_EPOCHS * held:
        read = [r["name"] for r in data.facts["read"] if not r["name"].startswith("(")]
        names = ", ".join(read[:3]) + (f" and {len(read) - 3} more" if read[3:] else "")
        raise BadInput(f"the {study.name} study trains a run on {need:.3g} tokens and {names} "
                       f"hold {held:.3g}, of which {MOST_EPOCHS:g} epochs are allowed; bring "
                       f"{need / MOST_EPOCHS / held:.1f} times the text with --corpus or choose a "
                       "smaller preset")


def lists(study: Study, models: Sequence[ModelConfig],
          data_id: str) -> dict[str, list[PretrainConfig]]:
    """Give what is trained before the forecast: rate check, position weights and sweep."""
    sweep = [config(c, models, study.optim, study.rule, study.batch, data_id)
             for c in grid(models, study.budgets, study.per_budget, study.spread, study.batch)]
    return {"tuning": _tuning(study, models, data_id),
            "position": [_position(study, models[0], data_id)],
            "sweep": sweep}


def expected(study: Study, models: Sequence[ModelConfig],
             data_id: str) -> dict[str, list[PretrainConfig]]:
    """Give what follows the sweep at the size expected beforehand; the law chooses the real one."""
    one = cell(study.target, nearest(models, centre(study.target)).shape, study.batch)
    target = config(one, models, study.optim, study.rule, study.batch, data_id)
    tuned = replace(target, optim=study.sft, steps=study.sft_steps,
                    batch=SftConfig.rows * target.model.T)
    return {"held-out": [target], "chat": [tuned]}


def _tuning(study: Study, models: Sequence[ModelConfig], data_id: str) -> list[PretrainConfig]:
    """Give the rate check: half, one and two times the rate at each budget's expected size."""
    out = []
    for budget in study.tuning:
        middle = nearest(models, centre(budget))
        one = config(cell(budget, middle.shape, study.batch), models, study.optim, study.rule,
                     study.batch, data_id)
        out += [replace(one, optim=replace(one.optim, lr=one.optim.lr * factor))
                for factor in (0.5, 1.0, 2.0)]
    return out


def _position(study: Study, base: ModelConfig, data_id: str) -> PretrainConfig:
    """Give the run of the position-weights baseline: the last 8 tokens, rank 64."""
    model = replace(base, kind="position_weights", L=8, D=64)
    steps = cell(study.position_flops, model.shape, study.batch).steps
    return PretrainConfig(model, study.optim, steps, study.batch, 0, data_id)


def nearest(models: Sequence[ModelConfig], params: float) -> ModelConfig:
    """Give the model whose parameters (blocks and head) are nearest in logs."""
    return min(models, key=lambda m: abs(math.log(parameters(m.shape).law / params)))


def best_target(models: Sequence[ModelConfig], fitted: dict[str, Any], study: Study,
                data: Dataset) -> ModelConfig:
    """Choose the held-out model: the law's best size among those that the corpus can feed."""
    fed = [m for m in models if cell(study.target, m.shape, study.batch).tokens
           <= MOST_EPOCHS * windows(data.train, m.T) * m.T]
    return nearest(fed or models, best_params(fitted, study.target))


def best_params(fitted: dict[str, Any], flops: float) -> float:
    """Give the parameters of least loss at a budget by the fitted exponents, else by the pilot.

    From the largest budget of the sweep on, an exponent outside PLAUSIBLE counts as its end.
    """
    e = fitted["exponents"]
    if "refused" in e:
        return centre(flops)
    last = math.log(max(m["flops"] for m in fitted["minima"]))
    a = min(max(e["a"], PLAUSIBLE[0]), PLAUSIBLE[1])
    return math.exp(e["log_params"] + e["a"] * last + a * (math.log(flops) - last))


def name(config: PretrainConfig) -> str:
    """Name a run for its folder: width, compute, and enough of its id to be unique."""
    kind = "" if config.kind == "pretrain" else f"-{config.kind}"
    return f"D{config.model.D}-{config.flops:.1e}{kind}-{identity(config)[:8]}".replace("+", "")
