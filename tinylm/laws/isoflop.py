"""Find the size of least loss at each budget, or say why the runs do not show one.

A parabola of loss in ln params through the runs near the minimum. On the surface of Hoffmann et
al. (1.69, 406.4, 410.7, .34, .28) it misplaces the tokens by -.33 / -1.3 / -2.9 / -5.1% on grids
of 2 / 4 / 8 / 16 times either side, and by -23% at 16 with exponents .465 / .155: hence a window.
"""

import math
from typing import NamedTuple

import numpy as np

from tinylm.config import BadInput
from tinylm.laws.runs import Runs

WINDOW = 4.0  # runs within this factor of the minimum's params are fitted, where enough are
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
    coefficients: tuple[float, float, float]  # loss = c0 + c1 u + c2 u^2, u = ln params
    loss_se: float  # standard error of `loss` from the fit's residuals (or the runs' sigma), nats
    scatter: float  # standard deviation of the runs about the parabola, nats; 0 if unknown


class Exponents(NamedTuple):
    """params ~ flops^a and tokens ~ flops^b along the minima, with standard errors."""

    a: float
    a_se: float
    b: float
    b_se: float
    log_params: float  # ln params at 1 FLOP, so that params = exp(log_params + a ln flops)


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


def _minimum(runs):
    u = np.log(runs.params)
    flops = float(np.exp(np.log(runs.flops).mean()))
    sizes = len(np.unique(u.round(6)))
    if sizes < 4:
        i = int(runs.loss.argmin())
        reason = f"{sizes} sizes; train 4 or more at this budget"
        return Minimum(flops, float(runs.params[i]), float(runs.tokens[i]), float(runs.loss[i]),
                       math.nan, False, reason, (math.nan,) * 3, math.nan, 0.0)
    bottom = u[runs.loss.argmin()]
    for _ in range(4):  # each pass centres the window on the last fitted bottom
        near = _nearest(u, bottom)
        parabola, covariance, scatter = _parabola(u[near], runs.keep(near))
        bottom, shift = _bottom(parabola, u[near])
    c2, c1, c0 = parabola
    at = np.array([(bottom - shift) ** 2, bottom - shift, 1.0])
    slope, level = np.polyfit(u[near], np.log(runs.tokens[near]), 1)
    reason = _refusal(c2, math.sqrt(covariance[0, 0]), bottom, u)
    coefficients = (c0 - c1 * shift + c2 * shift**2, c1 - 2 * c2 * shift, c2)
    return Minimum(flops, math.exp(bottom), math.exp(level + slope * bottom),
                   float(at @ parabola), float(2 * c2), not reason, reason,
                   tuple(map(float, coefficients)), math.sqrt(max(at @ covariance @ at, 0.0)),
                   scatter)


def _nearest(u, centre):
    """Mask the runs within the window, or the nearest sizes until 5 (or all) are in."""
    far = np.abs(u - centre)
    sizes = np.sort(np.unique(far.round(6)))
    needed = sizes[min(5, len(sizes)) - 1]
    return far <= max(math.log(WINDOW), needed) + 1e-6


def _parabola(u, runs):
    """Fit loss = p . (v^2, v, 1), v = u - mean; give p, its covariance and the scatter."""
    v = u - u.mean()
    design = np.stack([v**2, v, np.ones_like(v)], axis=1)
    root = np.ones(len(v)) if runs.sigma is None else 1 / runs.sigma
    p, *_ = np.linalg.lstsq(design * root[:, None], runs.loss * root, rcond=None)
    squares, free = float(((design @ p - runs.loss) ** 2).sum()), len(v) - 3
    scatter = math.sqrt(squares / free) if free > 0 else 0.0
    inverse = np.linalg.pinv((design * root[:, None]).T @ (design * root[:, None]))
    return p, inverse * (scatter**2 if runs.sigma is None else 1.0), scatter


def _bottom(parabola, u):
    """Give (u of the bottom, centre of the parabola's variable); the lower end if none."""
    c2, c1, _ = parabola
    shift = u.mean()
    ends = np.array([u.min(), u.max()])
    if c2 > 0:
        return float(np.clip(shift - c1 / (2 * c2), ends[0] - 1, ends[1] + 1)), shift
    values = c2 * (ends - shift) ** 2 + c1 * (ends - shift)
    return float(ends[values.argmin()]), shift


def _refusal(c2, c2_se, bottom, u):
    if c2 <= 2 * c2_se:
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
