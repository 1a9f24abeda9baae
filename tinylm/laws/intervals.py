"""Say how far a forecast may be off, by a scale that past forecasts of other studies calibrate.

half-width = multiplier x root of the summed squares of five standard deviations of log loss: how
far the laws disagree, how far frontiers of given floors lie from their forecast, how far refits to
noisy runs move, one run's own noise, and a drift in ln(target FLOPs / largest FLOPs fitted) for
what no law knows. The multiplier is
the largest of past studies' own 90% quantiles of |error| / scale (calibration.json, written by
experiments/calibrate_intervals.py). One quantile over all of them, tried first, held too few
simulated studies of 5 budgets (experiments/LOG.md). Bootstrap intervals alone held the truth in
about a fifth of such forecasts: what they miss is the form.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm import files
from tinylm.laws.blend import Blend, Target, floors, redrawn, said

DRIFT = 0.005  # a unit of ln(factor): least interval score, experiments/calibrate_intervals.py
NORMAL_90 = 1.645  # standard deviations on either side of a normal 90% interval
SHIPPED = Path(__file__).with_name("calibration.json")


class Parts(NamedTuple):
    """What may be off, as standard deviations of log loss."""

    disagreement: float  # of the laws about their joined prediction, by their weights
    floor: float  # of frontiers of given floors about that prediction
    within: float  # of the joined prediction when the runs' noise is drawn anew
    noise: float  # of one run
    drift: float  # of what no law knows, by distance

    @property
    def scale(self) -> float:
        """Give the root of the summed squares."""
        return math.sqrt(sum(part**2 for part in self))


def parts(blended: Blend, target: Target, sigma: float = 0.0, resamples: int = 200,
          seed: int = 0, clusters: np.ndarray | None = None) -> Parts:
    """Measure what may be off in a blend's prediction of a target.

    `sigma` is the run-to-run standard deviation of the loss, nats; the runs' scatter about the
    isoFLOP parabolas is taken where it is larger, and the runs' own sigma where they have one.
    Runs of one of the `clusters` (a trunk, a seed) draw their noise together.
    """
    runs, found = blended.runs, blended.found
    least = max(sigma, math.sqrt(sum(m.scatter**2 for m in found) / len(found)))
    spread = np.full(len(runs.loss), least) if runs.sigma is None else runs.sigma
    places = (np.arange(len(runs.loss)) if clusters is None
              else np.unique(clusters, return_inverse=True)[1])
    drawn = np.random.default_rng(seed).standard_normal((resamples, places.max() + 1))
    refits = np.log(redrawn(blended, target, drawn[:, places] * spread))
    within = float(np.diff(np.quantile(refits, [0.05, 0.95]))[0]) / 2 / NORMAL_90
    predicted = blended.predicted(target)
    top = float(blended.found[-1].flops)
    given = [math.log(said(fit, blended.found, target) / predicted)
             for fit in floors(blended.found)]
    return Parts(disagreement(blended, target), math.sqrt(np.mean(np.square(given))), within,
                 least / predicted, drift(target.flops / top))


def half_width(off: Parts) -> float:
    """Give the half-width of a 90% interval for one run, of log loss, by the shipped calibration.

    The calibration is on minima, where the noise of many runs averages out: one run's is added.
    """
    return math.hypot(shipped()["multiplier"] * off.scale, NORMAL_90 * off.noise)


def disagreement(blended: Blend, target: Target) -> float:
    """Give the weighted standard deviation of the laws' log predictions."""
    logs = {name: math.log(loss) for name, loss in blended.predictions(target).items()}
    mean = sum(w * logs[name] for name, w in blended.weights.items())
    return math.sqrt(sum(w * (logs[name] - mean) ** 2 for name, w in blended.weights.items()))


def drift(factor: float) -> float:
    """Give what no law knows at `factor` times the largest budget fitted."""
    return DRIFT * math.log(max(factor, 1.0))


def multiplier(errors: np.ndarray, scales: np.ndarray, studies: np.ndarray) -> float:
    """Give the multiplier whose intervals hold 90% of errors in each study: the largest of theirs.

    errors, scales (n,) of log loss; studies (n,) names.
    """
    ratio = np.abs(errors) / scales
    return max(float(np.quantile(ratio[studies == name], 0.9)) for name in np.unique(studies))


@functools.cache
def shipped() -> dict[str, Any]:
    """Read the calibration that comes with the package."""
    return files.read_json(SHIPPED)


def farthest() -> float:
    """Give the largest target FLOPs, over those fitted, of the forecasts that calibrate."""
    return max(row[0] for study in shipped()["studies"].values()
               for row in study["factor_error_scale"])


def coverage_told() -> str:
    """Say in a phrase how often intervals of this rule held, on studies they were not set by."""
    c = shipped()
    shares = [study["coverage"] for study in c["studies"].values()]
    return (f"such 90% intervals, of 4 or more budgets, held {min(shares):.0%} to "
            f"{max(shares):.0%} of the forecasts of {len(shares)} studies, {c['coverage']:.0%} on "
            f"average over them ({c['forecasts']} forecasts; each study was left out of its own "
            "calibration)")


def rough_half_width(factor: float) -> float:
    """Give a guess for a sweep of few or no minima: 6% at 5 times, in proportion to ln(factor).

    Nothing calibrates it: the largest error of six sweeps of 3 minima was 4.6% at 5 times
    (experiments/LOG.md).
    """
    return max(0.02, 0.06 * math.log(max(factor, 1.0)) / math.log(5.0))
