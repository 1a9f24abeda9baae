"""How far off are forecasts of published studies, and which intervals hold them?

Rolling origin: from each isoFLOP study keep the budgets up to a cut (3 or more), forecast the loss
at the minimum of every later budget (1.4 times the compute or more), compare. Every interval is
set without the study that it is scored on. Rows with own_noise are real runs beyond a sweep.

Command:  python -m experiments.calibrate_intervals --runs FOLDER --out experiments/results
          (--ship also writes tinylm/laws/calibration.json)
Cost:     three minutes on one core; FOLDER holds the CSVs named in STUDIES.
Expected: the blend errs less than the geometric mean of three laws, and than each law on two
          thirds of the studies; 90% intervals hold 90%, and score 25% better than the bootstrap
          of the Chinchilla surface and the t-interval of the frontier.
Result:   mean |error| .41% (three laws .71%); better than each law on 4 to 7 of 7 studies, so not
          always on two thirds; held 97% on average over studies (75-100%); interval score 2.81%
          against 27.90 and 9.00. How the rule frozen in ba938af did before: experiments/LOG.md.
"""

import argparse
import csv
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm, t

from tinylm import files
from tinylm.laws import intervals
from tinylm.laws.blend import Target, blend, excess, said
from tinylm.laws.fit import fit_frontier, fit_surface, resample
from tinylm.laws.forecast import naive
from tinylm.laws.isoflop import Minimum, group, minima
from tinylm.laws.runs import Runs, read_csv
from tinylm.sweep import law

STUDIES = {
    "llama3": ("llama3_isoflop.csv", {"condition": "raw_loss"}),
    "marin-comma": ("marin_isoflop.csv", {"dataset": "comma"}),
    "marin-dclm": ("marin_isoflop.csv", {"dataset": "dclm"}),
    "marin-nemotron": ("marin_isoflop.csv", {"dataset": "nemotron"}),
    "misfitting": ("misfitting_isoflop.csv", {}),
    "chinchilla": ("chinchilla_epoch.csv", {}),
    "pilot": ("pilot_small.csv", {"tag": "grid"}),
}  # and `laptop`, our own
HELD_OUT = {"tag": "held"}  # the run that the pilot's registered forecast was about
LAPTOP = Path(__file__).parent / "results" / "laptop"
CHINCHILLA = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)  # nominal budgets
LEAST_FACTOR = 1.4  # nearer targets are interpolation
BANDS = {"2": (1.4, 3.2), "4": (3.2, 6.0), "10": (6.0, 16.0), "30": (16.0, 50.0),
         "100": (50.0, 400.0)}
THREE = ("frontier_floor", "power_law_last4", "surface_near")  # the rule before, weighted equally
LAWS = ("frontier_floor", "frontier_half_floor", "power_law", "power_law_last4", "surface_near",
        "coupled_near", "coupled")
RULES = (*LAWS, "surface", "naive", "three", "equal", "blend")
DEGREES = 4.0  # of the Student distribution that gives our interval a density
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
        return intervals.Parts(self.disagreement, self.within, self.noise, self.drift).scale


def main() -> None:
    """Read the flags, forecast every study, write rows and summary, print the summary."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--runs", type=Path, help="folder of the studies' CSVs; none: score the "
                                                 "rows that OUT holds")
    flags.add_argument("--out", type=Path, required=True, help="folder for rows and summary")
    flags.add_argument("--ship", action="store_true", help="write the package's calibration")
    given = flags.parse_args()
    place = given.out / "calibrate_intervals.csv"
    if given.runs:
        rows = [row for name in STUDIES for row in backtest(name, *load(name, given.runs))]
        held = read_csv(given.runs / STUDIES["pilot"][0], HELD_OUT)
        rows += beyond("pilot", load("pilot", given.runs)[0], held)
        laptop = records("sweep/*")
        rows += [*backtest("laptop", laptop), *beyond("laptop", laptop, records("target"))]
        files.write_text(place, as_csv(rows))
    rows = read_rows(place)
    found = summary(rows)
    files.write_json(given.out / "calibrate_intervals.json", found)
    if given.ship:
        files.write_json(intervals.SHIPPED, calibration(rows))
    print(table(found))


def load(name: str, folder: Path) -> tuple[Runs, np.ndarray | None]:
    """Read a study's runs, with budget labels where FLOPs alone do not give them."""
    file, only = STUDIES[name]
    runs = read_csv(folder / file, only)
    return chinchilla(runs) if name == "chinchilla" else (runs, None)


