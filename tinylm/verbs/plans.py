"""Verbs of what is not trained yet: forecast, plan."""

import math
import shlex
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from tinylm.config import BadInput, from_json, require
from tinylm.laws import accounting, intervals
from tinylm.laws import forecast as forecasts
from tinylm.laws import plan as planning
from tinylm.laws.plan import Cell, cell
from tinylm.look import progress
from tinylm.model.decoder import ModelConfig
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import cells, law
from tinylm.sweep.presets import RateRule
from tinylm.verbs import folders


def forecast(runs: Positional[Path], flops: float, out: Path, D: int = 0, batch: int = 0,
             tuning: Path | None = None, json: bool = False) -> None:
    """Write down the loss to expect of a larger run, before it is trained.

    Args:
        runs: folder whose subfolders are the runs of a sweep
        flops: training FLOPs of the target
        out: the forecast file to write, never overwritten
        D: width of the target; 0 takes the best by the fitted exponents
        batch: tokens a step; 0 takes the sweep's
        tuning: folder of runs of the same sizes at several learning rates
        json: print the forecast on the last line
    """
    require("flops", flops, 1e6, 1e30)
    if out.is_dir():
        raise BadInput(f"--out {out} is a folder; name the file to write")
    records = folders.records(runs)
    table, ids, eval_id = law.runs_of(records)
    base = from_json(ModelConfig, records[0]["config"]["model"], "model")
    if flops <= (top := float(table.flops.max())):
        raise BadInput(f"flops={flops:g} is not above the sweep's largest budget, {top:.4g}; "
                       "forecast a larger run")
    batch = batch or records[0]["config"]["batch"]
    widths = [D] if D else _widths(base)
    best = cells.nearest(cells.ladder(base, widths), cells.best_params(law.fit(records), flops))
    target = cell(flops, best.shape, batch)
    gate = law.tuning_gate(law.tuning_verdict(folders.records(tuning)) if tuning else [])
    if flops > (most := intervals.farthest()) * top:
        far = f"{flops / top:.3g} times the sweep's largest budget is farther than the {most:.3g} "
        gate = "; ".join(filter(None, (far + "times that past forecasts were tried at", gate)))
    made = forecasts.make(table, ids, target.flops, target.params, target.tokens, eval_id,
                          warning=gate)
    sha = forecasts.write(out, made)
    flags = train_flags(runs, records, best, target, batch)
    told = {"sha256": sha, "D": best.D, "steps": target.steps, "predicted": made.predicted,
            "low": made.low, "high": made.high, "coverage": made.coverage, "warning": made.warning,
            "train": f"tinylm train --out RUN {flags} --forecast {shlex.quote(str(out))}"}
    progress.answer(told, json, f"{progress.forecast(made, sha)}\ntrain it: {told['train']}")


def train_flags(runs: Path, records: list[dict], model: ModelConfig, target: Cell,
                batch: int) -> str:
    """Give the flags by which `tinylm train` trains the target as the sweep trained its runs."""
    swept = [from_json(PretrainConfig, r["config"], "config") for r in records]
    config = lone(swept, model, target.steps, batch)
    return shlex.join(["--text", str(folders.text_of(runs)), *_flags(config, PretrainConfig())])


def plan(flops: float, device: str = "H200", dollars_per_hour: float = 0.0,
         utilisation: float = 0.4, model: ModelConfig = ModelConfig(),  # noqa: B008
         per_budget: int = 7, spread: float = 4.0, batch: int = 512, noise: float = 0.003,
         json: bool = False) -> None:
    """Plan a sweep and the larger run it forecasts: cells, precision to expect, time and cost.

    Args:
        flops: training FLOPs of all runs together
        device: by its maker's sheet: V100, A100, H100, H200 or TPU v4
        dollars_per_hour: of one device
        utilisation: share of the device's peak
        model: what the ladder of widths leaves as it is
        per_budget: sizes a budget
        spread: sizes lie within this factor of the expected best
        batch: tokens a step
        noise: a run's standard deviation as a share of its loss
        json: print the plan on the last line
    """
    require("flops", flops, 1e9, 1e30)
    known = {d.name: d for d in accounting.DEVICES}
    if device not in known:
        raise BadInput(f"device={device} is not known; choose one of {', '.join(known)}")
    shapes = [m.shape for m in cells.ladder(model, _widths(model))]
    made = planning.propose(flops, shapes, known[device], per_budget, spread, batch,
                            noise=noise, dollars_per_hour=dollars_per_hour,
                            utilisation=utilisation)
    told = {"cells": [{**c._asdict(), "shape": c.shape._asdict()} for c in made.cells],
            "target": {**made.target._asdict(), "shape": made.target.shape._asdict()},
            "expected": {**made.expected._asdict(), "form_risk": made.expected.form_risk},
            "sweep": made.sweep._asdict(), "run": made.run._asdict()}
    progress.answer(told, json, progress.planned(made, device))


def _widths(model: ModelConfig) -> list[int]:
    """Give about 300 widths of whole heads up to 1e5, evenly in logs."""
    heads = np.unique(np.round(np.geomspace(2 * model.H, 1e5, 300) / 2 / model.H))
    return (heads * 2 * model.H).astype(int).tolist()


def lone(swept: list[PretrainConfig], model: ModelConfig, steps: int,
         batch: int) -> PretrainConfig:
    """Give a larger run as a sweep would have trained it, by its own rule and without a trunk."""
    one = min(swept, key=lambda c: c.parent is not None)
    warmup = 0 if one.parent else one.optim.warmup_steps  # a trunk's was set for its family
    lr = float(f"{rate_rule(swept)(steps * batch):.6g}")
    return PretrainConfig(model, replace(one.optim, lr=lr, warmup_steps=warmup), steps, batch,
                          one.seed)


def rate_rule(swept: list[PretrainConfig]) -> RateRule:
    """Read the rule that a sweep's rates follow: a line of ln rate over ln tokens.

    Branches of one trunk have the rate of their horizons' geometric mean (sweep/trunks).
    """
    families: dict[object, list[PretrainConfig]] = {}
    for n, c in enumerate(swept):
        families.setdefault(c.parent.id if c.parent else n, []).append(c)
    tokens, rates = np.array([(np.mean([math.log(c.tokens) for c in family]),
                               math.log(family[0].optim.lr)) for family in families.values()]).T
    middle, run = tokens.mean(), tokens - tokens.mean()
    slope = float(run @ rates / (run @ run)) if run @ run else 0.0
    return RateRule(math.exp(rates.mean()), math.exp(middle), -slope)


def _flags(value: Any, default: Any, prefix: str = "--") -> list[str]:
    """Give the flags of every field that differs from its default."""
    out = []
    for field in fields(value):
        mine, usual, flag = getattr(value, field.name), getattr(default, field.name), field.name
        if mine == usual:
            continue
        if is_dataclass(mine):
            out += _flags(mine, usual, f"{prefix}{flag}.")
        elif isinstance(mine, bool):
            out.append(f"{prefix}{'' if mine else 'no-'}{flag}")
        else:
            out += [prefix + flag, str(mine)]
    return out
