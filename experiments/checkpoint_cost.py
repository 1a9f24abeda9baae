"""What do checkpoints cost, and how fast are they verified?

question   One run that saves before every second block of some seconds: how much longer do those
           blocks take than their neighbours, as a share of the time from one checkpoint to the
           next? Then the newest checkpoint is verified again and again.
command    python experiments/checkpoint_cost.py --out studies/checkpoints \\
               --results experiments/results
cost       30 minutes on two cores
expected   under 2% at 30 seconds, 1 GB/s or more
result     with --rounds 20: 1.3% (.8 to 1.9) at xl, .1% at m; 2.2 and 1.02 GB/s (LOG.md,
           "What a checkpoint costs")
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
    """folder of the runs, which are deleted as they end, and of what each shape came to"""
    results: Path | None = None
    """folder for the record, checkpoint_cost.json"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    shapes: tuple[str, ...] = ("m", "xl")
    """of tinylm bench"""
    every: float = 30.0
    """seconds between checkpoints, of which a save's cost is a share"""
    block: float = 4.0
    """seconds of a block: longer than a save takes to be written"""
    rounds: int = 48
    """pairs of blocks"""


def main(args: Args) -> int:
    """Time every shape; print and write what was found."""
    found = {}
    for name in args.shapes:
        if (kept := args.out / f"{name}.json").exists():  # from a run that was stopped
            found[name] = files.read_json(kept)
            continue
        model, rows = bench.SHAPES[name]
        data, _ = prepare.prepare(args.out / f"text-{model.V}", corpora.load(args.corpus), model.V)
        found[name] = timed(args, dataclasses.replace(model, V=data.V), rows, data)
        progress.say(f"{name}: {found[name]}")
        files.write_json(kept, found[name])
    told = {"every_seconds": args.every, "shapes": found, "versions": machine.versions(),
            "environment": machine.environment()}
    if args.results:
        files.write_json(args.results / "checkpoint_cost.json", told)
    return 0


def timed(args: Args, model, rows: int, data: Dataset) -> dict:
    """Give what a save costs a shape, by pair of blocks, and the rate of verifying one."""
    plan = machine.plan_for(rows, model.T, model.D, model.compute, *machine.survey())
    place, one = args.out / "run", dataclasses.replace(plan, chunk=1)
    ends = train(place, model, rows, data, one, 8)  # the first compiles
    block = math.ceil(args.block / (ends[8] - ends[4]) * 4)
    plan = dataclasses.replace(plan, chunk=block, checkpoint_every=2 * block)
    ends = train(place, model, rows, data, plan, (2 * args.rounds + 2) * block)
    taken = np.diff([ends[n * block] for n in range(1, 2 * args.rounds + 3)])
    quiet, saving = taken[::2], taken[1::2]  # the first save is at the second end
    cost = saving - (quiet[:-1] + quiet[1:]) / 2
    mean = np.random.default_rng(0).choice(cost, (10_000, len(cost))).mean(1)
    last = checkpoint.steps(place / "checkpoints")[-1]
    size, took = sum(p.stat().st_size for p in last.rglob("*") if p.is_file()), []
    for _ in range(5):
        began = time.perf_counter()
        files.verified(last)
        took.append(time.perf_counter() - began)
    shutil.rmtree(place)
    return {"steps_of_block": block, "seconds_of_block": float(np.median(quiet)),
            "seconds_a_save": cost.round(3).tolist(),
            "slowdown_percent": 100 * float(cost.mean()) / args.every,
            "interval_95": (100 * np.quantile(mean, [.025, .975]) / args.every).tolist(),
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
