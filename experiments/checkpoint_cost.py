"""What do checkpoints cost, and how fast are they verified?

question   Training that saves every `every` seconds against training that saves once, at its end:
           the same steps of the same shape in turn, compiling left out. Then the newest checkpoint
           is verified again and again.
command    python experiments/checkpoint_cost.py --out studies/checkpoints \\
               --results experiments/results
cost       37 minutes on two cores
expected   under 2% at 30 seconds, 1 GB/s or more
result     experiments/LOG.md, "What a checkpoint costs"
"""

import dataclasses
import math
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from tinylm import files, machine

machine.command()

from tinylm import bench  # noqa: E402  (JAX must start pinned)
from tinylm.__main__ import arguments, guarded  # noqa: E402
from tinylm.look import progress  # noqa: E402
from tinylm.stages.pretrain import PretrainConfig, pretrain  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402
from tinylm.text.shards import Dataset  # noqa: E402
from tinylm.train import checkpoint  # noqa: E402
from tinylm.train.optim import OptimConfig  # noqa: E402


@dataclass
class Args:
    """Time training with and without checkpoints, and verification."""

    out: Path
    """folder of the runs, which are deleted as they end"""
    results: Path | None = None
    """folder for the record, checkpoint_cost.json"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    shapes: tuple[str, ...] = ("m", "xl")
    """of tinylm bench"""
    seconds: float = 65.0
    """of training a run"""
    every: float = 30.0
    """seconds between checkpoints"""
    rounds: int = 3
    """pairs of runs"""


def main(args: Args) -> int:
    """Time every shape; print and write what was found."""
    found = {}
    for name in args.shapes:
        model, rows = bench.SHAPES[name]
        data, _ = prepare.prepare(args.out / f"text-{model.V}", corpora.load(args.corpus), model.V)
        found[name] = timed(args, dataclasses.replace(model, V=data.V), rows, data)
        progress.say(f"{name}: {found[name]}")
    told = {"every_seconds": args.every, "rounds": args.rounds, "shapes": found,
            "versions": machine.versions(), "environment": machine.environment()}
    if args.results:
        files.write_json(args.results / "checkpoint_cost.json", told)
    return 0


def timed(args: Args, model, rows: int, data: Dataset) -> dict:
    """Give the slowdown of a shape by round, and the rate of verifying its checkpoint."""
    plan = machine.plan_for(rows, model.T, model.D, *machine.survey())
    for tries in (4, 8):  # the first one compiles
        step = run(args.out, model, rows, data, plan, tries * plan.chunk, 0)[0] / tries / plan.chunk
    steps, between = (plan.chunk * math.ceil(s / step / plan.chunk)
                      for s in (args.seconds, args.every))
    ratios, saved, speed = [], [], []
    for n in range(args.rounds):
        pair = {}
        for every in (0, between)[::1 if n % 2 else -1]:
            pair[every], save, speed = run(args.out, model, rows, data, plan, steps, every)
            saved += [save] if every else []
        ratios.append(pair[between] / pair[0])
    return {"steps": steps, "steps_between": between, "slowdown_percent": [
                round(100 * (r - 1), 2) for r in ratios],
            "median_slowdown_percent": 100 * (statistics.median(ratios) - 1),
            "seconds_waited_for_saves": saved, **speed}


def run(out: Path, model, rows: int, data: Dataset, plan: machine.Plan, steps: int,
        every: int) -> tuple[float, float, dict]:
    """Train; give seconds without compiling and evaluating, those of saves, and verification."""
    place = out / "run"
    shutil.rmtree(place, ignore_errors=True)
    config = PretrainConfig(model, OptimConfig(), steps, rows * model.T, data_id=data.id)
    pretrain(place, config, data, dataclasses.replace(plan, checkpoint_every=every or steps))
    (row,) = files.read_rows(place / "timing.jsonl")
    spent = row["wall_seconds"] - row["compile_seconds"] - row["evaluate_seconds"]
    last = checkpoint.steps(place / "checkpoints")[-1]
    size, took = sum(p.stat().st_size for p in last.rglob("*") if p.is_file()), []
    for _ in range(5):
        began = time.perf_counter()
        files.verified(last)
        took.append(time.perf_counter() - began)
    return spent, row["save_seconds"], {
        "checkpoint_bytes": size, "verified_bytes_per_second": size / statistics.median(took)}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
