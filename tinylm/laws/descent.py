"""Minimise a law's penalty from many starts, or for many resamples, at once.

Damped Gauss-Newton steps, vectorised over the leading axis. The curvature is that of the runs
within `delta`; the damping is the curvature of the reweighted least squares that bound Huber's
penalty from above, so a fully damped step cannot overshoot (Huber, Robust Statistics, 7.8).
"""

import math
from typing import NamedTuple

import numpy as np

from tinylm.laws.forms import Law

STEPS = 1000
BLOCK = 1 << 18  # numbers a column may have at once: what stays in a processor's cache
LAD_DELTAS = tuple(10.0**-n for n in range(2, 11))  # absolute residuals, as Huber's limit


class Problem(NamedTuple):
    """What is minimised: sum of weights * penalty(residual) over the runs."""

    law: type[Law]
    x: np.ndarray  # (columns, runs) centred logs
    loss: np.ndarray  # (runs,) over the least loss, or (batch, runs)
    weights: np.ndarray  # (runs,), or (batch, runs)
    logs: bool  # residuals are of log loss, not of loss
    delta: float  # where a residual's penalty turns from square to absolute
    bounds: np.ndarray  # (2, K) least and greatest coordinates; equal where one is given


class Slopes(NamedTuple):
    """The penalty at a batch of points, and how it changes."""

    value: np.ndarray  # (batch,)
    gradient: np.ndarray  # (batch, K)
    curvature: np.ndarray  # (batch, K, K) of the runs within delta
    bound: np.ndarray  # (batch, K, K) of the quadratic that lies above the penalty


def residuals(theta: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Give residuals (..., runs) and the Jacobian (..., K, runs) of the fit, at theta (..., K)."""
    fit, jacobian = problem.law.evaluate(theta, problem.x)
    if problem.logs:
        return np.log(problem.loss / fit), jacobian / fit[..., None, :]
    return problem.loss - fit, jacobian


def slopes(theta: np.ndarray, problem: Problem) -> Slopes:
    """Give the penalty, its gradient and curvatures at theta (batch, K)."""
    residual, jacobian = residuals(theta, problem)
    force = np.clip(residual, -problem.delta, problem.delta)
    size, w = np.abs(residual), problem.weights
    near = w * (size <= problem.delta)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = w * np.where(size <= problem.delta, 1.0, problem.delta / size)
    across = np.swapaxes(jacobian, -1, -2)
    return Slopes((w * force * (residual - force / 2)).sum(axis=-1),
                  -(jacobian @ (w * force)[..., None])[..., 0],
                  (jacobian * near[..., None, :]) @ across,
                  (jacobian * above[..., None, :]) @ across)


def descend(theta: np.ndarray, problem: Problem) -> np.ndarray:
    """Give the local minimum below each start, theta (batch, K).

    Weights and losses may differ by start.
    """
    runs = problem.x.shape[1]
    each = max(1, BLOCK // runs)
    problem = problem._replace(weights=np.broadcast_to(problem.weights, (len(theta), runs)))
    parts = [_descend(theta[i:i + each], _rows(problem, slice(i, i + each)))
             for i in range(0, len(theta), each)]
    return np.concatenate(parts)


def descend_absolute(theta: np.ndarray, problem: Problem) -> np.ndarray:
    """Give the least sum of absolute residuals as the limit of Huber's for small delta."""
    for delta in LAD_DELTAS:
        theta = descend(theta, problem._replace(delta=delta))
    return theta


def _rows(problem, at):
    """Keep some starts of a problem whose weights, and maybe losses, differ by start."""
    loss = problem.loss if problem.loss.ndim == 1 else problem.loss[at]
    return problem._replace(weights=problem.weights[at], loss=loss)


def _descend(theta, problem):
    low, high = problem.bounds
    theta = np.clip(theta, low, high)
    live, damping = np.arange(len(theta)), np.full(len(theta), 0.01)
    at = slopes(theta, problem)
    for _ in range(STEPS):
        step, promised = _step(theta[live], at, damping, low, high)
        trial = np.clip(theta[live] + step, low, high)
        new = slopes(trial, _rows(problem, live))
        better = new.value <= at.value
        theta[live[better]] = trial[better]
        at = Slopes(*(np.where(better.reshape(-1, *[1] * (a.ndim - 1)), b, a)
                      for a, b in zip(at, new, strict=True)))
        damping = np.where(better, np.maximum(damping / 5, 1e-9), damping * 4)
        going = (promised * (1 + damping) > 1e-13 * at.value + 1e-28) & (damping < 1e9)
        if not going.any():
            break
        live, damping = live[going], damping[going]
        at = Slopes(*(a[going] for a in at))
    return theta


def _step(theta, at, damping, low, high):
    """Give the damped step within the bounds, and the decrease that a free step promises.

    A coordinate that a bound holds stays on it.
    """
    held = (low == high) | ((theta <= low) & (at.gradient > 0))
    held |= (theta >= high) & (at.gradient < 0)
    matrix = at.curvature + damping[:, None, None] * at.bound
    ridge = 1e-13 * np.trace(matrix, axis1=1, axis2=2)[:, None] + math.ulp(0.0)
    matrix = matrix + ridge[:, :, None] * np.eye(theta.shape[1])
    step, promised = np.zeros_like(theta), None
    for _ in range(theta.shape[1]):  # what meets a bound stops there, and the rest makes room
        pull = -at.gradient - (matrix @ np.where(held, step, 0.0)[..., None])[..., 0]
        free = np.where(held[:, :, None] | held[:, None, :], 0.0, matrix)
        free = free + held[:, :, None] * np.eye(theta.shape[1])
        step = np.linalg.solve(free, np.where(held, step, pull)[..., None])[..., 0]
        promised = -(at.gradient * step).sum(axis=-1) if promised is None else promised
        over = ~held & ((theta + step < low) | (theta + step > high))
        if not over.any():
            break
        step = np.clip(theta + step, low, high) - theta
        held |= over
    return step, promised