def records(where: str) -> Runs:
    """Read the runs of our own laptop study (its records are older than their seals)."""
    told = [json.loads(p.read_text("utf-8")) for p in sorted(LAPTOP.glob(f"{where}/record.json"))]
    return law.runs_of(told)[0]


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
    surface = fit_surface(runs)
    drawn = resample(surface, RESAMPLES)
    for m in later:
        target = Target(m.flops, m.params, m.tokens)
        laws = {name: math.log(loss / m.loss) for name, loss in blended.predictions(target).items()}
        errors = {**dict.fromkeys(LAWS, math.nan), **laws,
                  "surface": math.log(said(surface, blended.found, target) / m.loss),
                  "naive": math.log(naive(blended.found, m.flops) / m.loss),
                  "three": float(np.mean([laws[name] for name in THREE if name in laws])),
                  "equal": float(np.mean(list(laws.values()))),
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


def left_out(rows: list[Row]) -> dict[str, float]:
    """Give each study the multiplier that the other studies set."""
    out = {}
    for study in dict.fromkeys(row.study for row in rows):
        rest = [row for row in rows if family(row.study) != family(study)]
        out[study] = intervals.multiplier(*columns(rest))
    return out


def columns(rows: list[Row]) -> tuple[np.ndarray, ...]:
    """Give errors (past a run's own noise), scales and studies of our rule."""
    off = [math.sqrt(max(r.blend**2 - (intervals.NORMAL_90 * r.own_noise) ** 2, 0.0))
           for r in rows]
    return tuple(map(np.array, (off, [r.scale for r in rows], [r.study for r in rows])))


def family(study: str) -> str:
    """Give what a study shares data or team with: marin's three corpora are left out together."""
    return study.split("-")[0]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Give errors by rule and distance, and how the intervals did, all left out by study."""
    bands = {name: [r for r in rows if low <= r.factor < high]
             for name, (low, high) in {**BANDS, "all": (0.0, math.inf)}.items()}
    told = {rule: {name: percent(by_study(band, lambda r, k=rule: abs(getattr(r, k))))
                   for name, band in bands.items()} for rule in RULES}
    ten = {rule: by_study(bands["10"], lambda r, k=rule: abs(getattr(r, k))) for rule in RULES}
    factors = left_out(rows)
    scored = [r for r in rows if r.t_degrees >= 1]  # where every method has an interval
    methods = {name: judged(scored, method, factors) for name, method in METHODS.items()}
    return {"studies": {s: sum(r.study == s for r in rows) for s in factors},
            "mean_abs_error_percent": told,
            "at_10": {rule: {"by_study": {s: 100 * v for s, v in ten[rule].items()},
                             "median_percent": 100 * float(np.median(list(ten[rule].values()))),
                             "blend_is_better_on": sum(ten["blend"][s] < v
                                                       for s, v in ten[rule].items()),
                             "of": len(ten[rule])} for rule in RULES},
            "chosen_left_out": chosen(rows), "multipliers": factors,
            "intervals": {**methods, "blend_all": judged(rows, METHODS["blend"], factors)}}


def chosen(rows: list[Row]) -> dict[str, Any]:
    """Choose a rule on the other studies, and give its error on the one left out, percent."""
    out = {}
    for study in left_out(rows):
        rest = [r for r in rows if family(r.study) != family(study)]
        best = min(RULES, key=lambda k: mean(by_study(rest, lambda r: abs(getattr(r, k)))))
        here = by_study([r for r in rows if r.study == study], lambda r, k=best: abs(getattr(r, k)))
        out[study] = {"rule": best, "mean_abs_error_percent": percent(here)}
    return out


def judged(rows: list[Row], method, factors: dict[str, float]) -> dict[str, Any]:
    """Score a method's intervals: coverage by study, half-widths, interval score, log loss."""
    said = {id(r): method(r, factors[r.study]) for r in rows}
    held = by_study(rows, lambda r: said[id(r)][0] <= 0 <= said[id(r)][1])
    low, high = clustered(list(held.values()))
    widths = {name: percent(by_study([r for r in rows if a <= r.factor < b],
                                     lambda r: (said[id(r)][1] - said[id(r)][0]) / 2))
              for name, (a, b) in BANDS.items()}
    return {"forecasts": len(rows), "coverage": mean(held), "coverage_low": low,
            "coverage_high": high, "coverage_by_study": held, "half_width_percent": widths,
            "winkler_percent": percent(by_study(rows, lambda r: winkler(*said[id(r)][:2]))),
            "log_loss": mean(by_study(rows, lambda r: said[id(r)][2]))}


def winkler(low: float, high: float) -> float:
    """Give the interval score of a 90% interval for a truth at 0 (Gneiting and Raftery 2007)."""
    return high - low + 20 * max(0.0, low, -high)


def ours(row: Row, factor: float) -> tuple[float, float, float]:
    """Give the calibrated interval, and the log loss of the Student density that fills it."""
    half = math.hypot(factor * row.scale, intervals.NORMAL_90 * row.own_noise)
    wide = half / t.ppf(0.95, DEGREES)
    return row.blend - half, row.blend + half, -t.logpdf(0.0, DEGREES, row.blend, wide)


def resampled(row: Row, factor: float, residual: bool = False) -> tuple[float, float, float]:
    """Give the interval of the resampled Chinchilla surface, with its residuals if asked."""
    sd = math.hypot(row.boot_sd, row.resid_sd if residual else 0.0)
    grown = sd / row.boot_sd
    ends = [row.boot_mean + grown * (end - row.boot_mean) for end in (row.boot_low, row.boot_high)]
    return *ends, -norm.logpdf(0.0, row.boot_mean, sd)


def students(row: Row, factor: float) -> tuple[float, float, float]:
    """Give the frontier's t-interval and log loss."""
    half = t.ppf(0.95, row.t_degrees) * row.t_scale
    return (row.t_centre - half, row.t_centre + half,
            -t.logpdf(0.0, row.t_degrees, row.t_centre, row.t_scale))


METHODS = {"blend": ours, "surface_bootstrap": resampled,
           "surface_bootstrap_residuals": lambda row, factor: resampled(row, factor, True),
           "frontier_t": students}


def calibration(rows: list[Row]) -> dict[str, Any]:
    """Give what the package ships: the multiplier, coverages and our own residuals by study."""
    found = judged(rows, ours, left_out(rows))
    return {"rule": "multiplier: largest of the studies' own 90% quantiles of |error| / scale; "
                    "coverage: of each study with the multiplier of the others",
            "multiplier": intervals.multiplier(*columns(rows)), "drift": intervals.DRIFT,
            **{k: found[k] for k in ("forecasts", "coverage", "coverage_low", "coverage_high",
                                     "half_width_percent")},
            "studies": {s: {"coverage": c, "factor_error_scale": [
                [float(f"{v:.4g}") for v in (r.factor, r.blend, r.scale)]
                for r in rows if r.study == s]} for s, c in found["coverage_by_study"].items()}}


def clustered(shares: list[float]) -> tuple[float, float]:
    """Give the 90% interval of a mean over studies by Student's t, within 0 and 1."""
    if len(shares) < 2:
        return 0.0, 1.0
    half = t.ppf(0.95, len(shares) - 1) * np.std(shares, ddof=1) / math.sqrt(len(shares))
    middle = float(np.mean(shares))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def by_study(rows: list[Row], value) -> dict[str, float]:
    """Average within each study; a value that is NaN is left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if not math.isnan(one := float(value(row))):
            found.setdefault(row.study, []).append(one)
    return {study: float(np.mean(values)) for study, values in found.items()}


def mean(shares: dict[str, float]) -> float | None:
    """Average over studies; None of none."""
    return float(np.mean(list(shares.values()))) if shares else None


def percent(shares: dict[str, float]) -> float | None:
    """Average over studies, in percent."""
    return 100 * mean(shares) if shares else None


def table(found: dict[str, Any]) -> str:
    """Lay a summary out in lines."""
    def cells(values):
        return "".join("      -" if v is None else f"{v:7.2f}" for v in values.values())

    lines = [f"mean |error| in %, {sum(found['studies'].values())} forecasts of "
             f"{len(found['studies'])} studies", "times the compute".ljust(22)
             + "".join(f"{name:>7}" for name in (*BANDS, "all"))]
    lines += [rule.ljust(22) + cells(v) for rule, v in found["mean_abs_error_percent"].items()]
    lines += ["at 10 times: median over studies, and on how many the blend is better"]
    lines += [f"{rule:22}{v['median_percent']:7.2f}{v['blend_is_better_on']:4d} of {v['of']}"
              for rule, v in found["at_10"].items()]
    lines += [f"left out {s}: chose {v['rule']}, {v['mean_abs_error_percent']:.2f}%"
              for s, v in found["chosen_left_out"].items()]
    lines += ["intervals".ljust(30) + "held    low   high winkler logloss; half-width at "
              + " ".join(BANDS)]
    lines += [name.ljust(28) + f"{v['coverage']:6.3f} {v['coverage_low']:6.3f} "
              f"{v['coverage_high']:6.3f} {v['winkler_percent']:7.2f} {v['log_loss']:7.2f}"
              + cells(v["half_width_percent"]) for name, v in found["intervals"].items()]
    lines += [f"  {s}: multiplier {found['multipliers'][s]:.2f}, held {c:.2f}" for s, c in
              found["intervals"]["blend_all"]["coverage_by_study"].items()]
    return "\n".join(lines)


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


if __name__ == "__main__":
    main()
