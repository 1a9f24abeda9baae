"""Verbs of what is not trained yet: forecast, plan, cost."""

import math
import shlex
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from tinylm.config import BadInput, from_json, require
from tinylm.laws import accounting, blend, intervals, isoflop
from tinylm.laws import forecast as forecasts
from tinylm.laws import plan as planning
from tinylm.laws.plan import Cell, cell
from tinylm.laws.runs import Runs, read_csv
from tinylm.laws.table import cleaned, scattered
from tinylm.look import progress
from tinylm.model.decoder import ModelConfig
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import cells, law
from tinylm.sweep.presets import RateRule
from tinylm.verbs import folders


def forecast(runs: Positional[Path], flops: float, out: Path, D: int = 0, batch: int = 0,
             tuning: Path | None = None, params: float = 0.0, params_col: str = "",
             tokens_col: str = "", flops_col: str = "", loss_col: str = "",
             where: tuple[str, ...] = (), drop_worst: int = 0, json: bool = False) -> None:
    """Write down the loss to expect of a larger run, before it is trained.

    Args:
        runs: folder whose subfolders are the runs of a sweep, or a CSV with loss and two of
            params, tokens, flops
        flops: training FLOPs of the target
        out: the forecast file to write, never overwritten
        D: width of the target; 0 takes the best by the fitted exponents
        batch: tokens a step; 0 takes the sweep's
        tuning: folder of runs of the same sizes at several learning rates or batches
        params: of the target, for a CSV; 0 takes the best by the fitted exponents
        params_col: the CSV's name for parameters
        tokens_col: the CSV's name for training tokens
        flops_col: the CSV's name for training FLOPs
        loss_col: the CSV's name for the loss
        where: COLUMN=VALUE: of a CSV, keep these rows only
        drop_worst: of a CSV, leave out this many of the largest losses
        json: print the forecast on the last line
    """
    require("flops", flops, 1e6, 1e30)
    if out.is_dir():
        raise BadInput(f"--out {out} is a folder; name the file to write")
    columns = folders.columns(runs, params=params_col, tokens=tokens_col, flops=flops_col,
                              loss=loss_col)
    only = folders.chosen(runs, where)
    for flag, given, kind in (("params", params, "a CSV"), ("drop-worst", drop_worst, "a CSV"),
                              ("D", D, "a folder"), ("batch", batch, "a folder"),
                              ("tuning", tuning, "a folder")):
        if given and runs.is_dir() == (kind == "a CSV"):
            raise BadInput(f"--{flag} {given} is for {kind} of runs and {runs} is none; leave it "
                           "out")
    if not runs.is_dir():
        _forecast_csv(runs, only, columns, flops, params, drop_worst, out, json)
        return
    records = folders.records(runs)
    table, ids, eval_id = law.runs_of(records)
    base = from_json(ModelConfig, records[0]["config"]["model"], "model")
    _beyond(flops, table)
    batch = batch or records[0]["config"]["batch"]
    widths = [D] if D else _widths(base)
    best = cells.nearest(cells.ladder(base, widths), cells.best_params(law.fit(records), flops))
    target = cell(flops, best.shape, batch)
    tried = folders.records(tuning) if tuning else []
    gate = law.tuning_gate(law.tuning_verdict(tried), law.batch_verdict(tried))
    made = forecasts.make(table, ids, target.flops, target.params, target.tokens, eval_id,
                          sigma=law.noise(records), clusters=law.clusters(records),
                          warning=_warned(flops, table, gate))
    sha = forecasts.write(out, made)
    flags = train_flags(runs, records, best, target, batch)
    told = {"sha256": sha, "D": best.D, "steps": target.steps, "predicted": made.predicted,
            "low": made.low, "high": made.high, "coverage": made.coverage, "warning": made.warning,
            "train": f"tinylm train --out RUN {flags} --forecast {shlex.quote(str(out))}"}
    progress.answer(told, json, f"{progress.forecast(made, sha)}\ntrain it: {told['train']}")


def _forecast_csv(place: Path, only: dict[str, str], columns: dict[str, str], flops: float,
                  params: float, drop_worst: int, out: Path, json: bool) -> None:
    """Forecast from anybody's table; FLOPs a parameter and token are those of its top budget."""
    said: list[str] = []
    table, dropped = cleaned(read_csv(place, only, columns, said), drop_worst)
    _beyond(flops, table)
    bracketed = blend.bracketed(table)
    line = isoflop.exponents(bracketed)
    params = params or math.exp(line.log_params + line.a * math.log(flops))
    require("params", params, 1, 1e15)
    top = table.keep(table.flops >= bracketed[-1].flops / 1.03)
    each = math.exp(float(np.log(top.flops / top.params / top.tokens).mean()))
    ids = [f"{place.name}#{n}" for n in range(1, len(table.loss) + 1)]
    gate = "the table does not say how its runs were tuned"
    if why := scattered(table):
        gate = f"{why}; {gate}"
    made = forecasts.make(table, ids, flops, params, flops / each / params, place.name,
                          warning=_warned(flops, table, gate))
    sha = forecasts.write(out, made)
    told = {"sha256": sha, "params": params, "tokens": made.target_tokens, "read": said + dropped,
            "predicted": made.predicted, "low": made.low, "high": made.high, "laws": made.laws,
            "coverage": made.coverage, "warning": made.warning}
    progress.answer(told, json, "\n".join([*said, *dropped, progress.forecast(made, sha)]))


