"""Join several laws into one forecast, each weighted by how well it forecast inside the sweep.

Rolling origin: from every cut that leaves 3 or more budgets each law predicts the later ones; its
weight is one over the mean square of those errors. Two power laws, which have no floor, and three
surfaces, which fit one: why these, and what the weights gain over equal ones, is in
experiments/calibrate_intervals.py. What a sweep does not tell is the floor, so the frontiers of
given floors (`floors`) say how far off the forecast may be, not what it is.
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np

from tinylm.config import BadInput
from tinylm.laws.descent import descend
from tinylm.laws.fit import Fit, fit_frontier, fit_law
from tinylm.laws.forms import Coupled, Frontier, Surface
from tinylm.laws.isoflop import Minimum, exponents, minima, pulls
from tinylm.laws.runs import Runs

LEAST_BUDGETS = 3
NEAR = 2.5  # `near` surfaces are fitted to runs within this factor of the best params
FLOORS = (0.3, 0.5, 0.7)  # given to frontiers, as shares of the sweep's least loss
STEP = 1.25  # a budget closer than this factor above a cut is no forecast
PRIOR_RUNS, PRIOR_ERROR = 4, 0.006  # what a law's rolling errors are averaged with
RULE = ("geometric mean of the laws, each weighted by one over its mean square error in "
        "forecasting the sweep's later budgets from its earlier ones")


class Target(NamedTuple):
    """The run, or the minimum, that is forecast."""

    flops: float
    params: float
    tokens: float


class Blend(NamedTuple):
    """Laws fitted to one sweep, with the weights its rolling origins give them."""

    fits: dict[str, Fit]
    weights: dict[str, float]  # sum to 1
    runs: Runs
    found: list[Minimum]  # bracketed, least budget first
    budgets: np.ndarray | None = None  # the runs' labels, if not by FLOPs
    missed: float = 0.0  # log loss by which it errs on the last minimum, fitted below it

    def predictions(self, target: Target) -> dict[str, float]:
        """Give each law's prediction, nats."""
        return {name: said(fit, self.found, target) for name, fit in self.fits.items()}

    def predicted(self, target: Target) -> float:
        """Give the joined prediction, nats."""
        told = self.predictions(target)
        return math.exp(sum(w * math.log(told[name]) for name, w in self.weights.items()))


def bracketed(runs: Runs, budgets: np.ndarray | None = None) -> list[Minimum]:
    """Give the bracketed minima, least budget first; under 3 raise BadInput with the reasons."""
    found = minima(runs, budgets)
    kept = [m for m in found if m.bracketed]
    if len(kept) < LEAST_BUDGETS:
        why = "; ".join(f"{m.flops:.3g}: {m.reason}" for m in found if not m.bracketed)
        raise BadInput(f"{len(kept)} budgets have a bracketed minimum, {LEAST_BUDGETS} are needed"
                       f"{f' ({why})' if why else '; add budgets'}")
    return kept


def blend(runs: Runs, budgets: np.ndarray | None = None) -> Blend:
    """Fit all laws to a sweep and weigh them by its own rolling origins.

    `budgets` labels the runs where their FLOPs differ by over 3%. Too few bracketed budgets raise
    BadInput.
    """
    found = bracketed(runs, budgets)
    fits, errors = fit_all(runs, found), rolled(runs, found)
    weights = weigh(list(fits), errors)
    last = {name: weights[name] * errors[name][-1] for name in weights if errors.get(name)}
    missed = sum(last.values()) / sum(weights[name] for name in last) if last else 0.0
    return Blend(fits, weights, runs, found, budgets, missed)


def fit_all(runs: Runs, found: list[Minimum]) -> dict[str, Fit]:
    """Fit every law that these runs identify: frontiers to the minima, surfaces to the runs."""
    flops, loss = (np.array([getattr(m, k) for m in found]) for k in ("flops", "loss"))
    near = runs.keep(_near(runs, found))
    makers = {
        "power_law": lambda: fit_frontier(flops, loss, floor=False),
        "power_law_last4": lambda: fit_frontier(flops[-4:], loss[-4:], floor=False),
        "surface_near": lambda: fit_law(near, Surface),
        "coupled_near": lambda: fit_law(near, Coupled),
        "coupled": lambda: fit_law(runs, Coupled)}
    fits = {}
    for name, make in makers.items():
        with contextlib.suppress(BadInput):  # what the runs cannot identify is left out
            fits[name] = make()
    return fits


