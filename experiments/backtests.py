"""Forecast the later budgets of published studies from their earlier ones: one row a forecast.

Rolling origin: from each isoFLOP study keep the budgets up to a cut (3 or more), forecast the loss
at the minimum of every later budget (1.4 times the compute or more). Rows with own_noise are real
runs beyond a sweep. Read and scored by calibrate_intervals.py.
"""

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinylm.laws import intervals
from tinylm.laws.blend import FLOORS, Target, blend, excess, floors, said
from tinylm.laws.fit import fit_frontier, fit_law, resample
from tinylm.laws.forecast import naive
from tinylm.laws.forms import Surface
from tinylm.laws.isoflop import Minimum, group, minima
from tinylm.laws.runs import Runs, read_csv

STUDIES = {
    "llama3": ("llama3_isoflop.csv", {"condition": "raw_loss"}),
    "marin-comma": ("marin_isoflop.csv", {"dataset": "comma"}),
    "marin-dclm": ("marin_isoflop.csv", {"dataset": "dclm"}),
    "marin-nemotron": ("marin_isoflop.csv", {"dataset": "nemotron"}),
    "misfitting": ("misfitting_isoflop.csv", {}),
    "chinchilla": ("chinchilla_epoch.csv", {}),
    "pilot": ("pilot_small.csv", {"tag": "grid"}),
}
LAPTOP = Path(__file__).parent / "results" / "laptop_runs.csv"  # our own, the tenth default study
HELD_OUT = {"tag": "held"}  # the run that a registered forecast was about, the pilot's and ours
CHINCHILLA = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)  # nominal budgets
LEAST_FACTOR = 1.4  # nearer targets are interpolation
THREE = ("frontier_floor", "power_law_last4", "surface_near")  # the rule before, weighted equally
LAWS = ("frontier_floor", "frontier_half_floor", "power_law", "power_law_last4", "surface_near",
        "coupled_near", "coupled")  # the last five are the blend's
RULES = (*LAWS, "surface", "naive", "three", "equal", "blend")
RESAMPLES = 400  # of the Chinchilla surface


class Row(NamedTuple):
    """One forecast. Errors and intervals are ln(said / measured), NaN where there is none."""

    study: str
    budgets: int  # bracketed, that were fitted
    factor: float  # FLOPs of the target over the largest fitted
    measured_nats: float
    frontier_floor: float
    frontier_half_floor: float
    power_law: float
    power_law_last4: float
    surface_near: float
    coupled_near: float
    coupled: float
    surface: float
    naive: float
    three: float
    equal: float
    blend: float
    disagreement: float
    floor: float
    within: float
    noise: float
    drift: float
    boot_low: float  # 5% of the resampled surfaces
    boot_high: float  # 95%
    boot_mean: float
    boot_sd: float
    resid_sd: float  # of the surface's residuals
    t_centre: float
    t_scale: float
    t_degrees: float
    own_noise: float = 0.0  # of the target, where it is one run and no minimum

    @property
    def scale(self) -> float:
        """Give the calibrated interval's scale."""
        return intervals.Parts(self.disagreement, self.floor, self.within, self.noise,
                               self.drift).scale


def every(folder: Path) -> list[Row]:
    """Forecast every study in the folder, the pilot's and our laptop's real runs included."""
    rows = [row for name in STUDIES for row in backtest(name, *load(name, folder))]
    held = read_csv(folder / STUDIES["pilot"][0], HELD_OUT)
    rows += beyond("pilot", load("pilot", folder)[0], held)
    laptop = read_csv(LAPTOP, {"tag": "sweep"})
    return [*rows, *backtest("laptop", laptop),
            *beyond("laptop", laptop, read_csv(LAPTOP, HELD_OUT))]


def load(name: str, folder: Path) -> tuple[Runs, np.ndarray | None]:
    """Read a study's runs, with budget labels where FLOPs alone do not give them."""
    file, only = STUDIES[name]
    runs = read_csv(folder / file, only)
    return chinchilla(runs) if name == "chinchilla" else (runs, None)


def chinchilla(runs: Runs) -> tuple[Runs, np.ndarray]:
    """Keep the runs that lie 13% below to 4% above a nominal budget, labelled by it."""
    off = np.log(runs.flops[:, None] / np.array(CHINCHILLA))
    near = (off > -0.13) & (off < 0.04)
    kept = near.any(axis=1)
    return runs.keep(kept), near.argmax(axis=1)[kept]


