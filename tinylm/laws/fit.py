"""Fit a law to runs: starts by variable projection, one robust refinement, a certificate.

For given exponents a law is (or is near one that is) linear in its floor and scales, so a grid of
exponents with non-negative least squares gives the starts; `descent` refines them together.
`huber` and `lad` act on log L, `ls` on L in nats. Method and pitfalls: Besiroglu et al.
(arXiv 2404.10102); its published point is the `lad` fit, its standard errors are of `huber`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinylm.config import BadInput, require
from tinylm.laws.descent import Problem, descend, descend_absolute, residuals, slopes
from tinylm.laws.forms import LOGGED, Frontier, Law
from tinylm.laws.runs import Runs, check_values

Estimator = Literal["huber", "lad", "ls"]
STARTS = 8  # best nodes of the exponent grid that are refined
SEARCHED = 2000  # runs that the starts are searched and refined on; all refine the best
DRAWN = 10**8  # runs that all resamples together may draw, 8 bytes each
EXPONENTS = np.geomspace(0.03, 1.5, 14)
LIMITS = {"E": (0.0, 1.0), "A": (-25.0, 25.0), "B": (-25.0, 25.0), "k": (math.log(0.1), 3.0),
          "R_D": (-2.0, 7.0), "R_N": (-2.0, 7.0)}  # of theta, the loss over its least
EXPONENT = (1e-4, 5.0)
STOPPED = 1e-3  # a gradient norm above this is no minimum
SINGULAR = 1e7  # a condition above this leaves no constant a digit


@dataclass(frozen=True)
class Fit:
    """A fitted law with the evidence that its optimum is one.

    `objective` is the sum over runs of the estimator's penalty (Huber, absolute or squared);
    `residuals` are log L - log fit, for `ls` L - fit. The certificate holds `starts`, the share
    of them that agree, how far the best one `moved` (largest change of a coordinate), the
    `gradient_norm` (largest cosine between the penalty's pull and a Jacobian column), the
    `condition` number of the Jacobian with unit columns, and the constants `at_bound`.
    """

    law: Law
    objective: float
    residuals: np.ndarray
    certificate: dict
    problem: Problem
    theta: np.ndarray  # where `problem` has its minimum
    centre: np.ndarray  # mean log of the law's columns
    least: float  # the least loss, nats


def fit_law(runs: Runs, law: type[Law], estimator: Estimator = "huber", delta: float = 1e-3,
            **given: float) -> Fit:
    """Fit a law to runs; refuse (BadInput) a design that cannot identify its constants.

    `delta` is the residual in log loss where Huber turns from square to absolute. Where the runs
    have a sigma, their inverse variances, 1 on average, multiply each run's penalty. `given`
    constants (E=0, ceiling=ln V) are not fitted.
    """
    check_values(**{k: v for k, v in runs._asdict().items() if v is not None})
    require("delta", delta, 1e-9, math.inf)
    if law is Frontier:
        _check_budgets(runs.flops, 3 - len(given))
    else:
        _check_design(runs, law, len(law.names()) - len(given))
    weights = np.ones(len(runs.loss))
    if runs.sigma is not None:
        weights = (runs.sigma if estimator == "ls" else runs.sigma / runs.loss) ** -2.0
        weights = weights / weights.mean()
    table = runs._asdict()
    return _fit(law, [table[name] for name in law.columns], runs.loss, weights, estimator, delta,
                given)


def fit_frontier(flops: np.ndarray, loss: np.ndarray, floor: bool) -> Fit:
    """Fit a Frontier to the best losses at several budgets, by least squares on log loss."""
    flops, loss = np.asarray(flops, float), np.asarray(loss, float)
    given = {} if floor else {"E": 0.0}
    return fit_law(Runs(flops, flops, flops, loss), Frontier, delta=math.inf, **given)


def resample(fit: Fit, resamples: int, seed: int = 42) -> np.ndarray:
    """Give the constants (resamples, K) refitted to as many runs drawn with replacement.

    Each is the minimum of its own resample below the fit's optimum. Seed 42 draws what Besiroglu
    et al. drew. Absolute fits raise BadInput: refits jump between the runs they pass through.
    """
    if fit.problem.delta == 0:
        raise BadInput("estimator lad has no smooth refits; resample the huber fit at delta=1e-3")
    count = len(fit.residuals)
    require("resamples", resamples, 1, DRAWN // count)
    drawn = np.random.RandomState(seed).randint(0, count, (resamples, count))
    cells = (drawn + count * np.arange(resamples)[:, None]).ravel()
    times = np.bincount(cells, minlength=resamples * count).reshape(resamples, count)
    problem = fit.problem._replace(weights=fit.problem.weights * times)
    theta = descend(np.repeat(fit.theta[None], resamples, axis=0), problem)
    return _constants(fit.problem.law, theta, fit.centre, fit.least)


def _fit(law, columns, loss, weights, estimator, delta, given):
    """Centre the inputs, solve, certify, and give the constants uncentred."""
    loss = np.asarray(loss, float)
    check_values(weights=weights)
    x = np.log(np.stack(columns))
    centre, least = x.mean(axis=1), float(loss.min())
    centre[2:] = centre[1:2]  # unique tokens keep their ratio to tokens
    delta = {"huber": delta, "lad": 0.0, "ls": math.inf}[estimator]
    problem = Problem(law, x - centre[:, None], loss / least, weights, estimator != "ls",
                      delta, _bounds(law, given, least))
    theta, certificate = _solve(problem)
    residual, value = residuals(theta, problem)[0], _value(theta, problem)
    if estimator == "ls":
        residual, value = residual * least, 2 * value * least**2
    law = law(*_constants(law, theta, centre, least).tolist())
    return Fit(law, float(value), residual, certificate, problem, theta, centre, least)


def _solve(problem):
    """Refine the best grid nodes, keep the best end, and certify it."""
    few = _thinned(problem)
    starts = _starts(few)
    refine = descend if problem.delta else descend_absolute
    ends = refine(starts, few)
    values = np.array([_value(end, few) for end in ends])
    best = int(values.argmin())
    rounding = len(few.loss) * (1e-18 if problem.delta else 1e-9)
    agree = float((values <= values[best] * (1 + 1e-6) + rounding).mean())
    end = ends[best] if few is problem else refine(ends[best][None], problem)[0]
    moved = float(np.abs(end - starts[best]).max())
    certificate = {"starts": len(starts), "agree_share": agree, "moved": moved,
                   **_certify(end, problem)}
    return end, certificate


def _certify(theta, problem):
    """Give gradient norm, condition and bounds reached; refuse what is no single minimum."""
    low, high = problem.bounds
    names = np.array(problem.law.names())
    inner = (theta > low) & (theta < high)
    residual, jacobian = residuals(theta, problem)
    jacobian = jacobian[inner]
    lengths = np.linalg.norm(jacobian, axis=1)
    _identified(lengths > 1e-6 * lengths.max(), names[inner], math.inf, problem.law)
    unit = jacobian / lengths[:, None]
    delta = problem.delta or 1e-10
    force = problem.weights * np.clip(residual, -delta, delta)
    exact = np.abs(residual).max() < 1e-12  # nothing pulls but rounding
    pull = 0.0 if exact else float(np.abs(unit @ force).max() / np.linalg.norm(force))
    _, singular, ways = np.linalg.svd(unit.T, full_matrices=False)
    condition = float(singular[0] / max(singular[-1], 1e-300))
    if not condition < SINGULAR:
        _identified(np.abs(ways[-1]) < 0.3, names[inner], condition, problem.law)
    if not pull < STOPPED:
        raise BadInput(f"the fit of {problem.law.__name__} stopped where its gradient norm is "
                       f"{pull:.2g}, above {STOPPED}: no minimum; add runs or fit a smaller law")
    return {"gradient_norm": pull, "condition": condition,
            "at_bound": names[~inner & (low < high)].tolist()}


def _identified(told, names, condition, law):
    if not told.all():
        raise BadInput(f"these runs cannot tell {' and '.join(names[~told])} of {law.__name__} "
                       f"(condition {condition:.1g}); {law.needs}")


def _value(theta, problem):
    residual = residuals(theta, problem)[0]
    if not problem.delta:
        return problem.weights @ np.abs(residual)
    return slopes(theta[None], problem).value[0]


def _thinned(problem):
    count = len(problem.loss)
    if count <= SEARCHED:
        return problem
    few = np.linspace(0, count - 1, SEARCHED).astype(int)
    return problem._replace(x=problem.x[:, few], loss=problem.loss[few],
                            weights=problem.weights[few])


def _starts(problem):
    """Solve the linear part at each node of exponents, add the shapes, keep the best STARTS."""
    from scipy.optimize import nnls  # a second to import, which what trains need not wait for

    law, names = problem.law, problem.law.names()
    exponents = list(dict.fromkeys(exponent for _, _, exponent in law.terms))
    low, high = problem.bounds
    root = np.sqrt(problem.weights) / (problem.loss if problem.logs else 1.0)
    floor = dict(zip(names, high > low, strict=True)).get("E", False)
    nodes = []
    for powers in itertools.product(EXPONENTS, repeat=len(exponents)):
        by_name = dict(zip(exponents, powers, strict=True))
        columns = [np.exp(-by_name[e] * problem.x[i]) for _, i, e in law.terms]
        columns += [np.ones(len(root))] * int(floor)
        scales, _ = nnls((np.stack(columns) * root).T, problem.loss * root)
        logs = np.log(np.maximum(scales, 1e-3))
        by_name |= {term[0]: logs[i] for i, term in enumerate(law.terms)}
        by_name |= {"E": scales[-1]} if floor else {}
        for shapes in itertools.product(*law.shapes.values()):
            by_name |= dict(zip(law.shapes, np.log(shapes), strict=True))
            nodes.append([by_name.get(n, at) for n, at in zip(names, low, strict=True)])
    nodes = np.clip(nodes, low, high)
    wide = problem._replace(delta=max(problem.delta, 0.01))
    values = [slopes(nodes[i:i + 64], wide).value for i in range(0, len(nodes), 64)]
    return nodes[np.argsort(np.concatenate(values), kind="stable")[:STARTS]]


def _bounds(law, given, least):
    found = np.array([LIMITS.get(name, EXPONENT) for name in law.names()])
    for name, value in given.items():
        found[law.names().index(name)] = value / least
    if "ceiling" in law.names() and "ceiling" not in given:
        raise BadInput(f"{law.__name__} has no ceiling; give one, such as ln V = 10.4 nats")
    if "ceiling" in given:
        require("ceiling", given["ceiling"], math.nextafter(least, math.inf), math.inf)
    return found.T


def _constants(law, theta, centre, least):
    """Turn coordinates (..., K) on centred logs and loss over least into constants in nats."""
    names, out = law.names(), np.array(theta, float)
    for scale, column, exponent in law.terms:
        out[..., names.index(scale)] += (theta[..., names.index(exponent)] * centre[column]
                                         + math.log(least))
    for i, name in enumerate(names):
        if name in LOGGED:
            out[..., i] = np.exp(out[..., i])
        elif name in ("E", "ceiling"):
            out[..., i] *= least
    return out


def _check_budgets(flops, need):
    budgets = len(np.unique(flops))
    if budgets < need:
        raise BadInput(f"{budgets} budgets cannot give a frontier's {need} numbers; "
                       f"add runs until there are {need} or more different budgets")


def _check_design(runs, law, need):
    points = np.log(np.stack([runs.params, runs.tokens], axis=1))
    distinct, name = len(np.unique(points.round(6), axis=0)), law.__name__.lower()
    if distinct <= need:
        raise BadInput(f"{distinct} different runs cannot give a {name}'s {need} numbers with one "
                       f"to spare; train {need + 1} or more different (params, tokens)")
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
    if "unique" in law.columns and runs.unique is None:
        raise BadInput(f"{name} has no unique tokens; give a column of them: {law.needs}")
