"""Verbs of what is not trained yet: forecast, plan."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from tinylm.config import BadInput, from_json, require, to_json
from tinylm.laws import accounting
from tinylm.laws import forecast as forecasts
from tinylm.laws import plan as planning
from tinylm.laws.plan import Cell, cell
from tinylm.look import progress
from tinylm.model.decoder import ModelConfig
from tinylm.sweep import cells, law
from tinylm.train.optim import OptimConfig
from tinylm.verbs import folders


def forecast(runs: Positional[Path], flops: float, out: Path, D: int = 0, batch: int = 512,
             tuning: Path | None = None, json: bool = False) -> None:
    """Write down the loss to expect of a larger run, before it is trained.

    Args:
        runs: folder whose subfolders are the runs of a sweep
        flops: training FLOPs of the target
        out: the forecast file to write, never overwritten
        D: width of the target; 0 takes the best by the fitted exponents
        batch: tokens a step
        tuning: folder of runs of the same sizes at several learning rates
        json: print the forecast on the last line
    """
    require("flops", flops, 1e6, 1e30)
    records = folders.records(runs)
    table, ids, eval_id = law.runs_of(records)
    base = from_json(ModelConfig, records[0]["config"]["model"], "model")
    widths = [D] if D else range(base.H * 2, 64 * base.H * 2, base.H * 2)
    best = cells.nearest(cells.ladder(base, widths), cells.best_params(law.fit(records), flops))
    target = cell(flops, best.shape, batch)
    gate = law.tuning_gate(law.tuning_verdict(folders.records(tuning)) if tuning else [])
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
    """Give the flags by which `tinylm train` trains the target as the sweep trained its runs.

    The rate continues the line, in logs, of the runs' rates over their tokens: the sweep's rule.
    """
    optim = from_json(OptimConfig, records[0]["config"]["optim"], "optim")
    tokens, rates = np.log([(r["tokens"], r["config"]["optim"]["lr"]) for r in records]).T
    rule = np.polyfit(tokens, rates, 1) if np.ptp(tokens) > 0 else [0.0, rates[0]]
    rate = float(np.exp(np.polyval(rule, np.log(target.tokens))))
    flags = {f"{kind}.{name}": value for kind, one, default in (
        ("model", model, ModelConfig()), ("optim", replace(optim, lr=rate), OptimConfig()))
        for name, value in to_json(one).items() if value != to_json(default)[name] or name == "D"}
    flags |= {"batch": batch, "steps": target.steps}
    text = ["--text", str(runs / "text")] if (runs / "text").exists() else []
    told = [word for name, value in flags.items() for word in (
        [f"--{name.partition('.')[0]}.{'' if value else 'no-'}{name.partition('.')[2]}"]
        if isinstance(value, bool) else
        [f"--{name}", f"{value:.6g}" if isinstance(value, float) else str(value)])]
    return shlex.join([*text, *told])


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
    widths = np.unique(np.round(np.geomspace(2 * model.H, 1e5, 300) / 2 / model.H)) * 2 * model.H
    shapes = [m.shape for m in cells.ladder(model, widths.astype(int).tolist())]
    made = planning.propose(flops, shapes, known[device], per_budget, spread, batch,
                            noise=noise, dollars_per_hour=dollars_per_hour,
                            utilisation=utilisation)
    told = {"cells": [{**c._asdict(), "shape": c.shape._asdict()} for c in made.cells],
            "target": {**made.target._asdict(), "shape": made.target.shape._asdict()},
            "expected": {**made.expected._asdict(), "form_risk": made.expected.form_risk},
            "sweep": made.sweep._asdict(), "run": made.run._asdict()}
    progress.answer(told, json, progress.planned(made, device))
