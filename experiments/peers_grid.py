"""The default study's grid beside nanoGPT training the same models on the same tokens.

question   How much longer would nanoGPT take for all runs of a finished study's sweep, start-up and
           compilation included, one process a run over all cores, compiled, float32?
command    python experiments/peers_grid.py --nanogpt CHECKOUT --study studies/laptop
           (--python names one that has torch, where this one has not)
cost       about 10 minutes on two cores, most of it torch compiling
expected   at least 3 times our sweep's wall time
result     40.7 minutes against 6.7: 6.11 times on two Zen 4 cores (results/peers_grid.json),
           55.2 against 8.3: 6.65 times on two Xeon cores (results/peers_grid_xeon.json)

Every third run by FLOPs is started and timed for some seconds, nanoGPT and then ours in two pinned
processes, as a sweep has them; its start-up is the mean of these, the rates of the other runs are
interpolated by width. Our sweep is its tokens at our rate over the share of its workers' wall time
that the study's own record says was computing; so both sides are of the same minutes.
"""

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from peers import PEER, WAYS, batches, check_peer

from tinylm import bench, files, machine
from tinylm.__main__ import arguments, guarded
from tinylm.config import BadInput, from_json, require, to_json
from tinylm.look import progress
from tinylm.model.decoder import ModelConfig
from tinylm.sweep.times import spent
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
    require("every", args.every, 1, 1e6)
    check_peer(args.nanogpt, args.python)
    records = run.table(p.parent for p in sorted((args.study / "sweep").glob("*/record.json")))
    went = spent(args.study / "sweep")
    if not records or not went["wall"]:
        raise BadInput(f"{args.study} holds no finished sweep; give a finished study")
    measured = []
    for record in records[args.every // 2:: args.every]:
        measured.append(timed(args, record))
        progress.say(f"D={measured[-1]['D']}: {measured[-1]['start_seconds']:.1f} s to start, "
                     f"{measured[-1]['tokens_per_second']:,.0f} tokens/s; ours "
                     f"{measured[-1]['our_tokens_per_second']:,.0f}")
    found = scaled(records, measured, went["compute"] / went["wall"])
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
    with bench.Crew(bench.servers(len(machine.cores()))) as ours:
        asked = (to_json(model), rows, args.seconds, few)
        ours.ask(*asked)
        return {"D": model.D, "tokens": record["tokens"], "start_seconds": start,
                "tokens_per_second": rate, "our_tokens_per_second": ours.ask(*asked)}


@functools.cache
def data(study: Path):
    """Open the study's token files once."""
    return open_dataset(study / "text/tokens")


def scaled(records: list[dict[str, Any]], measured: list[dict[str, Any]],
           computing: float) -> dict[str, float]:
    """Give the seconds of all runs: theirs by start and rate, ours by rate and computing share."""
    def training(rate: str) -> float:
        by_width = sorted({m["D"]: m[rate] for m in measured}.items())
        widths, rates = (np.log([pair[i] for pair in by_width]) for i in range(2))
        return sum(r["tokens"] / float(np.exp(np.interp(
            np.log(r["config"]["model"]["D"]), widths, rates))) for r in records)

    start = float(np.mean([m["start_seconds"] for m in measured])) * len(records)
    theirs, ours = start + training("tokens_per_second"), training("our_tokens_per_second")
    return {"theirs_seconds": theirs, "theirs_start_seconds": start,
            "ours_seconds": ours / computing, "our_computing_share": computing,
            "ratio": theirs * computing / ours}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
