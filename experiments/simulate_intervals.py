"""Do forecast intervals hold where the truth is known, because we drew it?

Each draw takes a law from the population below, trains 5 budgets over 100 times the compute, 7
sizes within 4 times of the best, adds run noise, and forecasts one run of 10 times the compute at
the size that the sweep's own exponents call best. `known`: the truth is a Surface, and the interval
is that of a Surface fitted by least squares, refits and run noise only. `unknown`: the truth is
exact (Surface), saturating or coupled in equal parts, the interval that of the package.

Population: alpha, beta uniform in .25-.45; floor .3-.7 of the best loss at the top budget; best
tokens a parameter there 5-40 (log-uniform); noise .002-.01 of the loss (log-uniform); coupled:
k .6-1.6 (log-uniform); saturating: ceiling 1.5-4 times the best loss at the least budget.

Command:  python -m experiments.simulate_intervals --draws 1000 --out experiments/results
Cost:     six minutes on one core.
Expected: 85-95% held, no form under 75%.
Result:   known 88.4%; unknown 90.3%: exact 94.6, saturating 85.3, coupled 91.0.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from tinylm import files
from tinylm.config import BadInput
from tinylm.laws import intervals
from tinylm.laws.blend import Target, blend, refitted
from tinylm.laws.fit import fit_law
from tinylm.laws.forms import Coupled, Law, Saturating, Surface
from tinylm.laws.isoflop import exponents
from tinylm.laws.runs import Runs

TOP, SPAN, BUDGETS, SIZES, SPREAD, FACTOR = 1e19, 100.0, 5, 7, 4.0, 10.0
BEST = 3.0  # nats, the best loss at the top budget; all else is in shares of it


def main() -> None:
    """Read the flags, draw, write the shares that held."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--draws", type=int, default=1000, help="of unknown form, and half known")
    flags.add_argument("--out", type=Path, required=True, help="folder for the result")
    flags.add_argument("--seed", type=int, default=0, help="of the draws")
    given = flags.parse_args()
    found = {"known": pooled([known(given.seed, i) for i in range(given.draws // 2)]),
             "unknown": pooled([unknown(given.seed, i) for i in range(given.draws)])}
    found["unknown"]["all"]["multiplier"] = intervals.shipped()["multiplier"]
    files.write_json(given.out / "simulate_intervals.json", found)
    for name, part in found.items():
        for form, told in part.items():
            print(name.ljust(8), form.ljust(11), f"held {told['held']:.3f} of {told['draws']}, "
                  f"mean half-width {told['half_width_percent']:.2f}%, mean |error| "
                  f"{told['error_percent']:.2f}%")


def drawn(form: str, rng: np.random.Generator) -> tuple[Law, float]:
    """Draw a law of the population, and the noise as a share of the loss."""
    def logs(low, high):
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    alpha, beta = rng.uniform(0.25, 0.45, 2)
    E, ratio, noise = BEST * rng.uniform(0.3, 0.7), logs(5, 40), logs(0.002, 0.01)
    params = math.sqrt(TOP / 6 / ratio)
    by_params = (BEST - E) * beta / (alpha + beta)
    surface = Surface(E, by_params * params**alpha,
                      (BEST - E - by_params) * (ratio * params) ** beta, alpha, beta)
    k, times = logs(0.6, 1.6), rng.uniform(1.5, 4.0)
    same = vars(surface).values()
    if form == "coupled":
        return Coupled(*same, k), noise
    if form == "saturating":
        return Saturating(*same, times * surface.optimum(TOP / SPAN)[2]), noise
    return surface, noise


def sweep(law: Law, noise: float, rng: np.random.Generator) -> Runs:
    """Train the grid: sizes about the best of the law's own curve."""
    rows = [(n, c / 6 / n) for c in np.geomspace(TOP / SPAN, TOP, BUDGETS)
            for n in best(law, c) * np.geomspace(1 / SPREAD, SPREAD, SIZES)]
    params, tokens = np.array(rows).T
    loss = law.loss(params, tokens) * (1 + noise * rng.standard_normal(len(rows)))
    return Runs(params, tokens, 6 * params * tokens, loss)


def best(law: Law, flops: float) -> float:
    """Give the params of least loss at a budget, on a grid of half a percent."""
    sizes = math.sqrt(flops / 60) * np.geomspace(0.02, 50, 1600)
    return float(sizes[np.argmin(law.loss(sizes, flops / 6 / sizes))])


def unknown(seed: int, i: int) -> tuple[str, bool, float, float]:
    """Draw and forecast by the package: form, held, half-width, error of log loss."""
    form, rng = ("exact", "saturating", "coupled")[i % 3], np.random.default_rng([seed, i])
    law, noise = drawn(form, rng)
    while True:
        try:
            blended = blend(sweep(law, noise, rng))
            break
        except BadInput:  # fewer than 3 minima beyond the noise: that sweep is run again
            continue
    target = sized(blended.found)
    measured = law.loss(*target[1:]) * (1 + noise * rng.standard_normal())
    half = intervals.half_width(intervals.parts(blended, target, resamples=100, seed=i))
    error = math.log(blended.predicted(target) / measured)
    return form, abs(error) <= half, half, error


def known(seed: int, i: int) -> tuple[str, bool, float, float]:
    """Draw a Surface and forecast by a Surface, with refits and run noise for an interval."""
    rng = np.random.default_rng([seed, i, 1])
    law, noise = drawn("exact", rng)
    runs = sweep(law, noise, rng)
    runs = runs._replace(sigma=noise * runs.loss)
    fit, params = fit_law(runs, Surface, "ls"), best(law, FACTOR * TOP)
    at = (params, FACTOR * TOP / 6 / params)
    measured = law.loss(*at) * (1 + noise * rng.standard_normal())
    refits = refitted(fit, at, runs.sigma * rng.standard_normal((200, len(runs.loss))))
    said = fit.law.loss(*at)
    half = intervals.NORMAL_90 * math.hypot(refits.std() / said, noise)
    error = math.log(said / measured)
    return "exact", abs(error) <= half, half, error


def sized(found) -> Target:
    """Give the run of FACTOR times the compute at the size that the exponents call best."""
    line, flops = exponents(found), FACTOR * TOP
    params = math.exp(line.log_params + line.a * math.log(flops))
    return Target(flops, params, flops / 6 / params)


def pooled(told: list[tuple[str, bool, float, float]]) -> dict[str, Any]:
    """Give shares held, mean half-widths and errors by form and for all."""
    out = {}
    for form in (*dict.fromkeys(row[0] for row in told), "all"):
        held, half, error = map(np.array, zip(*(r[1:] for r in told if form in (r[0], "all")),
                                              strict=True))
        out[form] = {"draws": len(held), "held": float(held.mean()),
                     "half_width_percent": 100 * float(half.mean()),
                     "error_percent": 100 * float(np.abs(error).mean()),
                     "bias_percent": 100 * float(error.mean())}
    return out


if __name__ == "__main__":
    main()
