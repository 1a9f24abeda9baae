"""What do checkpoints cost, and how fast are they verified?

question   One run that saves every second block of `every` seconds: the blocks that begin with a
           save against those that do not, neighbours of each other. Then the newest checkpoint is
           verified again and again.
command    python experiments/checkpoint_cost.py --out studies/checkpoints \\
               --results experiments/results
cost       40 minutes on two cores
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

import numpy as np
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
    """Time training after a checkpoint and without one, and verification."""

    out: Path
    """folder of the runs, which are deleted as they end"""
    results: Path | None = None
    """folder for the record, checkpoint_cost.json"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    shapes: tuple[str, ...] = ("m", "xl")
    """of tinylm bench"""
    every: float = 30.0
    """seconds of a block"""
    rounds: int = 16
    """pairs of blocks"""


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
    """Give the slowdown of a shape by pair of blocks, and the rate of verifying its checkpoint."""
    plan = machine.plan_for(rows, model.T, model.D, *machine.survey())
    chunk = plan.chunk
    place = args.out / "run"
    ends = train(place, model, rows, data, plan, 5 * chunk)  # the first compiles
    block = chunk * math.ceil(args.every * 4 * chunk / (ends[5 * chunk] - ends[chunk]) / chunk)
    plan = dataclasses.replace(plan, checkpoint_every=2 * block)
    ends = train(place, model, rows, data, plan, (2 * args.rounds + 2) * block)
    at = np.array([ends[n * block] for n in range(1, 2 * args.rounds + 3)])
    quiet, saving = np.diff(at)[::2], np.diff(at)[1::2]  # the first save is at the second end
    percent = 100 * (saving / ((quiet[:-1] + quiet[1:]) / 2) - 1)
    lots = np.random.default_rng(0).choice(percent, (10_000, len(percent)))
    last = checkpoint.steps(place / "checkpoints")[-1]
    size, took = sum(p.stat().st_size for p in last.rglob("*") if p.is_file()), []
    for _ in range(5):
        began = time.perf_counter()
        files.verified(last)
        took.append(time.perf_counter() - began)
    (row,) = files.read_rows(place / "timing.jsonl")
    shutil.rmtree(place)
    return {"steps_of_block": block, "seconds_of_block": float(np.median(quiet)),
            "slowdown_percent": percent.round(2).tolist(),
            "mean_slowdown_percent": float(percent.mean()),
            "interval_95": np.quantile(lots.mean(1), [.025, .975]).tolist(),
            "median_slowdown_percent": float(np.median(percent)),
            "seconds_waited_a_save": row["save_seconds"] / (args.rounds + 1),
            "checkpoint_bytes": size, "verified_bytes_per_second": size / statistics.median(took)}


def train(place: Path, model, rows: int, data: Dataset, plan: machine.Plan,
          steps: int) -> dict[int, float]:
    """Train in a new folder; give the clock at which each step's chunk had ended."""
    shutil.rmtree(place, ignore_errors=True)
    config = PretrainConfig(model, OptimConfig(), steps, rows * model.T, data_id=data.id)
    ends = {}
    pretrain(place, config, data, plan, lambda step, _: ends.update({step: time.perf_counter()}))
    return ends


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
