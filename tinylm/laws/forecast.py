"""Write a forecast down before the run it is about, and score it by content afterwards.

Five laws are joined by the weights of their rolling origins (`blend`), with an interval that past
forecasts of other studies calibrate (`intervals`). Errors on published studies, by law and
distance, and those of the rule before (a geometric mean of three laws): experiments/LOG.md.
"""

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
from tinylm.laws.blend import LEAST_BUDGETS, RULE, Blend, Target, blend
from tinylm.laws.fit import fit_frontier
from tinylm.laws.isoflop import Minimum, group
from tinylm.laws.runs import Runs

SCHEMA = 2
DOUBT = 0.02  # of log loss; the laws miss a published sweep's last minimum by .3% on average


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
    weights: dict[str, float]  # each law's share
    rule: str  # how the laws were joined
    parts: dict[str, float]  # of the interval: standard deviations of log loss
    coverage: str  # how often such intervals held, as measured
    warning: str  # what a reader must know first; empty if nothing
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


LEDGER = (*Score._fields, "sha256")
"""the columns of a ledger of scores"""


def make(runs: Runs, ids: list[str], target_flops: float, target_params: float,
         target_tokens: float, eval_id: str, name: str = "target", sigma: float = 0.0,
         clusters: np.ndarray | None = None, resamples: int = 200, rough: bool = False,
         warning: str = "") -> Forecast:
    """Forecast a target's loss from a sweep's runs, whose `ids` are in the same order.

    `sigma` and `clusters` are those of `intervals.parts`. `warning` says first what may spoil the
    forecast, such as untuned rates. Fewer than 3 bracketed budgets raise BadInput or, if `rough`,
    give a power law through the best run of each budget, with an interval that is a guess and
    reaches the straight line through the last two. With 3 no law has forecast a later budget:
    their interval is widened by the same guess.
    """
    if len(ids) != len(runs.loss) or len(set(ids)) != len(ids):
        raise BadInput(f"{len(set(ids))} different ids for {len(runs.loss)} runs; give one a run")
    if clusters is not None and len(clusters) != len(runs.loss):
        raise BadInput(f"{len(clusters)} cluster labels for {len(runs.loss)} runs; give one a run")
    target = Target(*map(float, (target_flops, target_params, target_tokens)))
    try:
        blended = blend(runs)
    except BadInput as refusal:
        if not rough:
            raise
        best = best_runs(runs)
        laws = {"best_runs": float(_line(best, floor=False).loss(target.flops))}
        predicted, weights, off = laws["best_runs"], {"best_runs": 1.0}, {}
        rule = f"power law through the best run of each budget, since {refusal}"
        straight = naive(best, target.flops)
        width = math.hypot(intervals.rough_half_width(target.flops / best[-1].flops),
                           math.log(straight / predicted))
        coverage = "no past forecast calibrates this interval"
    else:
        laws, weights, rule = blended.predictions(target), blended.weights, RULE
        found = intervals.parts(blended, target, sigma, resamples, clusters=clusters)
        predicted, off, coverage = (blended.predicted(target), found._asdict(),
                                    intervals.coverage_told())
        width = max(intervals.half_width(found), abs(blended.missed))
        new = (doubt for doubt in doubts(blended, target) if doubt not in warning)
        warning = "; ".join(filter(None, (warning, *new)))  # a replay gives the whole warning
        straight = naive(blended.found, target.flops)
        if len(blended.found) == LEAST_BUDGETS:
            guess = intervals.rough_half_width(target.flops / blended.found[-1].flops)
            off["guess"] = guess / intervals.NORMAL_90
            width = math.hypot(width, guess)
            coverage = (f"{LEAST_BUDGETS} budgets give no law a chance to forecast a later one, so "
                        f"a guess widens this interval; {coverage}")
    used = sorted((str(i), float(loss)) for i, loss in zip(ids, runs.loss, strict=True))
    return Forecast(SCHEMA, name, *target, predicted, predicted * math.exp(-width),
                    predicted * math.exp(width), laws, weights, rule, off, coverage, warning,
                    straight, tuple(used), eval_id)


