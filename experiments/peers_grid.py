"""The default study's grid beside nanoGPT training the same models on the same tokens.

question   How much longer would nanoGPT take for all runs of a finished study's sweep, start-up and
           compilation included, one process a run over all cores, compiled, float32?
command    python experiments/peers_grid.py --nanogpt CHECKOUT --study studies/laptop
           (--python names one that has torch, where this one has not)
cost       about 10 minutes on two cores, most of it torch compiling
expected   at least 3 times our sweep's wall time
result     not recorded yet

Every third run by FLOPs is started and timed for some seconds; start-up is the mean of these, the
rate of the others is interpolated by width. Ours is the wall time of the study's own sweep, so run
both on the same quiet machine.
"""

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from peers import PEER, WAYS, batches

from tinylm import bench, files, machine
from tinylm.__main__ import arguments, guarded
from tinylm.config import BadInput, from_json
from tinylm.look import progress
from tinylm.model.decoder import ModelConfig
from tinylm.text.shards import open_dataset
from tinylm.train import run


@dataclass
class Args:
    """Time a share of a study's grid with nanoGPT, scale it to the whole, compare."""

    nanogpt: Path
    """folder of a checkout of github.com/karpathy/nanoGPT"""
    study: Path
    """folder of a finished study"""
    python: Path = Path(sys.executable)
    """a Python that has torch"""
    every: int = 3
    """the share: each n-th run by FLOPs"""
    seconds: float = 5.0
    """of training timed a run"""
    results: Path | None = None
    """folder for the record"""


def main(args: Args) -> int:
    """Measure, scale and print."""
    if not (args.nanogpt / "model.py").exists():
        raise BadInput(f"{args.nanogpt} holds no model.py; give a checkout of nanoGPT")
    records = run.table(p.parent for p in sorted((args.study / "sweep").glob("*/record.json")))
    walls = files.read_lines(args.study / "sweep/workers.jsonl")
    if not records or len(walls) != 1:
        raise BadInput(f"{args.study} holds no sweep that ran in one go; give a finished study")
    measured = []
    for record in records[args.every // 2:: args.every]:
        measured.append(timed(args, record))
        progress.say(f"D={measured[-1]['D']}: {measured[-1]['start_seconds']:.1f} s to start, "
                     f"{measured[-1]['tokens_per_second']:,.0f} tokens/s")
    found = scaled(records, measured, walls[0]["wall_seconds"])
    found |= {"versions": machine.versions(), "measured": measured}
    progress.say(f"{len(records)} runs: nanoGPT {found['theirs_seconds'] / 60:.1f} min (start-up "
                 f"{found['theirs_start_seconds'] / 60:.1f}), ours "
                 f"{found['ours_seconds'] / 60:.1f} min: {found['ratio']:.2f} times")
    if args.results:
        files.write_json(args.results / "peers_grid.json", found)
    return 0


def timed(args: Args, record: dict[str, Any]) -> dict[str, Any]:
    """Start nanoGPT on one run's shape and batch; time its start and its training."""
    model = from_json(ModelConfig, record["config"]["model"], "model")
    rows = record["config"]["batch"] // model.T
    few = batches(args.study.parent / "peers-grid", data(args.study), model, rows, 8)[0]
    shape = {k: getattr(model, k) for k in ("V", "D", "L", "H", "T")}
    ask = ("rate", shape, rows, few, WAYS["nanoGPT compiled f32"])
    began = time.perf_counter()
    with bench.Crew([[str(args.python), str(PEER), str(args.nanogpt),
                      str(len(machine.cores()))]]) as peer:
        peer.ask(*ask, 0.0)
        start = time.perf_counter() - began
        rate = peer.ask(*ask, args.seconds)
    return {"D": model.D, "tokens": record["tokens"], "start_seconds": start,
            "tokens_per_second": rate}


@functools.cache
def data(study: Path):
    """Open the study's token files once."""
    return open_dataset(study / "text/tokens")


def scaled(records: list[dict[str, Any]], measured: list[dict[str, Any]],
           ours: float) -> dict[str, float]:
    """Give the seconds that all runs would take, by the mean start and the rate of their width."""
    by_width = sorted({m["D"]: m["tokens_per_second"] for m in measured}.items())
    widths, rates = (np.log([pair[i] for pair in by_width]) for i in range(2))
    start = float(np.mean([m["start_seconds"] for m in measured])) * len(records)
    training = sum(r["tokens"] / float(np.exp(np.interp(
        np.log(r["config"]["model"]["D"]), widths, rates))) for r in records)
    return {"theirs_seconds": start + training, "theirs_start_seconds": start,
            "ours_seconds": ours, "ratio": (start + training) / ours}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
