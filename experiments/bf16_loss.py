"""Does rounding the operands of products to bfloat16 cost loss, or calling C instead of XLA?

question   At the benchmark's shapes s and m and the ladder's ends, over paired seeds: how much
           higher is the held-out loss of bf16 than that of f32 after equal tokens, and (--kinds
           plain f32) that of the rule's plan, with oneDNN and our C, than XLA's alone?
command    python experiments/bf16_loss.py --out studies/bf16_loss --widths --seeds 16
           --steps 300 --batch 2048
cost       3 minutes at s and 12 at m on two cores with AVX-512, a minute on an H200
expected   upper 95% bound of the mean difference below .005 nats at s and m
result     16 pairs, bf16 by our C too (300 steps of 2048 tokens): -.0035, bound -.0003, at s,
           -.0011, bound +.0032, at m (results/bf16_loss.json); at m on an H200, which rounds sums
           too, -.0002, bound +.0029 (bf16_loss_h200.json). With 512 tokens a step the members of a
           pair at m end .024 apart, and 32 pairs, before there was C, show only +.0005, bound
           +.0078. 8 pairs of the rule's plan and XLA's float32: -.00001, bound +.00001, at s,
           +.0001, bound +.0004, at m (f32_loss.json)
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import tyro
from lr_by_width import arguments, guarded, write_table
from scipy import stats

from tinylm import bench, files
from tinylm.look import progress
from tinylm.model.decoder import ModelConfig
from tinylm.native import library
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import runner
from tinylm.sweep.presets import LAPTOP
from tinylm.text import corpora, prepare
from tinylm.train.optim import OptimConfig

Kind = Literal["plain", "f32", "bf16"]


@dataclass
class Args:
    """Train pairs that differ in how they are computed alone; finished runs are kept."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    shapes: tuple[str, ...] = ("s", "m")
    """of tinylm/bench.py"""
    widths: tuple[int, ...] = (16, 160)
    """of the default study's ladder"""
    kinds: tuple[Kind, Kind] = ("f32", "bf16")
    """the second is held against the first; plain: f32 by XLA alone"""
    seeds: int = 16
    """of initial parameters and data order"""
    steps: int = 600
    batch: int = LAPTOP.batch
    """tokens a step"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Train every pair; print the mean difference of each shape with its bound."""
    corpus, table = corpora.load(args.corpus), []
    shapes = {name: bench.shape(name)[0] for name in args.shapes}
    shapes |= {f"D={width}": replace(LAPTOP.base, D=width) for width in args.widths}
    for name, model in shapes.items():
        data, _ = prepare.prepare(args.out / f"text-{model.V}", corpus, model.V, lower=True)
        table += pairs(args, name, replace(model, V=data.V), data)
    first, second = args.kinds
    summary = {name: {**difference([r for r in table if r[0] == name], first, second),
                      "steps": args.steps, "batch": args.batch} for name in shapes}
    for name, found in summary.items():
        progress.say(f"{name}: {second} - {first} {found['mean_nats']:+.4f} nats over "
                     f"{found['pairs']} pairs, 95% bounds {found['low']:+.4f} and "
                     f"{found['high']:+.4f}")
    if args.results:
        head = ("shape", "compute", "seed", "nats_per_token", "id")
        write_table(args.results / f"{second}_loss.csv", head, table)
        files.write_json(args.results / f"{second}_loss.json", summary)
    return 0


def pairs(args: Args, name: str, model: ModelConfig, data) -> list[tuple]:
    """Train one shape both ways; give rows (shape, kind, seed, loss, id)."""
    rate, table = LAPTOP.rule(args.steps * args.batch), []
    for kind in args.kinds:
        compute = "bf16" if kind == "bf16" else "f32"
        runs = [PretrainConfig(replace(model, compute=compute), OptimConfig(lr=rate), args.steps,
                               args.batch, seed, data.id) for seed in range(args.seeds)]
        by_xla = mock.patch.multiple(library, compiler=lambda kept: "", onednn=lambda kept: "")
        with by_xla if kind == "plain" else nullcontext(), progress.live(f"{name} {kind}") as watch:
            records = runner.sweep(args.out / f"runs-{name}-{kind}", runs, data.folder, watch)
        table += sorted((name, kind, r["seed"], r["loss"]["nats_per_token"], r["id"])
                        for r in records)
    return table


def difference(rows: list[tuple], first: str, second: str) -> dict[str, float]:
    """Give the mean paired difference and its two one-sided 95% bounds (t over the pairs)."""
    losses = {kind: np.array([r[3] for r in rows if r[1] == kind]) for kind in (first, second)}
    gaps = losses[second] - losses[first]
    half = stats.t.ppf(0.95, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps)**0.5
    return {"pairs": len(gaps), "mean_nats": float(gaps.mean()), "low": float(gaps.mean() - half),
            "high": float(gaps.mean() + half), f"{first}_nats": float(losses[first].mean())}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
