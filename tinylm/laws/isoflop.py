"""Find the size of least loss at each budget, or say why the runs do not show one.

A parabola of loss in ln params through the runs near the minimum. On the surface of Hoffmann et
al. (1.69, 406.4, 410.7, .34, .28) a parabola misplaces the tokens by -.33 / -1.3 / -2.9 / -5.1% on
grids of 2 / 4 / 8 / 16 times either side, and by -23% at 16 with exponents .465 / .155: hence a
window, and `bias`, which says how far off the parabola is on the grid at hand.
"""

import math
from typing import NamedTuple

import numpy as np

from tinylm.config import BadInput
from tinylm.laws.accounting import Parameters, six_nd
from tinylm.laws.fit import fit_law
from tinylm.laws.forms import Surface
from tinylm.laws.runs import Runs

WINDOW = 4.0  # factor of params about the minimum within which runs are fitted
NEAREST = 5  # sizes that are fitted at least, where there are as many
SAME_BUDGET = 0.03  # relative difference of FLOPs within one budget


class Minimum(NamedTuple):
    """The bottom of one budget's curve; numbers are those of the parabola even if refused."""

    flops: float
    params: float
    tokens: float
    loss: float  # nats
    curvature: float  # second derivative of the loss in ln params, nats
    bracketed: bool
    reason: str  # in words, why it is refused; empty where bracketed
    coefficients: tuple[float, ...]  # loss = c0 + c1 u + c2 u^2, u = ln params
    loss_se: float  # standard error of `loss` from the fit's residuals (or the runs' sigma), nats
    scatter: float  # standard deviation of the runs about the parabola, nats; 0 if unknown


class Exponents(NamedTuple):
    """params ~ flops^a and tokens ~ flops^b along the minima, with standard errors."""

    a: float
    a_se: float
    b: float
    b_se: float
    log_params: float  # ln params at 1 FLOP, so that params = exp(log_params + a ln flops)


class Bias(NamedTuple):
    """By how much the parabola misses the minimum of a known surface on a budget's own grid."""

    flops: float
    params_percent: float
    tokens_percent: float
    loss_percent: float


def group(flops: np.ndarray) -> np.ndarray:
    """Label runs by budget: FLOPs that differ by under 3% from the group's least are one."""
    labels, first, label = np.zeros(len(flops), int), -math.inf, -1
    for i in np.argsort(flops, kind="stable"):
        if math.log(flops[i]) - first > SAME_BUDGET:
            first, label = math.log(flops[i]), label + 1
        labels[i] = label
    return labels


def minima(runs: Runs, budgets: np.ndarray | None = None) -> list[Minimum]:
    """Give one Minimum a budget, least budget first; `budgets` labels the runs if given."""
    labels = group(runs.flops) if budgets is None else np.asarray(budgets)
    if len(labels) != len(runs.loss):
        raise BadInput(f"{len(labels)} budget labels for {len(runs.loss)} runs; give one a run")
    found = [_minimum(runs.keep(labels == label)) for label in np.unique(labels)]
    return sorted(found, key=lambda m: m.flops)


def pulls(runs: Runs, found: list[Minimum], budgets: np.ndarray | None = None) -> np.ndarray:
    """Give d minimum / d loss (minima, runs): how far each run's loss moves each bottom.

    Exact to first order where the window of the parabola stays, since it is linear in the losses.
    """
    labels = group(runs.flops) if budgets is None else np.asarray(budgets)
    at, out = {m.flops: i for i, m in enumerate(found)}, np.zeros((len(found), len(runs.loss)))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        flops = _mean_flops(runs.keep(rows))
        if flops in at:
            u, bottom = np.log(runs.params[rows]), math.log(found[at[flops]].params)
            near = _nearest(u, bottom)
            root = 1.0 if runs.sigma is None else 1 / runs.sigma[rows][near, None]
            design = np.vander(u[near] - bottom, 3, increasing=True) * root
            out[at[flops], rows[near]] = np.linalg.pinv(design)[0] * np.ravel(root)
    return out


def exponents(found: list[Minimum]) -> Exponents:
    """Fit the exponents of the bracketed minima by least squares on logs; needs 3 or more."""
    kept = [m for m in found if m.bracketed]
    if len(kept) < 3:
        raise BadInput(f"{len(kept)} bracketed minima cannot give exponents with an error; "
                       "add sizes to the refused budgets until 3 are bracketed")
    c, n, d = (np.log([getattr(m, k) for m in kept]) for k in ("flops", "params", "tokens"))
    a, a_se, log_params = _line(c, n)
    b, b_se, _ = _line(c, d)
    return Exponents(a, a_se, b, b_se, log_params)


def bias(runs: Runs) -> list[Bias]:
    """Estimate the parabola's bias on these runs' grid, from the law that they suggest.

    The losses are replaced by those of the fitted Surface, whose minima are known; FLOPs a
    parameter and token are each budget's geometric mean.
    """
    law = fit_law(runs, Surface).law
    said = runs._replace(loss=law.loss(runs.params, runs.tokens), sigma=None)
    labels, out = group(runs.flops), []
    for label in np.unique(labels):
        (m,) = minima(said.keep(labels == label), np.zeros((labels == label).sum()))
        here = runs.keep(labels == label)
        kappa = float(np.exp(np.log(here.flops / here.params / here.tokens).mean()))
        true = law.optimum(m.flops, kappa)
        got = (m.params, m.tokens, m.loss)
        out.append(Bias(m.flops, *(100 * (g / t - 1) for g, t in zip(got, true, strict=True))))
    return sorted(out)