def backtest(study: str, runs: Runs, budgets: np.ndarray | None = None) -> list[Row]:
    """Forecast every later minimum from every cut that leaves 3 or more bracketed budgets."""
    budgets = group(runs.flops) if budgets is None else budgets
    found = [m for m in minima(runs, budgets) if m.bracketed]
    rows = []
    for i in range(2, len(found) - 1):
        below = runs.flops < math.sqrt(found[i].flops * found[i + 1].flops)
        later = [m for m in found[i + 1:] if m.flops >= LEAST_FACTOR * found[i].flops]
        rows += forecasts(study, runs.keep(below), budgets[below], later)
    return rows


def beyond(study: str, runs: Runs, held: Runs) -> list[Row]:
    """Forecast real runs, whose own noise counts, from the whole sweep."""
    later = [Minimum(*(float(v[i]) for v in (held.flops, held.params, held.tokens, held.loss)),
                     math.nan, True, "", (), 0.0, 0.0) for i in range(len(held.loss))]
    rows = forecasts(study, runs, group(runs.flops), later)
    return [row._replace(own_noise=row.noise) for row in rows]


def forecasts(study: str, runs: Runs, budgets: np.ndarray, later: list[Minimum]) -> list[Row]:
    """Forecast some minima from one sweep by every rule."""
    blended, rows = blend(runs, budgets), []
    found, surface = blended.found, fit_law(runs, Surface)
    flops, loss = [m.flops for m in found], [m.loss for m in found]
    alone = {"frontier_floor": fit_frontier(flops, loss, floor=True),
             "frontier_half_floor": floors(found)[FLOORS.index(0.5)], "surface": surface}
    drawn = resample(surface, RESAMPLES)
    for m in later:
        target = Target(m.flops, m.params, m.tokens)
        joined = blended.predictions(target)
        laws = {name: math.log(loss / m.loss) for name, loss in joined.items()}
        laws |= {name: math.log(said(fit, found, target) / m.loss) for name, fit in alone.items()}
        errors = {**dict.fromkeys(LAWS, math.nan), **laws,
                  "naive": math.log(naive(blended.found, m.flops) / m.loss),
                  "three": float(np.mean([laws[name] for name in THREE if name in laws])),
                  "equal": float(np.mean([laws[name] for name in joined])),
                  "blend": math.log(blended.predicted(target) / m.loss)}
        E, A, B, alpha, beta = drawn.T
        boots = np.log((E + A / m.params**alpha + B / m.tokens**beta) / m.loss)
        rows.append(Row(study, len(blended.found), m.flops / blended.found[-1].flops, m.loss,
                        *(errors[name] for name in RULES), *intervals.parts(blended, target),
                        *np.quantile(boots, [0.05, 0.95]), boots.mean(), boots.std(),
                        float(surface.residuals.std()), *frontier_t(blended.found, target, m.loss)))
    return rows


def frontier_t(found: list[Minimum], target: Target, measured: float) -> tuple[float, ...]:
    """Give centre, scale and degrees of freedom of the frontier's prediction by Student's t.

    Of log loss, by the delta method, residual included; NaN where 3 budgets leave no freedom.
    """
    fit = fit_frontier([m.flops for m in found], [m.loss for m in found], floor=True)
    if (free := len(found) - 3) < 1:
        return (math.nan,) * 3
    x = np.log([m.flops for m in found])[None] - fit.centre[:, None]
    at = np.array([[math.log(target.flops) - fit.centre[0]]])
    level, slope = fit.law.evaluate(fit.theta, x)
    top, toward = fit.law.evaluate(fit.theta, at)
    inverse = np.linalg.pinv((slope / level) @ (slope / level).T)
    toward = (toward / top)[:, 0]
    variance = float((fit.residuals**2).sum()) / free * (1 + toward @ inverse @ toward)
    centre = math.log(float(top[0]) * fit.least + excess(found, target)) - math.log(measured)
    return centre, math.sqrt(variance), float(free)


def as_csv(rows: list[Row]) -> str:
    """Give the rows as CSV text with six significant digits."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(Row._fields)
    out.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """Read the rows that as_csv wrote."""
    kinds = Row.__annotations__.values()
    lines = list(csv.reader(path.read_text("utf-8").splitlines()))[1:]
    return [Row(*(kind(v) for kind, v in zip(kinds, line, strict=True))) for line in lines]
