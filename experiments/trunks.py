"""Does a shared trunk cost loss? Cells of the laptop ladder trained alone and as branches.

question   A branch is bit for bit a lone run at its trunk's rate and warmup. What do that rate and
           that warmup, those of the horizons' geometric mean, cost against each run's own?
command    python experiments/trunks.py --out studies/trunks --seeds 2
cost       about 5 minutes on two cores
expected   held-out losses within .005 nats of the lone runs, no sign
result     mean -.005 (standard error .0065) over 8 pairs: no cost seen, .005 not shown; trunks.csv
"""

import csv
import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from tinylm import files, machine

machine.command()

from tinylm.__main__ import arguments, guarded  # noqa: E402  (JAX must start pinned)
from tinylm.laws.plan import cell  # noqa: E402
from tinylm.look import progress  # noqa: E402
from tinylm.sweep import cells, runner  # noqa: E402
from tinylm.sweep.presets import LAPTOP  # noqa: E402
from tinylm.sweep.trunks import saved, shared  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402


@dataclass
class Args:
    """Train each cell alone and as a branch; finished runs are kept."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    widths: tuple[int, ...] = (16, 24)
    """each has a trunk"""
    flops: tuple[float, ...] = (1.5e11, 3.6e11)
    """training FLOPs of the cells of each width"""
    seeds: int = 1
    """runs a cell"""
    V: int = 2048
    """rows of the vocabulary"""
    csv: Path | None = None
    """also write the table here"""


def main(args: Args) -> int:
    """Train both ways and print the table."""
    data, _ = prepare.prepare(args.out / "text", corpora.load(args.corpus), args.V, lower=True)
    models = cells.ladder(replace(LAPTOP.base, V=data.V), args.widths)
    alone = [cells.config(cell(flops, model.shape, LAPTOP.batch), models, LAPTOP.optim, LAPTOP.rule,
                          LAPTOP.batch, data.id, seed)
             for model in models for flops in args.flops for seed in range(args.seeds)]
    branches = shared(alone, LAPTOP.rule)
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(("way", "width", "flops", "seed", "lr", "nats_per_token", "id"))
    losses: dict[tuple, list[float]] = {}
    for way, runs in (("alone", alone), ("branch", branches)):
        with progress.live(way) as watch:
            records = runner.sweep(args.out / way, runs, data.folder, watch)
        for r in records:
            c, loss = r["config"], r["loss"]["nats_per_token"] if r["loss"] else float("nan")
            table.writerow((way, c["model"]["D"], f"{r['flops']['exact']:.4g}", r["seed"],
                            c["optim"]["lr"], loss, r["id"]))
            losses.setdefault((c["model"]["D"], c["steps"], r["seed"]), []).append(loss)
    print(rows.getvalue(), end="")
    pairs = {key: pair for key, pair in losses.items() if len(pair) > 1}
    progress.say("branch minus alone, nats: " + ", ".join(
        f"width {key[0]}, {key[1]} steps: {pair[1] - pair[0]:+.4f}"
        for key, pair in sorted(pairs.items())) + f"; FLOPs saved {saved(branches):.1%}")
    if args.csv:
        files.write_text(args.csv, rows.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
