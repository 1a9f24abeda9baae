"""From records to laws: the table a fit needs, everything fitted, and the tuning check."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tinylm.config import BadInput
from tinylm.laws.accounting import Parameters
from tinylm.laws.fit import fit_frontier, fit_law
from tinylm.laws.forms import Surface
from tinylm.laws.isoflop import conventions, minima
from tinylm.laws.runs import Runs
from tinylm.laws.table import compare, curves, or_why

Record = dict[str, Any]
SEEDS = 0.015
"""nats by which two small runs differ that differ in their seed alone (one run's standard deviation
is .010 to .018 at 1e11 to 1e12 FLOPs on the default corpus)"""


def runs_of(records: list[Record]) -> tuple[Runs, list[str], str]:
    """Give (runs, ids, eval_id) of the finished records; losses of two evaluations are refused."""
    kept = finished(records)
    if not kept:
        raise BadInput(f"none of {len(records)} runs finished; run the sweep again")
    evals = sorted({r["eval_id"] for r in kept})
    if len(evals) > 1:
        raise BadInput(f"the runs were evaluated on {len(evals)} sets ({', '.join(evals)}); "
                       "fit runs of one set")
    table = [(r["params"]["head"] + r["params"]["blocks"], r["tokens"], r["flops"]["exact"],
              r["loss"]["nats_per_token"]) for r in kept]
    return Runs(*np.array(table, float).T), [r["id"] for r in kept], evals[0]


def finished(records: list[Record]) -> list[Record]:
    """Give those that ended with a loss; a trunk's schedule never does."""
    return [r for r in records if r["status"] == "ok" and r["kind"] != "trunk"]


def fit(records: list[Record]) -> dict[str, Any]:
    """Fit every law to a sweep's records; a law that the runs cannot identify says why."""
    runs, ids, eval_id = runs_of(records)
    counts = [Parameters(**r["params"]) for r in finished(records)]
    kept = [m for m in minima(runs) if m.bracketed]
    flops, loss = [m.flops for m in kept], [m.loss for m in kept]
    return {"eval_id": eval_id, "runs": len(ids),
            "codes": sorted({r["code_id"] for r in records}),
            "bits_per_nat": _bits_per_nat(records),
            **curves(runs),
            "conventions": or_why(lambda: {k: e._asdict()
                                            for k, e in conventions(runs, counts).items()}),
            "comparison": or_why(lambda: {"laws": compare(runs)}),
            "surface": or_why(lambda: _told(fit_law(runs, Surface))),
            "frontier": or_why(lambda: _told(fit_frontier(flops, loss, floor=False))),
            "frontier_floor": or_why(lambda: _told(fit_frontier(flops, loss, floor=True)))}


def tuning_verdict(records: list[Record]) -> list[dict[str, Any]]:
    """Say for each size which of its rates did best, and whether that lies at an edge.

    An edge counts where it beats every rate inside by more than SEEDS and one of these beats the
    other edge: where both edges are better than the inside, seeds decided. Of a size that several
    batches were tried at, the rates are those of the best.
    """
    out = []
    for (width, _), rows in _sizes(records):
        best = min(rows, key=_loss)
        rows = sorted((r for r in rows if r["config"]["batch"] == best["config"]["batch"]),
                      key=lambda r: r["config"]["optim"]["lr"])
        found = _tried([r["config"]["optim"]["lr"] for r in rows], [_loss(r) for r in rows])
        out.append({"width": width, "steps": rows[0]["config"]["steps"], "rates": found[0],
                    "losses": found[1], "best": found[2], "at_edge": found[3]})
    return out


def batch_verdict(records: list[Record]) -> list[dict[str, Any]]:
    """Say the same of batches, tokens a step, each at its best rate, where several were tried."""
    out = []
    for (width, tokens), rows in _sizes(records):
        best: dict[int, float] = {}
        for r in rows:
            batch = r["config"]["batch"]
            best[batch] = min(best.get(batch, math.inf), _loss(r))
        if len(best) > 1:
            found = _tried(sorted(best), [best[batch] for batch in sorted(best)])
            out.append({"width": width, "tokens": tokens, "batches": found[0], "losses": found[1],
                        "best": found[2], "at_edge": found[3]})
    return out


