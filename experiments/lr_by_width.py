"""Does the best learning rate stay where it is when the width changes?

question   At equal steps and batch, does the rate with the least held-out loss (a parabola in
           log2 of the rate, 5 rates, 3 seeds) move by less than a factor 2 over the study's widths?
command    python experiments/lr_by_width.py --out studies/lr_by_width
cost       about 8 minutes on two cores
expected   less than a factor 2 between the smallest and the largest width
result     a factor 1.76 from width 8 to 160: experiments/results/lr_by_width.csv, lr_by_width.json
           (at 200 steps, ten of them warmup, it was 2.39: LOG.md)
"""

import csv
import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from tinylm import files, machine

machine.command()

from tinylm.__main__ import arguments, guarded  # noqa: E402  (JAX must start pinned)
from tinylm.look import progress  # noqa: E402
from tinylm.stages.pretrain import PretrainConfig  # noqa: E402
from tinylm.sweep import runner  # noqa: E402
from tinylm.sweep.law import best_rate  # noqa: E402
from tinylm.sweep.presets import LAPTOP  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402
from tinylm.train.optim import OptimConfig  # noqa: E402


@dataclass
class Args:
    """Sweep the rate at several widths with everything else equal; finished runs are kept."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    widths: tuple[int, ...] = (8, 40, 160)
    """smallest, middle and largest width of the study"""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    """rates of a width-64 model"""
    seeds: int = 3
    """of initial parameters and data order"""
    steps: int = 800
    """of 512 tokens"""
    V: int = LAPTOP.base.V
    """rows of the vocabulary"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Train every rate at every width and seed; print the minima with their intervals."""
    corpus = corpora.load(args.corpus)
    data, _ = prepare.prepare(args.out / "text", corpus, args.V)
    runs = [PretrainConfig(replace(LAPTOP.base, V=data.V, D=width), OptimConfig(lr=rate),
                           args.steps, 512, seed, data.id)
            for width in args.widths for rate in args.rates for seed in range(args.seeds)]
    with progress.live("rates by width") as watch:
        records = runner.sweep(args.out / "runs", runs, data.folder, watch)
    table = [(r["config"]["model"]["D"], r["config"]["optim"]["lr"], r["seed"],
              r["loss"]["nats_per_token"], r["id"]) for r in records if r["loss"]]
    table.sort()
    minima = {width: minimum([row for row in table if row[0] == width]) for width in args.widths}
    ends = [minima[w]["best"] for w in (args.widths[0], args.widths[-1])]
    summary = {"minima": {str(w): m for w, m in minima.items()},
               "factor_smallest_to_largest": max(ends) / min(ends)}
    for width, m in minima.items():
        progress.say(f"D={width}: best rate {m['best']:.2e} [{m['low']:.2e}, {m['high']:.2e}]"
                     + (" AT AN EDGE" if m["at_edge"] else ""))
    progress.say(f"moves by a factor {summary['factor_smallest_to_largest']:.2f}")
    if args.results:
        head = ("width", "lr", "seed", "nats_per_token", "id")
        write_table(args.results / "lr_by_width.csv", head, table)
        files.write_json(args.results / "lr_by_width.json", summary)
    return 0


def write_table(path: Path, head: tuple[str, ...], table: list[tuple]) -> None:
    """Write a CSV whole."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *table])
    files.write_text(path, text.getvalue())


def minimum(rows: list[tuple]) -> dict:
    """Fit a parabola in log2(rate) near the best rate; bootstrap over the runs of each rate."""
    rates = sorted({row[1] for row in rows})
    losses = [[row[3] for row in rows if row[1] == rate] for rate in rates]
    best = best_rate(rates, [np.mean(each) for each in losses])
    rng = np.random.default_rng(0)
    drawn = [best_rate(rates, [np.mean(rng.choice(each, len(each))) for each in losses])
             for _ in range(400)]
    low, high = np.quantile(drawn, (0.05, 0.95))
    return {"best": best, "low": float(low), "high": float(high),
            "at_edge": not rates[0] < best < rates[-1],
            "mean_losses": dict(zip(map(str, rates), map(float, map(np.mean, losses)),
                                    strict=True))}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