def doubts(blended: Blend, target: Target) -> list[str]:
    """Say what in a sweep itself speaks against its forecast."""
    first, (*_, before, last) = blended.found[0], blended.found
    out = []
    if last.loss >= before.loss:
        out.append(f"the least loss does not fall at the largest budget ({before.loss:.4g} nats, "
                   f"then {last.loss:.4g}): are its runs sound?")
    if abs(blended.missed) > DOUBT:
        out.append(f"fitted below it the laws miss the largest budget by {blended.missed:+.1%}")
    if target.flops / last.flops > (span := last.flops / first.flops):
        out.append(f"the target is {target.flops / last.flops:.3g} times the largest budget and "
                   f"the budgets span {span:.3g} times: they show little of a bend on that way")
    return out


def best_runs(runs: Runs) -> list[Best]:
    """Take the least loss at each budget, least budget first, where curves show no minimum."""
    labels = group(runs.flops)
    parts = [runs.keep(labels == label) for label in np.unique(labels)]
    return sorted(Best(float(p.flops.mean()), float(p.loss.min())) for p in parts)


def naive(found: list[Minimum] | list[Best], flops: float) -> float:
    """Draw a straight line in log-log through the last two minima."""
    return float(_line(found[-2:], floor=False).loss(flops))


def write(path: Path, forecast: Forecast) -> str:
    """Write a forecast and give the file's sha256; another forecast there raises BadInput."""
    path = Path(path)
    if not path.exists():
        files.write_json(path, to_json(forecast))
    elif not files.sealed(path):
        raise BadInput(f"{path} is there and is no forecast; name a new file")
    elif read(path) != forecast:
        raise BadInput(f"{path} holds another forecast; forecasts are never overwritten, "
                       "choose a new name")
    return files.sha256(path)


def read(path: Path) -> Forecast:
    """Read a forecast; one of another schema raises BadInput."""
    values = files.read_json(path)
    if (schema := values.get("schema")) != SCHEMA:
        raise BadInput(f"{path} has schema {schema}, this version reads {SCHEMA}; use the tinylm "
                       "that wrote it")
    return from_json(Forecast, values, str(path))


def check(forecast_path: Path, record: dict[str, Any]) -> Score:
    """Score a forecast against a run's record.

    The record's config must name the forecast file's sha256: the run's id covers its config, so
    the forecast existed first. Another sha256 or another evaluation set raises BadInput.
    """
    forecast, sha = read(forecast_path), files.sha256(forecast_path)
    if record.get("status", "ok") != "ok":
        raise BadInput(f"the run ended as {record['status']}; a forecast is scored by a finished "
                       "run")
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


def unchanged(forecast_path: Path, ids: list[str], losses: np.ndarray, place: Path) -> None:
    """Refuse (BadInput) a forecast whose runs are no longer those of a place, or their losses."""
    now = dict(zip(ids, map(float, losses), strict=True))
    for name, loss in read(forecast_path).runs:
        if name not in now:
            raise BadInput(f"{forecast_path} was made from run {name}, which {place} has no more; "
                           "name the folder that it was made from with --runs")
        if now[name] != loss:
            raise BadInput(f"{forecast_path} was made from run {name} with {loss:.6g} nats and "
                           f"{place} says {now[name]:.6g}; a forecast is scored with the runs it "
                           "was made from")


def append_to_ledger(path: Path, score: Score) -> bool:
    """Append a score to a CSV that only grows; False if that forecast is in it already."""
    rows = ledger(path)
    if any(row["forecast_sha256"] == score.forecast_sha256 for row in rows):
        return False
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(score)
    row = _sealed(text.getvalue())
    files.append_lines(path, [row] if rows else [",".join(LEDGER), row])
    return True


def ledger(path: Path) -> list[dict[str, str]]:
    """Read a ledger's rows, each with its own sha256 last; a changed one raises Damaged."""
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
    except UnicodeDecodeError as bad:
        raise BadInput(f"{path} is not UTF-8 at byte {bad.start}; give a forecast ledger") from None
    if lines and lines[0] != ",".join(LEDGER):
        raise BadInput(f"{path} begins with {lines[0]!r}, not {','.join(LEDGER)!r}; give a "
                       "forecast ledger")
    for number, line in enumerate(lines[1:], 2):
        if _sealed(line.rpartition(",")[0]) != line:
            raise files.Damaged(f"{path}:{number} was changed after it was written; delete that "
                                "line")
    return list(csv.DictReader(lines))


def _sealed(row: str) -> str:
    return f"{row},{files.sha256_of(row.encode())[:16]}"


def _line(found, floor):
    return fit_frontier([m.flops for m in found], [m.loss for m in found], floor).law
