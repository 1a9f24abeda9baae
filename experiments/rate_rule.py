"""Which learning rate wants which size and length? The record behind sweep/presets.RateRule.

question   At 512 tokens a step, how does the best rate (of a width-64 model) move with width and
           with training length, on the default corpus, and what does the rule cost?
command    python experiments/rate_rule.py --out studies/rate_rule --results experiments/results
cost       12 to 28 minutes on two cores
expected   the shipped rule within 90% of the fitted ones, and within .01 nats of every cell's best
result     experiments/results/rate_rule.csv, rate_rule.json
"""

import csv
import io
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from tinylm import files, machine

machine.command()

from tinylm.__main__ import arguments, guarded  # noqa: E402  (JAX must start pinned)
from tinylm.config import BadInput  # noqa: E402
from tinylm.laws.plan import cell  # noqa: E402
from tinylm.look import progress  # noqa: E402
from tinylm.stages.pretrain import PretrainConfig  # noqa: E402
from tinylm.sweep import runner  # noqa: E402
from tinylm.sweep.law import SEEDS, best_rate  # noqa: E402
from tinylm.sweep.presets import LAPTOP  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402

RATES = (1.75e-3, 3.5e-3, 7e-3, 1.4e-2, 2.8e-2)
CELLS = ((16, 8e10), (16, 8e11), (48, 4e11), (48, 3e12))
DRAWS = 2000  # of noise on the losses


@dataclass
class Args:
    """Sweep the rate at several widths and lengths; finished runs are kept."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    rates: tuple[float, ...] = RATES
    """rates of a width-64 model"""
    cells: tuple[tuple[int, float], ...] = CELLS
    """(width, training FLOPs)"""
    V: int = LAPTOP.base.V
    """rows of the vocabulary"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Train every rate at every cell; print the table, the fitted rule, the shipped one's cost."""
    if len(set(args.cells)) < 2:
        raise BadInput("one cell gives no horizon; add another of another length to --cells")
    corpus = corpora.load(args.corpus)
    data, _ = prepare.prepare(args.out / "text", corpus, args.V)
    runs = []
    for width, flops in args.cells:
        model = replace(LAPTOP.base, V=data.V, D=width)
        steps = cell(flops, model.shape, LAPTOP.batch).steps
        runs += [PretrainConfig(model, replace(LAPTOP.optim, lr=rate), steps, LAPTOP.batch, 0,
                                data.id) for rate in args.rates]
    with progress.live("rates") as watch:
        records = runner.sweep(args.out / "runs", runs, data.folder, watch)
    table = sorted((r["config"]["model"]["D"], float(f"{r['flops']['exact']:.4g}"), r["tokens"],
                    r["config"]["optim"]["lr"], r["loss"]["nats_per_token"], r["id"])
                   for r in records if r["loss"])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("width", "flops", "tokens", "lr", "nats_per_token", "id"), *table])
    print(text.getvalue(), end="")
    found = fitted(table)
    for one in found["cells"]:
        progress.say(f"D={one['width']}, {one['tokens']:.2g} tokens: best {one['best']:.2e}, the "
                     f"rule's {one['rule']:.2e} costs {one['cost_nats']:.4f} nats")
    progress.say(f"fitted: {found['fitted']}")
    if args.results:
        files.write_text(args.results / "rate_rule.csv", text.getvalue())
        files.write_json(args.results / "rate_rule.json", found)
    return 0


def fitted(table: list[tuple]) -> dict[str, Any]:
    """Fit lr0 and horizon to the cells' best rates; 90% intervals by redrawn noise of SEEDS."""
    cells: dict[tuple, list[tuple]] = {}
    for row in table:
        cells.setdefault(row[:3], []).append(row)
    rng, out, drawn = np.random.default_rng(0), [], []
    for (width, flops, tokens), rows in cells.items():
        rates, losses = [r[3] for r in rows], np.array([r[4] for r in rows])
        best, rule = best_rate(rates, losses), LAPTOP.rule(tokens)
        drawn.append([best, *(best_rate(rates, losses + rng.normal(0, SEEDS, len(rows)))
                              for _ in range(DRAWS))])
        low, high = np.quantile(drawn[-1], (0.05, 0.95))
        at_rule = float(np.interp(math.log(rule), np.log(rates), losses))
        out.append({"width": width, "flops": flops, "tokens": tokens, "best": best,
                    "low": float(low), "high": float(high),
                    "at_edge": not min(rates) < best < max(rates), "rule": rule,
                    "cost_nats": at_rule - float(losses.min())})
    length = np.log([c["tokens"] / LAPTOP.rule.tokens0 for c in out])
    slope, level = np.polyfit(length, np.log(drawn), 1)
    return {"cells": out, "shipped": asdict(LAPTOP.rule), "noise_nats": SEEDS, "fitted": {
        name: [float(v[0]), *map(float, np.quantile(v, (0.05, 0.95)))]
        for name, v in (("lr0", np.exp(level)), ("horizon", -slope))}}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
