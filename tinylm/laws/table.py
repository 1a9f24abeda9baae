"""Fit anybody's table of runs by the name of a law, and rank the laws by what they forecast."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from tinylm.config import BadInput
from tinylm.laws.fit import Estimator, Fit, fit_frontier, fit_law, resample
from tinylm.laws.forms import (
    Coupled,
    DataConstrained,
    Frontier,
    Kaplan,
    OverTraining,
    Saturating,
    Surface,
)
from tinylm.laws.isoflop import Minimum, bias, exponents, group, minima
from tinylm.laws.runs import Runs, distinct, drop_worst

Form = Literal["chinchilla", "coupled", "saturating", "kaplan", "overtraining", "data-constrained",
               "frontier", "power-law", "power-law-last4"]
SURFACES = {"chinchilla": Surface, "coupled": Coupled, "saturating": Saturating, "kaplan": Kaplan,
            "overtraining": OverTraining, "data-constrained": DataConstrained}
FRONTIERS = ("frontier", "power-law", "power-law-last4")
COMPARED = 5000
SPARE = {True: 6, False: 4}  # minima that a frontier is resampled from, with a floor and without
POORLY = 0.3  # a standard deviation over its exponent, beyond which it is said
CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the runs by compute, where there are no isoFLOP minima


def cleaned(runs: Runs, worst: int = 0) -> tuple[Runs, list[str]]:
    """Drop repeated rows and the `worst` losses; say what went."""
    kept, said = distinct(runs), []
    if repeats := len(runs.loss) - len(kept.loss):
        said.append(f"dropped {repeats} rows that repeat an earlier row in every number")
    if worst:
        fewer = drop_worst(kept, worst)
        least = np.sort(kept.loss)[-worst:].min()
        kept = fewer
        said.append(f"dropped the {worst} largest losses, {least:.4g} nats and above")
    return kept, said


def fit_form(runs: Runs, form: Form, estimator: Estimator = "huber", delta: float = 1e-3,
             ceiling: float = 0.0) -> Fit:
    """Fit a law by name; those of the frontier go through the bracketed isoFLOP minima.

    `ceiling`, nats, is for the saturating law. Frontiers are fitted by least squares on log loss.
    """
    if form not in FRONTIERS:
        given = {"ceiling": ceiling} if form == "saturating" and ceiling else {}
        return fit_law(runs, SURFACES[form], estimator, delta, **given)
    found, need = minima(runs), 3 if form == "frontier" else 2
    kept = [m for m in found if m.bracketed]
    if len(kept) < need:
        why = "; ".join(f"{m.flops:.2g} FLOPs: {m.reason}" for m in found[:3] if not m.bracketed)
        raise BadInput(f"{len(kept)} of {len(found)} budgets have a bracketed minimum and {form} "
                       f"takes {need} or more ({why}); add sizes on both sides of the minimum")
    return _fit_minima(kept, form)


def told(fit: Fit, resamples: int = 0) -> dict[str, Any]:
    """Give a fit as plain values; with `resamples`, standard deviation and 95% by constant.

    `uncertain` holds the exponents that 60 resamples of a surface's runs move by more than POORLY.
    """
    out = {"law": vars(fit.law), "objective": fit.objective, "runs": len(fit.residuals),
           "residual_sd": float(fit.residuals.std()), "certificate": fit.certificate}
    if resamples:
        if isinstance(fit.law, Frontier) and len(fit.residuals) < (need := SPARE[fit.law.E > 0]):
            raise BadInput(f"{len(fit.residuals)} minima leave nothing to resample: {need} or more "
                           "give an error; leave --bootstrap out")
        refits = resample(fit, resamples)
        low, high = np.percentile(refits, [2.5, 97.5], axis=0)
        rows = zip(fit.law.names(), refits.std(axis=0), low, high, strict=True)
        out["bootstrap"] = {"resamples": resamples, "constants": {
            name: {"sd": float(sd), "low95": float(a), "high95": float(b)}
            for name, sd, a, b in rows}}
    if not isinstance(fit.law, Frontier) and fit.problem.delta > 0 and (
            len(fit.residuals) <= COMPARED):
        spread = zip(fit.law.names(), resample(fit, 60).std(axis=0), strict=True)
        out["uncertain"] = {name: float(sd) / vars(fit.law)[name] for name, sd in spread
                            if name in ("alpha", "beta") and sd > POORLY * vars(fit.law)[name] > 0}
    return out


def curves(runs: Runs) -> dict[str, Any]:
    """Give the isoFLOP minima, the exponents of the best size and tokens, and the method's bias.

    What the runs do not show says why under `refused`; a number that is none is None.
    """
    if why := scattered(runs):
        return {"minima": [], "exponents": {"refused": why}, "bias": {"refused": why}}
    found = minima(runs)
    shown = {m.flops for m in found if m.bracketed}
    return {"minima": [{k: _finite(v) for k, v in m._asdict().items()} for m in found],
            "exponents": or_why(lambda: exponents(found)._asdict()),
            "bias": or_why(lambda: {"percent": [b._asdict() for b in bias(runs)
                                                if b.flops in shown]})}


def scattered(runs: Runs) -> str:
    """Say why there are no isoFLOP curves where most runs share no budget; empty where they do."""
    labels = group(runs.flops)
    sizes = np.unique(np.stack([labels, np.log(runs.params).round(6)]), axis=1)[0].astype(int)
    curved = int((np.bincount(sizes)[labels] >= 4).sum())
    return "" if curved >= len(labels) / 2 else (
        f"{curved} of {len(labels)} runs share a budget (FLOPs within 3%) with 3 other sizes or "
        "more; isoFLOP curves need most runs to")


def or_why(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Give what is made, or under `refused` why it cannot be."""
    try:
        return make()
    except BadInput as refusal:
        return {"refused": str(refusal)}


