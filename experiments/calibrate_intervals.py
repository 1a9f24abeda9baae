"""How far off are forecasts of published studies, and which intervals hold them?

The rows are those of backtests.py. Every interval is set without the study that it is scored on.

Command:  python -m experiments.calibrate_intervals --runs FOLDER --out experiments/results
          (--ship also writes tinylm/laws/calibration.json)
Cost:     three minutes on one core; FOLDER holds the CSVs named in backtests.STUDIES.
Expected: the blend errs less than the geometric mean of three laws, and than each law on two
          thirds of the studies; 90% intervals hold 90%, and score 25% better than the bootstrap
          of the Chinchilla surface and the t-interval of the frontier.
Result:   mean |error| .35% (three laws .73%); better than each law on 6 to 8 of 8 studies; held
          94% on average over studies (90% interval 86-100%); interval score 1.93% against 29.39 and
          8.24. How the two rules before did: experiments/LOG.md.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm, t

from experiments.backtests import RULES, Row, as_csv, every, read_rows
from tinylm import files
from tinylm.laws import intervals
from tinylm.laws.blend import LEAST_BUDGETS

BANDS = {"2": (1.4, 3.2), "4": (3.2, 6.0), "10": (6.0, 16.0), "30": (16.0, 50.0),
         "100": (50.0, 400.0)}
DEGREES = 4.0  # of the Student distribution that gives our interval a density


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
        files.write_text(place, as_csv(every(given.runs)))
    rows = read_rows(place)
    found = summary(rows)
    files.write_json(given.out / "calibrate_intervals.json", found)
    if given.ship:
        files.write_json(intervals.SHIPPED, calibration(rows))
    print(table(found))


def rolled(rows: list[Row]) -> list[Row]:
    """Keep the forecasts whose laws had forecast a budget before: those that intervals are for."""
    return [row for row in rows if row.budgets > LEAST_BUDGETS]


def left_out(rows: list[Row]) -> dict[str, float]:
    """Give each study the multiplier that the other studies set."""
    out = {}
    for study in dict.fromkeys(row.study for row in rows):
        rest = [row for row in rolled(rows) if family(row.study) != family(study)]
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
    methods = {name: judged(rolled(rows), method, factors) for name, method in METHODS.items()}
    return {"studies": {s: sum(r.study == s for r in rows) for s in factors},
            "mean_abs_error_percent": told,
            "at_10": {rule: {"by_study": {s: 100 * v for s, v in ten[rule].items()},
                             "median_percent": 100 * float(np.median(list(ten[rule].values()))),
                             "blend_is_better_on": sum(ten["blend"][s] < v
                                                       for s, v in ten[rule].items()),
                             "of": len(ten[rule])} for rule in RULES},
            "chosen_left_out": chosen(rows), "multipliers": factors,
            "intervals": methods}


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
    rows = rolled(rows)
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
              found["intervals"]["blend"]["coverage_by_study"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
