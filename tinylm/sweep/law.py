"""From records to laws: the table a fit needs, everything fitted, and the tuning check."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tinylm.config import BadInput
from tinylm.laws.accounting import Parameters
from tinylm.laws.fit import fit_frontier, fit_surface
from tinylm.laws.isoflop import bias, conventions, exponents, minima
from tinylm.laws.runs import Runs
from tinylm.laws.table import compare

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
    found = minima(runs)
    kept = [m for m in found if m.bracketed]
    flops, loss = [m.flops for m in kept], [m.loss for m in kept]
    return {"eval_id": eval_id, "runs": len(ids),
            "codes": sorted({r["code_id"] for r in records}),
            "bits_per_nat": _bits_per_nat(records),
            "minima": [_finite(m._asdict()) for m in found],
            "exponents": _or_why(lambda: exponents(found)._asdict()),
            "bias": _or_why(lambda: {"percent": [b._asdict() for b in bias(runs)]}),
            "conventions": _or_why(lambda: {k: e._asdict()
                                            for k, e in conventions(runs, counts).items()}),
            "comparison": _or_why(lambda: {"laws": compare(runs)}),
            "surface": _or_why(lambda: _told(fit_surface(runs))),
            "frontier": _or_why(lambda: _told(fit_frontier(flops, loss, floor=False))),
            "frontier_floor": _or_why(lambda: _told(fit_frontier(flops, loss, floor=True)))}


def tuning_verdict(records: list[Record]) -> list[dict[str, Any]]:
    """Say for each size which of its rates did best, and whether that lies at an edge.

    An edge counts where it beats every rate inside by more than SEEDS and one of these beats the
    other edge: where both edges are better than the inside, seeds decided.
    """
    sizes: dict[tuple, list[Record]] = {}
    for r in records:
        sizes.setdefault((r["config"]["model"]["D"], r["config"]["steps"]), []).append(r)
    out = []
    for (width, steps), rows in sorted(sizes.items()):
        rows = sorted(rows, key=lambda r: r["config"]["optim"]["lr"])
        loss = [r["loss"]["nats_per_token"] if r["loss"] else float("inf") for r in rows]
        best, inside = int(np.argmin(loss)), loss[1:-1] or [float("inf")]
        out.append({"width": width, "steps": steps,
                    "rates": [r["config"]["optim"]["lr"] for r in rows],
                    "losses": [x if np.isfinite(x) else None for x in loss],
                    "best": rows[best]["config"]["optim"]["lr"],
                    "at_edge": best in (0, len(rows) - 1) and min(inside) - loss[best] > SEEDS
                    and min(inside) <= loss[-1 - best]})
    return out


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


def tuning_gate(verdict: list[dict[str, Any]]) -> str:
    """Say which sizes did best at an edge of the rates tried, or that none were; empty if tuned."""
    if not verdict:
        return "no learning rates were compared, so these runs may be badly tuned"
    edges = [f"{v['best']:.2g} of {min(v['rates']):.2g} to {max(v['rates']):.2g} at width "
             f"{v['width']}" for v in verdict if v["at_edge"]]
    return (f"the best learning rate lies at the edge of those tried ({'; '.join(edges)}), so the "
            "law may be that of badly tuned runs" if edges else "")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Put None where a refused minimum has no number."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else
            [None if not math.isfinite(x) else x for x in v] if isinstance(v, tuple) else v
            for k, v in values.items()}


def _told(fitted) -> dict[str, Any]:
    return {**asdict(fitted.law), "objective": fitted.objective,
            "certificate": fitted.certificate}


def _or_why(make) -> dict[str, Any]:
    try:
        return make()
    except BadInput as refusal:
        return {"refused": str(refusal)}


def _bits_per_nat(records: list[Record]) -> float:
    """Give bits a byte over nats a token, the same for all records of one evaluation."""
    return next(r["loss"]["bits_per_byte"] / r["loss"]["nats_per_token"]
                for r in records if r["loss"])