def _beyond(flops: float, table: Runs) -> None:
    if flops <= (top := float(table.flops.max())):
        raise BadInput(f"flops={flops:g} is not above the sweep's largest budget, {top:.4g}; "
                       "forecast a larger run")


def _warned(flops: float, table: Runs, gate: str) -> str:
    """Add to what may spoil a forecast that its target is farther than any tried before."""
    top, most = float(table.flops.max()), intervals.farthest()
    far = (f"{flops / top:.3g} times the sweep's largest budget is farther than the {most:.3g} "
           "times that past forecasts were tried at" if flops > most * top else "")
    return "; ".join(filter(None, (far, gate)))


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
    shapes = [m.shape for m in cells.ladder(model, _widths(model))]
    made = planning.propose(flops, shapes, _device(device), per_budget, spread, batch,
                            noise=noise, dollars_per_hour=dollars_per_hour,
                            utilisation=utilisation)
    told = {"cells": [{**c._asdict(), "shape": c.shape._asdict()} for c in made.cells],
            "target": {**made.target._asdict(), "shape": made.target.shape._asdict()},
            "expected": {**made.expected._asdict(), "form_risk": made.expected.form_risk},
            "sweep": made.sweep._asdict(), "run": made.run._asdict()}
    progress.answer(told, json, progress.planned(made, device))


def cost(tokens: float = 0.0, params: float = 0.0, device: str = "H200",
         dollars_per_hour: float = 0.0, utilisation: float = 0.4,
         model: ModelConfig = ModelConfig(), batch: int = 512,  # noqa: B008
         published: bool = False, json: bool = False) -> None:
    """Count what a run takes: parameters, FLOPs by convention, memory, device-hours, cost.

    Args:
        tokens: seen in training; 0 takes Chinchilla's 20 a parameter
        params: of a model that is known by nothing else; 0 takes --model
        device: by its maker's sheet: V100, A100, H100, H200 or TPU v4
        dollars_per_hour: of one device
        utilisation: share of the device's peak
        model: the decoder that is counted
        batch: tokens held at once, for the memory of activations
        published: count GPT-1 to Llama 3 instead, beside what their makers state
        json: print the counts on the last line
    """
    found = _device(device)

    def bill(params: float, tokens: float, flops: float | None = None) -> dict[str, float]:
        return accounting.bill(params, tokens, found, dollars_per_hour, utilisation,
                               flops)._asdict()

    if published:
        if tokens or params or model != ModelConfig():
            raise BadInput("--published counts models of its own; leave --tokens, --params and "
                           "--model out")
        rows = [{k: None if v != v else v for k, v in r._asdict().items()}
                for r in accounting.REFERENCES]
        for row in rows:
            known = row["params"] and row["tokens"]
            row["six_nd"] = accounting.six_nd(row["params"], row["tokens"]) if known else None
            flops = row["flops"] or row["six_nd"]
            row["bill"] = bill(row["params"], row["tokens"] or 0, flops) if flops else None
        progress.answer({"device": device, "models": rows}, json, progress.published(rows, device))
        return
    for name, value in (("tokens", tokens), ("params", params)):
        if value:
            require(name, value, 1, 1e18)
    require("batch", batch, 1, 1e18)
    if params:
        if model != ModelConfig():
            raise BadInput(f"--params {params:g} and --model are two models; give one")
        count, counted = params, None
    else:
        counted = accounting.parameters(model.shape)
        count = counted.law
    tokens = tokens or 20 * count
    told: dict[str, Any] = {"params": count, "tokens": tokens,
                            "flops": {"6nd": accounting.six_nd(count, tokens)}}
    if counted:
        told |= {"params": {**counted._asdict(), "law": counted.law, "total": counted.total},
                 "flops": accounting.flops_by_convention(model.shape, tokens),
                 "activation_bytes": accounting.activation_bytes(model.shape, batch)}
    exact = told["flops"]["exact" if counted else "6nd"]
    told["bill"] = bill(counted.total if counted else count, tokens, exact)
    progress.answer(told, json, progress.costed(told, device))


def _device(name: str) -> accounting.Device:
    known = {d.name: d for d in accounting.DEVICES}
    if name not in known:
        raise BadInput(f"device={name} is not known; choose one of {', '.join(known)}")
    return known[name]


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