def floors(found: list[Minimum]) -> list[Fit]:
    """Fit frontiers of given floors to the minima."""
    flops, loss = (np.array([getattr(m, k) for m in found]) for k in ("flops", "loss"))
    bottoms = Runs(flops, flops, flops, loss)
    return [fit_law(bottoms, Frontier, delta=math.inf, E=share * float(loss.min()))
            for share in FLOORS]


def said(fit: Fit, found: list[Minimum], target: Target) -> float:
    """Give one law's prediction of a target's loss, nats."""
    if isinstance(fit.law, Frontier):
        return float(fit.law.loss(target.flops)) + excess(found, target)
    return float(fit.law.loss(target.params, target.tokens))


def excess(found: list[Minimum], target: Target) -> float:
    """Give what a size off the optimum costs by the isoFLOP parabolas, nats."""
    off = _off(target.params, target.flops, found)
    return float(np.mean([m.curvature for m in found])) / 2 * off**2


def rolled(runs: Runs, found: list[Minimum]) -> dict[str, list[float]]:
    """Give each law's errors, of log loss, in forecasting every later minimum from every cut."""
    errors: dict[str, list[float]] = {}
    for cut in range(LEAST_BUDGETS, len(found)):
        below = found[:cut]
        end = math.sqrt(below[-1].flops * found[cut].flops)
        later = [m for m in found[cut:] if m.flops >= STEP * below[-1].flops]
        for name, fit in fit_all(runs.keep(runs.flops < end), below).items():
            errors.setdefault(name, []).extend(
                math.log(said(fit, below, Target(m.flops, m.params, m.tokens)) / m.loss)
                for m in later)
    return errors


def weigh(names: list[str], errors: dict[str, list[float]]) -> dict[str, float]:
    """Weight laws by one over the mean square of their rolling errors; equal if none."""
    score = {}
    for name in names:
        squares = [e**2 for e in errors.get(name, [])] + [PRIOR_ERROR**2] * PRIOR_RUNS
        score[name] = len(squares) / sum(squares) if errors else 1.0
    return {name: value / sum(score.values()) for name, value in score.items()}


def redrawn(blended: Blend, target: Target, noise: np.ndarray) -> np.ndarray:
    """Give the joined prediction (batch,) refitted to the runs' losses plus noise (batch, runs).

    All refits of a law descend at once from its optimum; windows, weights and the excess of a
    target's size stay as they are. Noise in nats; minima move by `isoflop.pulls`.
    """
    runs, found = blended.runs, blended.found
    bottoms = noise @ pulls(runs, found, blended.budgets).T
    near, beyond = _near(runs, found), excess(found, target)
    logs = np.zeros(len(noise))
    for name, fit in blended.fits.items():
        if isinstance(fit.law, Frontier):
            bumps, at, more = bottoms[:, -len(fit.residuals):], target[:1], beyond
        else:
            bumps, at, more = noise[:, near] if name.endswith("_near") else noise, target[1:], 0.0
        logs += blended.weights[name] * np.log(refitted(fit, at, bumps) + more)
    return np.exp(logs)


def refitted(fit: Fit, at: tuple[float, ...], bumps: np.ndarray) -> np.ndarray:
    """Give a law's loss (batch,) at one point of its columns, refitted to losses plus bumps.

    `bumps` (batch, runs) in nats; each refit is the minimum below the fit's optimum.
    """
    problem = fit.problem._replace(loss=fit.problem.loss + bumps / fit.least)
    theta = descend(np.repeat(fit.theta[None], len(bumps), axis=0), problem)
    x = np.log(np.array(at, float)) - fit.centre
    return fit.law.evaluate(theta, x[:, None])[0][:, 0] * fit.least


def _off(params, flops, found):
    """Give ln of params over the best params at those FLOPs by the exponents."""
    line = exponents(found)
    return np.log(params) - line.log_params - line.a * np.log(flops)


def _near(runs, found):
    return np.abs(_off(runs.params, runs.flops, found)) <= math.log(NEAR)
