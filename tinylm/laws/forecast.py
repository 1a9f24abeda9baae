"""Write a forecast down before the run it is about, and score it by content afterwards.

Three laws are joined by their geometric mean, as those with a floor tend to err high
and the power law low. Backtests on seven isoFLOP studies, mean |error| in % for targets of
1.4-3.5 / 3.5-12 / 12-40 / over 40 times the compute (experiments/backtest_forecasts.py):

    frontier with floor     .39   .93  2.44  2.86
    power law, last four    .53  1.70  3.36  4.56
    surface near minima     .93  2.03  2.76  1.31
    geometric mean          .37   .69  1.11   .24
    naive                   .44  1.36  3.36  4.66
"""

import contextlib
import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm import files
from tinylm.config import BadInput, from_json, to_json
from tinylm.laws import intervals
from tinylm.laws.fit import fit_frontier, fit_surface
from tinylm.laws.isoflop import Minimum, exponents, group, minima
from tinylm.laws.runs import Runs

SCHEMA = 1
NEAR = 2.5  # the surface is fitted to runs within this factor of the best params
LEAST_BUDGETS = 3
RULE = "geometric mean of frontier with floor, power law through the last 4 budgets, near surface"


class Best(NamedTuple):
    """The least loss of any run at a budget, nats."""

    flops: float
    loss: float


@dataclass(frozen=True)
class Forecast:
    """A prediction of one run's held-out loss. It holds no clock: order is proved by hashes."""

    schema: int  # version of this format
    name: str  # what is forecast, in a word
    target_flops: float  # exact training FLOPs of the target
    target_params: float  # parameters of the target, body and head
    target_tokens: float  # training tokens of the target
    predicted: float  # held-out loss, nats per token
    low: float  # lower end of the interval, nats per token
    high: float  # upper end of the interval, nats per token
    laws: dict[str, float]  # each law's own prediction, nats per token
    rule: str  # how the laws were joined
    naive: float  # straight line in log-log through the last two budgets' minima, nats per token
    runs: tuple[tuple[str, float], ...]  # id and loss of every run used, sorted
    eval_id: str  # the held-out set and protocol of all these losses


class Score(NamedTuple):
    """A forecast against its measurement; errors are of the prediction, in percent."""

    name: str
    forecast_sha256: str
    target_flops: float
    predicted: float
    low: float
    high: float
    measured: float
    error_percent: float
    inside: bool
    naive_error_percent: float


def make(runs: Runs, ids: list[str], target_flops: float, target_params: float,
         target_tokens: float, eval_id: str, name: str = "target", sigma: float = 0.0,
         budgets: np.ndarray | None = None, resamples: int = 50, seed: int = 0,
         rough: bool = False) -> Forecast:
    """Forecast a target's loss from a sweep's runs, whose `ids` are in the same order.

    `sigma` is the run-to-run standard deviation of the loss, nats; the runs' scatter about the
    isoFLOP parabolas is taken where it is larger. `budgets` labels the runs where their FLOPs
    differ by over 3%. Fewer than 3 bracketed budgets raise BadInput or, if `rough`, give a power
    law through the best run of each budget, its interval twice as wide.
    """
    if len(ids) != len(runs.loss) or len(set(ids)) != len(ids):
        raise BadInput(f"{len(set(ids))} different ids for {len(runs.loss)} runs; give one a run")
    if budgets is not None and len(budgets) != len(runs.loss):
        raise BadInput(f"{len(budgets)} budget labels for {len(runs.loss)} runs; give one a run")
    target = tuple(map(float, (target_flops, target_params, target_tokens)))
    factor, rule = target[0] / float(runs.flops.max()), RULE
    try:
        found = bracketed(runs, budgets)
        laws = predictions(runs, *target, budgets)
        noise = max(sigma, math.sqrt(sum(m.scatter**2 for m in found) / len(found)))
        drawn = intervals.bootstrap(runs, lambda noisy: _frontier(
            bracketed(noisy, budgets), *target[:2]), noise, resamples, seed)
        width = intervals.half_width(laws, float(drawn.std() / drawn.mean()),
                                     noise / combine(laws), factor)
        straight = naive(found, target[0])
    except BadInput as refusal:
        if not rough:
            raise
        best = best_runs(runs, budgets)
        straight = naive(best, target[0])
        laws = {"best_runs": float(_line(best, floor=False).loss(target[0]))}
        width = 2 * intervals.record_half_width(factor)
        rule = f"power law through the best run of each budget, since {refusal}"
    predicted = combine(laws)
    used = sorted((str(i), float(loss)) for i, loss in zip(ids, runs.loss, strict=True))
    return Forecast(SCHEMA, name, *target, predicted, predicted * (1 - width),
                    predicted * (1 + width), laws, rule, straight, tuple(used), eval_id)


def best_runs(runs: Runs, budgets: np.ndarray | None = None) -> list[Best]:
    """Take the least loss at each budget, least budget first, where curves show no minimum."""
    labels = group(runs.flops) if budgets is None else np.asarray(budgets)
    parts = [runs.keep(labels == label) for label in np.unique(labels)]
    return sorted(Best(float(p.flops.mean()), float(p.loss.min())) for p in parts)