def compare(runs: Runs, estimator: Estimator = "huber", delta: float = 1e-3,
            ceiling: float = 0.0) -> list[dict[str, Any]]:
    """Rank the laws by rolling-origin error: fit below a cut of compute, forecast what lies above.

    Cuts (16 at most) and targets are the bracketed isoFLOP minima where there are 5 or more, with
    3 below the first cut; else quantiles of the runs' FLOPs and every run above, and frontiers
    are left out. Of more than COMPARED runs, every n-th by compute is taken. Errors are percent
    of the loss, over the same targets for all; a law that some cut cannot identify comes last.
    """
    if len(runs.loss) > COMPARED:
        picked = np.linspace(0, len(runs.loss) - 1, COMPARED).astype(int)
        runs = runs.keep(np.argsort(runs.flops, kind="stable")[picked])
    found = [m for m in minima(runs) if m.bracketed]
    if len(found) >= 5:
        cuts = np.unique(np.linspace(2, len(found) - 2, 16).astype(int))
        splits = [(runs.keep(runs.flops <= 1.03 * found[i].flops), found[:i + 1],
                   _columns(found[i + 1:])) for i in cuts]
    else:
        ends = np.unique(np.quantile(runs.flops, CUTS, method="nearest"))
        splits = [(runs.keep(runs.flops <= end), [], runs.keep(runs.flops > end)) for end in ends]
        splits = [split for split in splits if len(split[2].loss)]
    if not splits:
        raise BadInput("all runs have one budget; laws are compared over 2 or more")
    forms = [*SURFACES, *(FRONTIERS if len(found) >= 5 else ())]
    if not ceiling:
        forms.remove("saturating")
    if runs.unique is None or len(found) >= 5:  # a minimum has no number of unique tokens
        forms.remove("data-constrained")
    rows = [_rolled(splits, form, estimator, delta, ceiling) for form in forms]
    if all("refused" in row for row in rows):
        raise BadInput(f"no law can be compared here; {rows[0]['form']}: {rows[0]['refused']}")
    return sorted(rows, key=lambda row: ("refused" in row, row.get("mean_percent", 0.0)))


def _rolled(splits, form, estimator, delta, ceiling):
    errors = []
    for below, bottoms, above in splits:
        try:
            law = (_fit_minima(bottoms, form) if form in FRONTIERS
                   else fit_form(below, form, estimator, delta, ceiling)).law
        except BadInput as refusal:
            return {"form": form, "refused": f"below {below.flops.max():.3g} FLOPs: {refusal}"}
        table = above._asdict()
        errors.append(law.loss(*(table[name] for name in law.columns)) / above.loss - 1)
    off = 100 * np.concatenate(errors)
    return {"form": form, "cuts": len(splits), "forecasts": len(off),
            "mean_percent": float(np.abs(off).mean()), "worst_percent": float(np.abs(off).max()),
            "bias_percent": float(off.mean())}


def _fit_minima(found: list[Minimum], form):
    found = found[-4:] if form == "power-law-last4" else found
    return fit_frontier([m.flops for m in found], [m.loss for m in found], form == "frontier")


def _finite(value: Any) -> Any:
    """Give None for a number that is none, in a tuple as well."""
    if isinstance(value, tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(found: list[Minimum]) -> Runs:
    return Runs(*(np.array([m[i] for m in found]) for i in (1, 2, 0, 3)))
