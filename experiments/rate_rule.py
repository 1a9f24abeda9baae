"""Which learning rate wants which size and length? The record behind sweep/presets.RateRule.

question   At 512 tokens a step, how does the best rate (of a width-64 model) move with width and
           with training length, on the default corpus?
command    python experiments/rate_rule.py --out studies/rate_rule
cost       about 12 minutes on two cores
expected   a best rate near 3.5e-3 at every width, falling slowly with length (found: 5e-3; the
           study's own check at V=2048 then moved the rule to 8e-3 and later to 7e-3)
result     experiments/results/rate_rule.csv
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
from tinylm.model.decoder import ModelConfig  # noqa: E402
from tinylm.stages.pretrain import PretrainConfig  # noqa: E402
from tinylm.sweep import runner  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402
from tinylm.train.optim import OptimConfig  # noqa: E402

RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
CELLS = ((32, 1e11), (32, 4e11), (64, 4e11), (64, 1.6e12), (112, 1.6e12))


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
    V: int = 1024
    """rows of the vocabulary"""
    csv: Path | None = None
    """also write the table here"""


def main(args: Args) -> int:
    """Train every rate at every cell and print the table."""
    corpus = corpora.load(args.corpus)
    data, _ = prepare.prepare(args.out / "text", corpus, args.V)
    runs = []
    for width, flops in args.cells:
        model = ModelConfig(V=data.V, D=width)
        one = PretrainConfig(model, OptimConfig(), cell(flops, model.shape, 512).steps, 512, 0,
                             data.id)
        runs += [replace(one, optim=OptimConfig(lr=rate)) for rate in args.rates]
    with progress.live("rates") as watch:
        records = runner.sweep(args.out / "runs", runs, data.folder, watch)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("width", "flops", "tokens", "lr", "nats_per_token", "id"))
    for r in records:
        config = r["config"]
        loss = r["loss"]["nats_per_token"] if r["loss"] else "diverged"
        rows.writerow((config["model"]["D"], f"{r['flops']['exact']:.4g}", r["tokens"],
                       config["optim"]["lr"], loss, r["id"]))
    print(text.getvalue(), end="")
    if args.csv:
        files.write_text(args.csv, text.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
