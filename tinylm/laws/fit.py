"""Fit a law to runs: starts by variable projection, one robust refinement, a certificate.

Every form here is a sum of decaying powers and an optional floor, so one objective serves all:

    L = sum_j exp(c_j - s_j x_j) [+ E],   x_j the centred log of params, tokens or FLOPs

`huber` and `lad` act on log L, `ls` on L in nats. Method and pitfalls: Besiroglu et al.
(arXiv 2404.10102); its published point is the `lad` fit, its standard errors are of `huber`.
"""

import csv
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import linprog, minimize, nnls

from tinylm.config import BadInput
from tinylm.laws.accounting import six_nd
from tinylm.laws.forms import Frontier, Surface

Estimator = Literal["huber", "lad", "ls"]
STARTS = 8  # best nodes of the exponent grid that are refined
EXPONENTS = np.geomspace(0.03, 1.5, 14)
NAMES = {"params": ("params", "N", "Model Size"), "tokens": ("tokens", "D"),
         "flops": ("flops", "C", "Training FLOP", "budget"), "loss": ("loss",),
         "sigma": ("sigma",)}


class Runs(NamedTuple):
    """A table of finished runs: counts, and the loss in nats per token."""

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    sigma: np.ndarray | None = None  # run-to-run standard deviation of the loss, nats

    def keep(self, mask) -> "Runs":
        """Give the runs at a mask or at indices."""
        return Runs(*(None if column is None else column[mask] for column in self))


@dataclass(frozen=True)
class Fit:
    """A fitted law with the evidence that its optimum is one.

    `objective` is the sum over runs of the estimator's penalty (Huber, absolute or squared);
    `residuals` are log L - log fit, for `ls` L - fit. The certificate holds `starts`, the share
    of them that agree, how far the best one `moved` (largest change of a coordinate), the
    `gradient_norm` (largest cosine between the penalty's pull and a Jacobian column; for `lad`
    the relative decrease that a linear program still promises), and the `condition` number of
    the Jacobian with unit columns.
    """

    law: Surface | Frontier
    objective: float
    residuals: np.ndarray
    certificate: dict


class Problem(NamedTuple):
    """What the optimiser sees: log inputs `x` (terms, runs; centred), loss, weights, penalty."""

    x: np.ndarray
    loss: np.ndarray
    weights: np.ndarray
    floor: bool
    estimator: str
    delta: float


