"""Does time a token grow as FLOPs a token do, and does a step's memory not grow with its batch?

question   Over a 100-fold range of sizes: seconds a token against FLOPs a token of one model on the
           whole machine, in float32 and with bfloat16 products; utilisation against the best
           float32 product measured in the same minutes; the compiled step's temporary bytes at one
           and at eight times the batch.
command    python experiments/cost_by_size.py --results experiments/results
cost       about 12 minutes on two cores, half of it compiling
expected   from m (D=128) on 60% of the machine's float32 rate or more; below it less, for attention
           and norms; memory the same at any batch
result     with bfloat16 products 103% to 127% of the best float32 product from D=128 on, without
           66% to 79% (two Zen 4 cores); time ~ FLOPs^.91 (float32), ^.86; memory grows by 3.2% at
           most (results/cost_by_size.*)
"""

import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from lr_by_width import arguments, guarded, write_table

from tinylm import bench, files, machine
from tinylm.config import from_json
from tinylm.laws.accounting import flops_per_token
from tinylm.look import plots, progress
from tinylm.model.decoder import ModelConfig

ROWS = 8
"""sequences a step"""


@dataclass
class Args:
    """Time training at every size in turn."""

    shapes: tuple[str, ...] = ("32x2x1024", "64x2x1024", "96x3x1024", "128x4x1024", "192x4x2048",
                               "256x6x4096", "384x6x4096")
    """D x L x V; heads of 32, context 256; each in both types"""
    rounds: int = 5
    """the median is over these"""
    seconds: float = 2.0
    """a size each round"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Time, audit the memory, print."""
    models = {f"{name} {compute}": replace(model(name), compute=compute)
              for name in args.shapes for compute in ("f32", "bf16")}
    plans = {name: machine.plan_for(ROWS, m.T, m.D, m.compute, *machine.survey())
             for name, m in models.items()}
    trainers = {name: bench.Trainer(m, plans[name], drawn(m, ROWS)) for name, m in models.items()}
    tasks = {name: functools.partial(trainer.rate, args.seconds)
             for name, trainer in trainers.items()}
    product = bench.peak()["best_f32_gflops"]
    found = bench.interleaved(tasks, args.rounds)
    table, worst = [], 0.0
    for name, rate in found.items():
        m = models[name]
        flops = flops_per_token(m.shape)
        used = rate.median * flops / 1e9
        small, large = (temporary(m, plans[name], rows) for rows in (ROWS, 8 * ROWS))
        worst = max(worst, large / small - 1)
        table.append((m.D, m.L, m.V, m.compute, flops, rate.median, rate.low, rate.high, used,
                      used / product, small, large))
        progress.say(f"{name}: {flops:.3g} FLOPs and {1e6 / rate.median:.1f} us a token, "
                     f"{used:.0f} GFLOP/s, {used / product:.0%} of the best product; temporary "
                     f"memory {small / 1e6:.1f} MB, {large / 1e6:.1f} at 8 times the batch")
    slopes = {compute: -float(np.polyfit(*np.log([r[4:6] for r in table if r[3] == compute]).T,
                                         1)[0]) for compute in ("f32", "bf16")}
    progress.say("time a token ~ FLOPs a token^" + ", ".join(
        f"{slope:.2f} ({compute})" for compute, slope in slopes.items()))
    if args.results:
        head = ("D", "L", "V", "compute", "flops_per_token", "tokens_per_second", "low", "high",
                "gflops", "utilisation", "temporary_bytes", "temporary_bytes_8_times_the_batch")
        write_table(args.results / "cost_by_size.csv", head, table)
        files.write_json(args.results / "cost_by_size.json", {
            "product_gflops": product, "time_exponent": slopes, "memory_growth": worst,
            "versions": machine.versions(), "environment": machine.environment()})
        figure = plots.cost([dict(zip(head, row, strict=True)) for row in table])
        files.write_text(args.results / "cost_by_size.svg", plots.standalone(figure))
    return 0


def model(name: str) -> ModelConfig:
    """Read D x L x V."""
    D, L, V = map(int, name.split("x"))
    return from_json(ModelConfig, {"D": D, "L": L, "V": V, "H": max(1, D // 32), "T": 256}, name)


def drawn(m: ModelConfig, rows: int) -> np.ndarray:
    """Draw batches [2, rows, T + 1] of random tokens."""
    return np.random.default_rng(0).integers(0, m.V, (2, rows, m.T + 1))


def temporary(m: ModelConfig, plan: machine.Plan, rows: int) -> int:
    """Give the bytes that the compiled chunk needs beside its arguments and results."""
    trainer: Any = bench.Trainer(m, plan, drawn(m, rows))
    lowered = trainer.chunk.lower(trainer.state, trainer.batches, 1)
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
