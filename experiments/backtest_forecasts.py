"""Which law forecasts best from the cheap end of a study, and do the intervals hold?

Rolling origin: from each published isoFLOP study keep the budgets up to a cut (4 or more), forecast
the loss at the minimum of every later budget, compare. The pilot's held-out run is a last row of
its own, `pilot-held-out`; it took no part in the choice of the rule.

Command:  python -m experiments.backtest_forecasts --runs FOLDER --out experiments/results
Cost:     half a minute on one core; FOLDER holds the CSVs named in STUDIES.
Expected: the geometric mean of three laws beats each of them.
Result:   mean |error| in %, 154 forecasts of 7 studies (each study weighs the same)
          target over fit   1.4-3.5  3.5-12   12-40  over 40    all
          frontier_floor       0.39    0.93    2.44     2.86   0.69
          power_law_last4      0.53    1.70    3.36     4.56   1.02
          surface_near         0.93    2.03    2.76     1.31   1.28
          combined             0.37    0.69    1.11     0.24   0.48
          naive                0.44    1.36    3.36     4.66   0.90
          Intervals (no noise terms) held 99%: too wide on others' tuned studies, as they are set
          by the pilot's miss. Held-out pilot run: combined -1.34%, naive -1.10%. Laws with a floor
          err high in six of seven studies, the power law low in six, so they cancel; over 40 times
          only chinchilla and llama3 speak.
"""

import argparse
import csv
import io
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinylm import files
from tinylm.laws import forecast, intervals
from tinylm.laws.isoflop import group, minima
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
HELD_OUT = {"tag": "held"}  # of the pilot
CHINCHILLA = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)  # nominal budgets
LEAST_FACTOR = 1.4  # nearer targets are interpolation
BANDS = (LEAST_FACTOR, 3.5, 12.0, 40.0, math.inf)
LAWS = ("frontier_floor", "power_law_last4", "surface_near", "combined", "naive")


class Row(NamedTuple):
    """One forecast: from which study, how far out, errors of the prediction in percent."""

    study: str
    fitted_to_flops: float
    factor: float
    measured_nats: float
    frontier_floor: float
    power_law_last4: float
    surface_near: float
    combined: float
    naive: float
    half_width: float  # of the interval without its noise terms, percent
    inside: bool


def main() -> None:
    """Read the flags, backtest every study, write rows, print the table."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--runs", type=Path, required=True, help="folder of the studies' CSVs")
    flags.add_argument("--out", type=Path, required=True, help="folder for the result's CSV")
    given = flags.parse_args()
    rows = []
    for name, (file, only) in STUDIES.items():
        runs = read_csv(given.runs / file, only)
        rows += backtest(name, *(chinchilla(runs) if name == "chinchilla" else (runs, None)))
    pilot, only = STUDIES["pilot"]
    held = read_csv(given.runs / pilot, HELD_OUT)
    target = tuple(float(column[0]) for column in held[:4])
    rows.append(_row("pilot-held-out", read_csv(given.runs / pilot, only), None, *target))
    files.write_text(given.out / "backtest_forecasts.csv", as_csv(rows))
    print(table(rows))


def chinchilla(runs: Runs) -> tuple[Runs, np.ndarray]:
    """Keep the runs that lie 13% below to 4% above a nominal budget, labelled by it."""
    off = np.log(runs.flops[:, None] / np.array(CHINCHILLA))
    near = (off > -0.13) & (off < 0.04)
    kept = near.any(axis=1)
    return runs.keep(kept), near.argmax(axis=1)[kept]


def backtest(study: str, runs: Runs, budgets: np.ndarray | None = None) -> list[Row]:
    """Forecast every later minimum from every cut that leaves 4 or more bracketed budgets."""
    budgets = group(runs.flops) if budgets is None else budgets
    found = [m for m in minima(runs, budgets) if m.bracketed]
    rows = []
    for i in range(3, len(found)):
        below = runs.flops <= found[i].flops * 1.05
        kept, labels = runs.keep(below), budgets[below]
        for m in found[i + 1:]:
            if m.flops >= LEAST_FACTOR * found[i].flops:
                rows.append(_row(study, kept, labels, m.params, m.tokens, m.flops, m.loss))
    return rows


def table(rows: list[Row]) -> str:
    """Give mean |error| in percent by law and distance, and the share of intervals that held."""
    scored = [row for row in rows if row.study != "pilot-held-out"]
    lines = ["law".ljust(16) + "".join(f"{low:>6g}+" for low in BANDS[:-1]) + "    all"]
    bands = [*zip(BANDS[:-1], BANDS[1:], strict=True), (BANDS[0], BANDS[-1])]
    for law in LAWS:
        means = [_mean([r for r in scored if low <= r.factor < high],
                       lambda r, law=law: abs(getattr(r, law))) for low, high in bands]
        lines.append(law.ljust(16) + "".join(f"{mean:7.2f}" for mean in means))
    held = 100 * _mean(scored, lambda r: r.inside)
    lines.append(f"intervals that held the truth: {held:.0f}% of {len(scored)} forecasts")
    lines += [f"{r.study}: combined {r.combined:+.2f}%, naive {r.naive:+.2f}%"
              for r in rows if r not in scored]
    return "\n".join(lines)


def as_csv(rows: list[Row]) -> str:
    """Give the rows as CSV text with six significant digits."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(Row._fields)
    out.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    return text.getvalue()


def _row(study, runs, budgets, params, tokens, flops, loss):
    laws = forecast.predictions(runs, flops, params, tokens, budgets)
    found = forecast.bracketed(runs, budgets)
    combined, top = forecast.combine(laws), max(m.flops for m in found)
    width = intervals.half_width(laws, 0.0, 0.0, flops / top)
    said = {**laws, "combined": combined, "naive": forecast.naive(found, flops)}
    errors = [100 * (said[law] / loss - 1) if law in said else math.nan for law in LAWS]
    inside = bool(abs(loss / combined - 1) <= width)
    return Row(study, top, flops / top, loss, *errors, 100 * width, inside)


def _mean(rows, value):
    """Average within each study, then over studies; a law without a prediction is left out."""
    by_study = defaultdict(list)
    for row in rows:
        if not math.isnan(value(row)):
            by_study[row.study].append(value(row))
    return float(np.mean([np.mean(v) for v in by_study.values()])) if by_study else math.nan


if __name__ == "__main__":
    main()