def read_csv(path: Path, only: dict[str, str] | None = None) -> Runs:
    """Read runs with columns params, tokens, flops (two suffice, by 6ND) and loss, maybe sigma.

    `only` keeps the rows whose columns have the given texts. Our pilot's names (N, C) and
    Epoch's (Model Size, Training FLOP) are known too. A bad row raises BadInput by file:line.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            header = table.fieldnames or []
            names = {k: next((a for a in v if a in header), None) for k, v in NAMES.items()}
            _check_header(path, header, names, only or {})
            rows = [_row(f"{path}:{table.line_num}", row, names) for row in table
                    if all(row[k] == v for k, v in (only or {}).items())]
    except (OSError, UnicodeDecodeError) as bad:
        raise BadInput(f"{path} cannot be read ({bad}); give a CSV of runs") from None
    if not rows:
        raise BadInput(f"{path} has no runs{f' with {only}' if only else ''}; give at least one")
    columns = np.array(rows, dtype=float).T
    return Runs(*columns[:4], columns[4] if names["sigma"] else None)


def fit_surface(runs: Runs, estimator: Estimator = "huber", delta: float = 1e-3,
                weights: np.ndarray | None = None) -> Fit:
    """Fit a Surface; refuse (BadInput) a design that cannot identify its five numbers.

    `delta` is the residual in log loss where Huber turns from square to absolute.
    """
    _check_values(**{k: v for k, v in runs._asdict().items() if v is not None})
    _check_design(runs)
    weights = np.ones(len(runs.loss)) if weights is None else np.asarray(weights, float)
    _check_values(weights=weights)
    logs = np.log(np.stack([runs.params, runs.tokens]))
    return _fit(Surface, Problem(logs, runs.loss, weights, True, estimator, delta))


def fit_frontier(flops: np.ndarray, loss: np.ndarray, floor: bool,
                 sigma: np.ndarray | None = None) -> Fit:
    """Fit a Frontier to the best losses at several budgets, by least squares on log loss.

    `sigma`, the losses' standard errors in nats, weights each point by (loss / sigma)^2.
    """
    flops, loss = np.asarray(flops, float), np.asarray(loss, float)
    _check_values(flops=flops, loss=loss)
    need = 3 if floor else 2
    budgets = len(np.unique(flops))
    if budgets < need:
        raise BadInput(f"{budgets} budgets cannot give a frontier's {need} numbers; "
                       f"add runs until there are {need} or more different budgets")
    weights = np.ones(len(loss))
    if sigma is not None:
        _check_values(sigma=np.asarray(sigma, float))
        weights = (loss / sigma) ** 2
        weights = weights / weights.mean()
    return _fit(Frontier, Problem(np.log(flops)[None], loss, weights, floor, "huber", math.inf))


def objective(theta: np.ndarray, problem: Problem) -> tuple[float, np.ndarray]:
    """Give the penalty and its gradient at theta = (c_1.., s_1.. [, E over the least loss])."""
    residual, jacobian = _residuals(theta, problem)
    value, slope = _penalty(residual, problem)
    return float(problem.weights @ value), (problem.weights * slope) @ jacobian


def _penalty(residual, problem):
    if problem.estimator == "ls":
        return residual**2, 2 * residual
    slope = np.clip(residual, -problem.delta, problem.delta)
    return slope * (residual - slope / 2), slope


def _residuals(theta, problem):
    """Give the residuals and their Jacobian (runs, coordinates)."""
    terms = len(problem.x)
    parts = np.exp(theta[:terms, None] - theta[terms:2 * terms, None] * problem.x)
    columns = [parts, -parts * problem.x]
    fit = parts.sum(axis=0)
    if problem.floor:
        least = problem.loss.min()
        fit = fit + theta[-1] * least
        columns.append(np.full((1, len(fit)), least))
    jacobian = -np.concatenate(columns).T
    if problem.estimator == "ls":
        return problem.loss - fit, jacobian
    return np.log(problem.loss / fit), jacobian / fit[:, None]


def _solve(problem):
    """Refine the best grid nodes, keep the best end, and certify it."""
    starts = _starts(problem)
    ends = [_refine(start, problem) for start in starts]
    values = np.array([objective(end, problem)[0] for end in ends])
    best = int(values.argmin())
    theta, promised = ends[best], None
    if problem.estimator == "lad":
        theta, promised = _absolute_polish(theta, problem)
    residual, jacobian = _residuals(theta, problem)
    low, high = np.array(_bounds(problem)).T
    inner = (theta > low) & (theta < high)
    lengths = np.linalg.norm(jacobian, axis=0)
    force = problem.weights * _penalty(residual, problem)[1]
    cosines = force @ jacobian / lengths / (np.linalg.norm(force) + 1e-12)
    return theta, {
        "starts": len(starts),
        "agree_share": float((values <= values[best] * (1 + 1e-6) + 1e-18).mean()),
        "moved": float(np.abs(theta - starts[best]).max()),
        "gradient_norm": float(np.abs(cosines[inner]).max()) if promised is None else promised,
        "condition": float(np.linalg.cond((jacobian / lengths)[:, inner])),
    }


def _starts(problem):
    """Solve the linear part by non-negative least squares at each node of exponents."""
    terms, count = problem.x.shape
    root = np.sqrt(problem.weights)
    root = root if problem.estimator == "ls" else root / problem.loss
    found = []
    for slopes in itertools.product(EXPONENTS, repeat=terms):
        columns = [np.exp(-s * x) for s, x in zip(slopes, problem.x, strict=True)]
        columns += [np.ones(count)] * problem.floor
        scales, miss = nnls((np.stack(columns) * root).T, problem.loss * root)
        least = problem.loss.min()
        logs = np.log(np.maximum(scales[:terms], 1e-3 * least))
        found.append((miss, np.concatenate([logs, slopes, scales[terms:] / least])))
    found.sort(key=lambda pair: pair[0])
    return [theta for _, theta in found[:STARTS]]


def _refine(theta, problem):
    """Minimise from one start, twice: the restart renews the scale and the curvature."""
    for _ in range(2):
        scale = max(objective(theta, problem)[0], 1e-300)
        theta = minimize(lambda at, scale=scale: [v / scale for v in objective(at, problem)],
                         theta, jac=True, method="L-BFGS-B", bounds=_bounds(problem),
                         options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}).x
    return theta


def _absolute_polish(theta, problem):
    """Close in on the least sum of absolute residuals by linear programs in a shrinking box.

    At that optimum as many residuals vanish as there are coordinates: no gradient method gets
    there, a linear program steps onto it. Give also the relative decrease it still promises.
    """
    def value(at):
        return float(problem.weights @ np.abs(_residuals(at, problem)[0]))

    box, promised = 0.05, 1.0
    while box > 1e-9 and promised > 1e-12:
        residual, jacobian = _residuals(theta, problem)
        eye, none = np.eye(len(residual)), np.zeros(len(theta))
        limits = [(max(-box, low - t), min(box, high - t))
                  for t, (low, high) in zip(theta, _bounds(problem), strict=True)]
        step = linprog(np.concatenate([none, problem.weights, problem.weights]),
                       A_eq=np.hstack([jacobian, -eye, eye]), b_eq=-residual,
                       bounds=limits + [(0, None)] * (2 * len(residual)))
        now, trial = value(theta), theta + step.x[:len(theta)]
        promised = max(0.0, 1 - step.fun / now) if now > 0 else 0.0
        if value(trial) < now:
            theta = trial
        else:
            box /= 4
    return theta, promised


def _bounds(problem):
    terms, level = len(problem.x), math.log(problem.loss.min())
    return ([(level - 25, level + 25)] * terms + [(1e-4, 5.0)] * terms
            + [(0.0, 1.0)] * problem.floor)


def _fit(law, problem):
    """Centre the inputs, solve, and build `law` from floor, scales and slopes, uncentred."""
    centre, terms = problem.x.mean(axis=1), len(problem.x)
    problem = problem._replace(x=problem.x - centre[:, None])
    theta, certificate = _solve(problem)
    slopes = theta[terms:2 * terms]
    scales = np.exp(theta[:terms] + slopes * centre)
    floor = theta[-1] * problem.loss.min() if problem.floor else 0.0
    residual = _residuals(theta, problem)[0]
    value = (problem.weights @ np.abs(residual) if problem.estimator == "lad"
             else objective(theta, problem)[0])
    numbers = (float(floor), *scales.tolist(), *slopes.tolist())
    return Fit(law(*numbers), float(value), residual, certificate)


def _check_values(**columns):
    for name, column in columns.items():
        bad = ~(np.isfinite(column) & (column > 0))
        if bad.any():
            at = int(bad.argmax())
            raise BadInput(f"{name}[{at}] is {column[at]}; it must be finite and above 0, "
                           "drop that run")


def _check_design(runs):
    points = np.log(np.stack([runs.params, runs.tokens], axis=1))
    distinct = len(np.unique(points.round(6), axis=0))
    if distinct < 6:
        raise BadInput(f"{distinct} different runs cannot give a surface's 5 numbers with one to "
                       "spare; train 6 or more different (params, tokens)")
    if np.ptp(np.log(runs.flops)) < 0.05:
        raise BadInput(f"all {len(points)} runs have one budget, {runs.flops[0]:.3g} FLOPs; add "
                       "runs at two or more other budgets")
    if np.ptp(points[:, 1] - points[:, 0]) < 0.05:
        ratio = runs.tokens[0] / runs.params[0]
        raise BadInput(f"all runs have {ratio:.3g} tokens a parameter, which cannot tell params "
                       "from tokens; add runs with 4 times more and 4 times fewer")
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)[-1]
    if spread / math.sqrt(len(points)) < 0.02:
        raise BadInput("all runs lie on one line in log params and log tokens; add runs of other "
                       "sizes at the budgets you have")


def _check_header(path, header, names, only):
    for wanted in only:
        if wanted not in header:
            raise BadInput(f"{path} has no column {wanted!r}; it has {', '.join(header)}")
    sizes = [k for k in ("params", "tokens", "flops") if names[k]]
    if not names["loss"] or len(sizes) < 2:
        raise BadInput(f"{path} has columns {', '.join(header)}; it needs loss and two of "
                       "params, tokens, flops")


def _row(where, row, names):
    """Read one row as (params, tokens, flops, loss, sigma), the missing size by 6ND."""
    got = {}
    for key, column in names.items():
        if column is None:
            continue
        try:
            got[key] = float(row[column])
        except (TypeError, ValueError):
            raise BadInput(f"{where} has {column}={row[column]!r}; give a number") from None
        if not (math.isfinite(got[key]) and got[key] > 0):
            raise BadInput(f"{where} has {column}={row[column]}; give a finite number above 0")
    if "params" not in got:
        got["params"] = got["flops"] / six_nd(1, got["tokens"])
    if "tokens" not in got:
        got["tokens"] = got["flops"] / six_nd(got["params"], 1)
    got.setdefault("flops", six_nd(got["params"], got["tokens"]))
    return [got["params"], got["tokens"], got["flops"], got["loss"], got.get("sigma", math.nan)]
