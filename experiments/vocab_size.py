"""How large a vocabulary is best at a fixed budget? The record behind the laptop preset's V.

question   At equal training FLOPs (head included), which V gives the least held-out bits a byte,
           each at its best of three or four widths?
command    python experiments/vocab_size.py --out studies/vocab_size
cost       about 8 minutes on two cores
expected   bits a byte fall with V until the head eats what the shorter text saves
result     experiments/results/vocab_size.csv
"""

import csv
import io
import sys
from dataclasses import dataclass
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
from tinylm.sweep.presets import LAPTOP  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402
from tinylm.train.optim import OptimConfig  # noqa: E402

CELLS = ((512, 40), (512, 48), (512, 56), (1024, 40), (1024, 48), (1024, 56), (1536, 32),
         (1536, 40), (1536, 48), (2048, 32), (2048, 40), (2048, 48), (3072, 24), (3072, 32),
         (3072, 40), (4096, 24), (4096, 32))


@dataclass
class Args:
    """Train several widths under several tokenizers at one budget; finished runs are kept."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    flops: float = 1e12
    """training FLOPs of every run"""
    cells: tuple[tuple[int, int], ...] = CELLS
    """(V, width)"""
    csv: Path | None = None
    """also write the table here"""


def main(args: Args) -> int:
    """Train every cell and print bits a byte."""
    corpus = corpora.load(args.corpus)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("V", "width", "flops", "tokens", "bytes_per_token", "bits_per_byte", "id"))
    for V in sorted({v for v, _ in args.cells}):
        data, _ = prepare.prepare(args.out / f"text-{V}", corpus, V)
        runs = []
        for width in (d for v, d in args.cells if v == V):
            model = ModelConfig(V=V, D=width)
            steps = cell(args.flops, model.shape, 512).steps
            optim = OptimConfig(lr=LAPTOP.rule(steps * 512))
            runs.append(PretrainConfig(model, optim, steps, 512, 0, data.id))
        with progress.live(f"V={V}") as watch:
            records = runner.sweep(args.out / f"runs-{V}", runs, data.folder, watch)
        for r in sorted(records, key=lambda r: r["config"]["model"]["D"]):
            rows.writerow((V, r["config"]["model"]["D"], f"{r['flops']['exact']:.4g}", r["tokens"],
                           f"{data.bytes_per_token:.4f}", f"{r['loss']['bits_per_byte']:.4f}",
                           r["id"]))
    print(text.getvalue(), end="")
    if args.csv:
        files.write_text(args.csv, text.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