def tuning_gate(rates: list[dict[str, Any]], batches: Sequence[dict[str, Any]] = ()) -> str:
    """Say which sizes did best at an edge of the rates or batches tried; empty if tuned.

    `rates` and `batches` are the verdicts on both; no rates means that none were compared.
    """
    if not rates:
        return "no learning rates were compared, so these runs may be badly tuned"
    out = []
    for what, many, verdict in (("learning rate", "rates", rates), ("batch", "batches", batches)):
        if edges := [f"{v['best']:.4g} of {min(v[many]):.4g} to {max(v[many]):.4g} at width "
                     f"{v['width']}" for v in verdict if v["at_edge"]]:
            out.append(f"the best {what} lies at the edge of those tried ({'; '.join(edges)}), so "
                       "the law may be that of badly tuned runs")
    return "; ".join(out)


def noise(records: list[Record]) -> float:
    """Give the standard deviation, nats, of runs that differ in their seed alone; 0 if none do."""
    groups: dict[str, list[float]] = {}
    for r in finished(records):
        name = json.dumps({**r["config"], "seed": 0, "parent": None}, sort_keys=True)
        groups.setdefault(name, []).append(_loss(r))
    squares = sum(np.var(losses) * len(losses) for losses in groups.values())
    free = sum(len(losses) - 1 for losses in groups.values())
    return math.sqrt(squares / free) if free else 0.0


def clusters(records: list[Record]) -> np.ndarray | None:
    """Label the finished runs by the trunk they branch from, whose noise they share; None if none.

    A run on its own is a cluster of its own.
    """
    kept = finished(records)
    trunks = [(r["config"].get("parent") or {}).get("id", "") for r in kept]
    return (np.array([trunk or r["id"] for trunk, r in zip(trunks, kept, strict=True)])
            if any(trunks) else None)


def _sizes(records: list[Record]) -> list[tuple[tuple[int, int], list[Record]]]:
    """Group runs by width and tokens, steps rounded (2%)."""
    sizes: dict[tuple[int, int], list[Record]] = {}
    for r in sorted(records, key=lambda r: r["config"]["steps"] * r["config"]["batch"]):
        width, tokens = r["config"]["model"]["D"], r["config"]["steps"] * r["config"]["batch"]
        key = next((k for k in sizes if k[0] == width and tokens <= 1.02 * k[1]), (width, tokens))
        sizes.setdefault(key, []).append(r)
    return sorted(sizes.items())


def _loss(r: Record) -> float:
    return r["loss"]["nats_per_token"] if r["loss"] else math.inf


def _tried(values: list, losses: list[float]) -> tuple[list, list, Any, bool]:
    """Give values, losses (None for lost runs), the best value, and whether it is at an edge."""
    best, inside = int(np.argmin(losses)), losses[1:-1] or [math.inf]
    at_edge = (best in (0, len(losses) - 1) and min(inside) - losses[best] > SEEDS
               and min(inside) <= losses[-1 - best])
    return values, [x if math.isfinite(x) else None for x in losses], values[best], at_edge


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Give the bottom of a parabola in log2(rate) through the five rates about the best.

    It is kept within the rates given; of less than three, or bent down, the best given counts.
    """
    order = np.argsort(rates)
    x, y = np.log2(np.array(rates, float)[order]), np.array(losses, float)[order]
    first = max(0, min(int(y.argmin()) - 2, len(x) - 5))
    near, middle, at = slice(first, first + 5), x.mean(), x[y.argmin()]
    if len(x) > 2:
        c2, c1, _ = np.polyfit(x[near] - middle, y[near], 2)
        at = middle - c1 / (2 * c2) if c2 > 0 else at
    return float(2 ** np.clip(at, x[0], x[-1]))


def _told(fitted) -> dict[str, Any]:
    return {**asdict(fitted.law), "objective": fitted.objective,
            "certificate": fitted.certificate}


def _bits_per_nat(records: list[Record]) -> float:
    """Give bits a byte over nats a token, the same for all records of one evaluation."""
    return next(r["loss"]["bits_per_byte"] / r["loss"]["nats_per_token"]
                for r in records if r["loss"])
