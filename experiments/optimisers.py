"""AdamW or Muon: which is lower at equal tokens, and which at equal time?

question   Each tuned over 6 rates at three widths and 3 seeds: how do the best losses compare after
           equal tokens, and after equal time? Does Muon's best rate stay where it is too?
command    python experiments/optimisers.py --out studies/optimisers
cost       about 20 minutes on two cores
expected   Muon lower at equal tokens by .02 nats or more; at equal time undecided at small widths
result     Muon lower by .072 to .078 nats at equal tokens; at equal time -.041, +.010, +.034 at
           widths 24, 64, 128, where a step takes 1.12, 1.29, 1.32 times the time: AdamW stays
"""

import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from lr_by_width import arguments, guarded, minimum, write_table

from tinylm import bench, files, machine
from tinylm.look import progress
from tinylm.model.decoder import ModelConfig
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import runner
from tinylm.sweep.presets import LAPTOP
from tinylm.text import corpora, prepare
from tinylm.train.optim import OptimConfig

KINDS = ("adamw", "muon")
ROUNDS, SECONDS = 5, 1.0  # of timing a step


@dataclass
class Args:
    """Sweep both optimisers' rates; finished runs are kept."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    widths: tuple[int, ...] = (24, 64, 128)
    """sizes of the default study"""
    rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
    """rates of a width-64 model"""
    seeds: int = 3
    """of initial parameters and data order"""
    steps: int = 1000
    """of 512 tokens"""
    longer: float = 1.5
    """AdamW's best rate is trained that many times longer too, to price time in nats"""
    V: int = LAPTOP.base.V
    """rows of the vocabulary"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Train every rate with both, then AdamW for longer; print both comparisons."""
    data, _ = prepare.prepare(args.out / "text", corpora.load(args.corpus), args.V)

    def config(width: int, kind: str, lr: float, seed: int) -> PretrainConfig:
        return PretrainConfig(replace(LAPTOP.base, V=data.V, D=width),
                              OptimConfig(kind=kind, lr=lr), args.steps, 512, seed, data.id)

    runs = [config(w, k, lr, s) for w in args.widths for k in KINDS for lr in args.rates
            for s in range(args.seeds)]
    table = train(args.out / "runs", runs, data)
    found = {w: {k: minimum([r[1:] for r in table if r[:2] == (k, w)]) for k in KINDS}
             for w in args.widths}
    best = {w: min(found[w]["adamw"]["mean_losses"], key=found[w]["adamw"]["mean_losses"].get)
            for w in args.widths}
    longer = [replace(config(w, "adamw", float(best[w]), s), steps=round(args.steps * args.longer))
              for w in args.widths for s in range(args.seeds)]
    more = train(args.out / "longer", longer, data)
    summary = {str(w): compare(found[w], slower(replace(LAPTOP.base, V=data.V, D=w)),
                               [r for r in more if r[1] == w], args.longer) for w in args.widths}
    for width, s in summary.items():
        progress.say(f"D={width}: Muon - AdamW at equal tokens {s['equal_tokens_nats']:+.4f} nats, "
                     f"a step takes {s['seconds_ratio']:.2f} times the time, at equal time "
                     f"{s['equal_time_nats']:+.4f} nats; best rates {s['best_rates']}")
    if args.results:
        head = ("kind", "width", "lr", "seed", "nats_per_token", "id")
        write_table(args.results / "optimisers.csv", head, table + more)
        files.write_json(args.results / "optimisers.json", summary)
    return 0


def train(folder: Path, runs: list[PretrainConfig], data) -> list[tuple]:
    """Train a list; give rows (kind, width, rate, seed, loss, id)."""
    with progress.live(folder.name) as watch:
        records = runner.sweep(folder, runs, data.folder, watch)
    return sorted((r["config"]["optim"]["kind"], r["config"]["model"]["D"],
                   r["config"]["optim"]["lr"], r["seed"], r["loss"]["nats_per_token"], r["id"])
                  for r in records if r["loss"])


def slower(model: ModelConfig) -> float:
    """Give how many times longer a step takes with Muon, both timed in turn on one device."""
    rows = LAPTOP.batch // model.T
    plan = machine.plan_for(rows, model.T, model.D, model.compute, machine.survey()[0], 1)
    drawn = np.random.default_rng(0).integers(0, model.V, (4, rows, model.T + 1))
    tasks = {kind: functools.partial(bench.Trainer(model, plan, drawn, OptimConfig(kind=kind)).rate,
                                     SECONDS) for kind in KINDS}
    found = bench.interleaved(tasks, ROUNDS)
    return found["adamw"].median / found["muon"].median


def compare(found: dict, ratio: float, longer: list[tuple], times: float) -> dict:
    """Compare mean losses at each one's best rate, after equal tokens and after equal time."""
    low = {k: min(found[k]["mean_losses"].values()) for k in KINDS}
    gain = (low["adamw"] - np.mean([r[4] for r in longer])) / np.log(times)  # nats an e-fold
    equal = low["muon"] - low["adamw"]
    return {"equal_tokens_nats": equal, "seconds_ratio": ratio,
            "nats_per_efold_of_steps": float(gain),
            "equal_time_nats": float(equal + gain * np.log(ratio)),
            "best_rates": {k: found[k]["best"] for k in KINDS},
            "at_edge": {k: found[k]["at_edge"] for k in KINDS}, "minima": found}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