def conventions(runs: Runs, counts: list[Parameters]) -> dict[str, Exponents]:
    """Give the exponents of the same minima under three counts of params and two of FLOPs.

    `counts`, one a run, belong to runs whose `params` is blocks and head. Keys are `blocks exact`,
    `blocks 6nd`, `blocks+head ..` and `all ..`; 6nd is of the counted params.
    """
    kept = [m for m in minima(runs) if m.bracketed]
    ways = {"blocks": [c.blocks for c in counts], "blocks+head": [c.law for c in counts],
            "all": [c.total for c in counts]}
    order, out = np.argsort(runs.params, kind="stable"), {}
    for name, counted in ways.items():
        logs = np.interp(np.log([m.params for m in kept]), np.log(runs.params[order]),
                         np.log(np.array(counted, float)[order]))
        told = [m._replace(params=math.exp(n)) for m, n in zip(kept, logs, strict=True)]
        out[f"{name} exact"] = exponents(told)
        out[f"{name} 6nd"] = exponents([m._replace(flops=six_nd(m.params, m.tokens))
                                        for m in told])
    return out


def _minimum(runs):
    u = np.log(runs.params)
    flops = _mean_flops(runs)
    sizes = len(np.unique(u.round(6)))
    if sizes < 4:
        i = int(runs.loss.argmin())
        reason = f"{sizes} sizes; train 4 or more at this budget"
        return Minimum(flops, float(runs.params[i]), float(runs.tokens[i]), float(runs.loss[i]),
                       math.nan, False, reason, (math.nan,) * 3, math.nan, 0.0)
    bottom = u[runs.loss.argmin()]
    for _ in range(4):  # each pass centres the window on the last fitted bottom
        near = _nearest(u, bottom)
        shift = u[near].mean()
        curve, covariance, scatter = _curve(u[near] - shift, runs.keep(near))
        bottom = shift + _bottom(curve, u[near] - shift)
    at, bend = (bottom - shift) ** np.arange(3), 2 * curve[2]
    slope, level = np.polyfit(u[near], np.log(runs.tokens[near]), 1)
    reason = _refusal(bend, 2 * math.sqrt(max(covariance[2, 2], 0.0)), bottom, u)
    unshifted = np.polynomial.Polynomial(curve)(np.polynomial.Polynomial([-shift, 1.0])).coef
    return Minimum(flops, math.exp(bottom), math.exp(level + slope * bottom), float(at @ curve),
                   float(bend), not reason, reason, tuple(map(float, unshifted)),
                   math.sqrt(max(at @ covariance @ at, 0.0)), scatter)


def _mean_flops(runs):
    return float(np.exp(np.log(runs.flops).mean()))


def _nearest(u, centre):
    """Mask the runs within the window, or the nearest sizes until NEAREST (or all) are in."""
    far = np.abs(u - centre)
    sizes = np.sort(np.unique(far.round(6)))
    needed = sizes[min(NEAREST, len(sizes)) - 1]
    return far <= max(math.log(WINDOW), needed) + 1e-6


def _curve(v, runs):
    """Fit loss = p . (1, v, v^2); give p, its covariance and the scatter."""
    design = np.vander(v, 3, increasing=True)
    root = np.ones(len(v)) if runs.sigma is None else 1 / runs.sigma
    p, *_ = np.linalg.lstsq(design * root[:, None], runs.loss * root, rcond=None)
    squares, free = float(((design @ p - runs.loss) ** 2).sum()), len(v) - 3
    scatter = math.sqrt(squares / free) if free > 0 else 0.0
    inverse = np.linalg.pinv((design * root[:, None]).T @ (design * root[:, None]))
    return p, inverse * (scatter**2 if runs.sigma is None else 1.0), scatter


def _bottom(curve, v):
    """Give the v of the bottom, within e times of the runs; the lower end if there is none."""
    _, slope, bend = curve
    if 2 * bend > 1e-9 * np.abs(curve).max():
        return float(np.clip(-slope / (2 * bend), v.min() - 1, v.max() + 1))
    ends = np.array([v.min(), v.max()])
    return float(ends[np.polynomial.Polynomial(curve)(ends).argmin()])


def _refusal(bend, bend_se, bottom, u):
    if not bend > 2 * bend_se:
        return "the curve does not bend upwards beyond its noise; add sizes further out or seeds"
    if (u < bottom).sum() == 0:
        return "the minimum lies below the smallest size; add smaller models"
    if (u > bottom).sum() == 0:
        return "the minimum lies above the largest size; add larger models"
    return ""


def _line(x, y):
    """Give slope, its standard error and the intercept of a straight line."""
    (slope, level), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), math.sqrt(covariance[0, 0]), float(level)