def bracketed(runs: Runs, budgets: np.ndarray | None = None) -> list[Minimum]:
    """Give the bracketed minima, least budget first; under 3 raise BadInput with the reasons."""
    found = minima(runs, budgets)
    kept = [m for m in found if m.bracketed]
    if len(kept) < LEAST_BUDGETS:
        why = "; ".join(f"{m.flops:.3g}: {m.reason}" for m in found if not m.bracketed)
        raise BadInput(f"{len(kept)} budgets have a bracketed minimum, {LEAST_BUDGETS} are needed"
                       f"{f' ({why})' if why else '; add budgets'}")
    return kept


def predictions(runs: Runs, flops: float, params: float, tokens: float,
                budgets: np.ndarray | None = None) -> dict[str, float]:
    """Give each law's prediction of the loss of one target, nats."""
    found = bracketed(runs, budgets)
    laws = {"frontier_floor": _frontier(found, flops, params),
            "power_law_last4": _frontier(found[-4:], flops, params, floor=False)}
    with contextlib.suppress(BadInput):  # too few runs near the minima: the others need fewer
        laws["surface_near"] = float(fit_surface(_near(runs, found)).law.loss(params, tokens))
    return laws


def combine(laws: dict[str, float]) -> float:
    """Join the laws' predictions into one, by RULE."""
    return math.exp(sum(map(math.log, laws.values())) / len(laws))


def naive(found: list[Minimum] | list[Best], flops: float) -> float:
    """Draw a straight line in log-log through the last two minima."""
    return float(_line(found[-2:], floor=False).loss(flops))


def write(path: Path, forecast: Forecast) -> str:
    """Write a forecast and give the file's sha256; another forecast there raises BadInput."""
    path = Path(path)
    if not path.exists():
        files.write_json(path, to_json(forecast))
    elif read(path) != forecast:
        raise BadInput(f"{path} holds another forecast; forecasts are never overwritten, "
                       "choose a new name")
    return files.sha256(path)


def read(path: Path) -> Forecast:
    """Read a forecast; a newer schema raises BadInput."""
    values = files.read_json(path)
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise BadInput(f"{path} has schema {schema}, this version reads {SCHEMA}; update tinylm")
    return from_json(Forecast, values, str(path))


def check(forecast_path: Path, record: dict[str, Any]) -> Score:
    """Score a forecast against a run's record.

    The record's config must name the forecast file's sha256: the run's id covers its config, so
    the forecast existed first. Another sha256 or another evaluation set raises BadInput.
    """
    forecast, sha = read(forecast_path), files.sha256(forecast_path)
    try:
        named = record["config"]["forecast_sha256"]
        measured, eval_id = float(record["loss"]["nats_per_token"]), record["eval_id"]
    except (KeyError, TypeError, ValueError) as bad:
        raise BadInput(f"the record lacks {bad}; give the record of a run made for a forecast"
                       ) from None
    if named != sha:
        raise BadInput(f"the run names forecast {str(named)[:12]}, {forecast_path} is {sha[:12]};"
                       " check the forecast that the run was started with")
    if eval_id != forecast.eval_id:
        raise BadInput(f"the run was evaluated on {eval_id}, the forecast is for "
                       f"{forecast.eval_id}; evaluate the run on that set")
    done = record.get("flops", {}).get("exact", forecast.target_flops)
    if abs(done / forecast.target_flops - 1) > 0.01:
        raise BadInput(f"the run took {done:.4g} FLOPs, the forecast is for "
                       f"{forecast.target_flops:.4g}; train exactly the target")
    if not (math.isfinite(measured) and measured > 0):
        raise BadInput(f"the run's loss is {measured} nats; a forecast is scored by a finished run")
    return Score(forecast.name, sha, forecast.target_flops, forecast.predicted, forecast.low,
                 forecast.high, measured, 100 * (forecast.predicted / measured - 1),
                 forecast.low <= measured <= forecast.high,
                 100 * (forecast.naive / measured - 1))


def append_to_ledger(path: Path, score: Score) -> bool:
    """Append a score to a CSV that only grows; False if that forecast is in it already."""
    path, header = Path(path), ",".join(Score._fields)
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    if lines and lines[0] != header:
        raise BadInput(f"{path} begins with {lines[0]!r}, not {header!r}; give a forecast ledger")
    if any(row["forecast_sha256"] == score.forecast_sha256 for row in csv.DictReader(lines)):
        return False
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(score)
    files.append_lines(path, [text.getvalue()] if lines else [header, text.getvalue()])
    return True


def _line(found, floor):
    return fit_frontier([m.flops for m in found], [m.loss for m in found], floor).law


def _frontier(found, flops, params, floor=True):
    """Predict by the frontier, plus the isoFLOP parabola's excess at a size off the optimum."""
    line = exponents(found)
    off = math.log(params) - line.log_params - line.a * math.log(flops)
    excess = float(np.mean([m.curvature for m in found])) / 2 * off**2
    return float(_line(found, floor).loss(flops)) + excess


def _near(runs, found):
    line = exponents(found)
    off = np.log(runs.params) - line.log_params - line.a * np.log(runs.flops)
    return runs.keep(np.abs(off) <= math.log(NEAR))
