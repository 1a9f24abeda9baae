"""Does the rule that plans a run pick the fastest plan on this machine, and would measuring pay?

question   By width, on one pinned core as a sweep's worker has it: how many tokens a second do
           micro-batches of 1 to 4 sequences, scanned layers, XLA's attention and loss, and all by
           XLA (where the rule calls C) give, what does compiling each cost, and how much slower
           than the best is what `machine.plan_for` picks?
command    python experiments/plan_choice.py --results experiments/results
cost       about 5 minutes on one core
expected   the rule within 5% of the best at every width, and a measurement of all plans of a shape
           dearer than that gains over a run of the default study
result     the best at widths 12 to 160; 1.82, 1.62, 1.48, 1.34 and 1.33 times XLA's best (two Zen
           4 cores); 3 to 12 s to compile a width's seven plans, most kept (plan_choice.json)
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from tinylm import files, machine

machine.pin(1, tuple(machine.cores()[:1]))

from lr_by_width import arguments, guarded, write_table  # noqa: E402  (JAX must start pinned)

from tinylm import bench  # noqa: E402
from tinylm.look import progress  # noqa: E402
from tinylm.sweep.presets import LAPTOP  # noqa: E402

PLANS = {"1": {"micro": 1}, "2": {"micro": 2}, "4": {"micro": 4},
         "scanned": {"unroll": False}, "without our C": {"native": False},
         "1 by XLA": {"micro": 1, "onednn": False, "native": False},
         "2 by XLA": {"micro": 2, "onednn": False, "native": False}}
"""beside the rule's plan: what is changed of it"""


@dataclass
class Args:
    """Time every plan of every width in turn."""

    widths: tuple[int, ...] = (12, 24, 48, 96, 160)
    """of the default study's ladder"""
    rounds: int = 5
    """the median is over these"""
    seconds: float = 1.0
    """a plan each round"""
    V: int = LAPTOP.base.V
    """rows of the vocabulary"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Compile and time; print the rule's choice against the best."""
    rows, table, summary = LAPTOP.batch // LAPTOP.base.T, [], {}
    for width in args.widths:
        model = replace(LAPTOP.base, V=args.V, D=width)
        rule = machine.plan_for(rows, model.T, width, model.compute, "cpu", 1)
        drawn = np.random.default_rng(0).integers(0, args.V, (4, rows, model.T + 1))
        tasks, compiled = {}, {}
        for name, dials in PLANS.items():
            began = time.perf_counter()
            trainer = bench.Trainer(model, replace(rule, **dials), drawn)
            trainer.rate(0.0)
            tasks[name] = lambda trainer=trainer: trainer.rate(args.seconds)
            compiled[name] = time.perf_counter() - began
        found = bench.interleaved(tasks, args.rounds)
        best = max(found, key=lambda name: found[name].median)
        by_xla = max(found["1 by XLA"].median, found["2 by XLA"].median)
        lost = 1 - found[str(rule.micro)].median / found[best].median
        summary[str(width)] = {"rule": str(rule.micro), "onednn": rule.onednn,
                               "native": rule.native, "best": best,
                               "lost_share": lost, "over_xla": found[str(rule.micro)].median
                               / by_xla, "compile_seconds": sum(compiled.values())}
        table += [(width, name, r.median, r.low, r.high, compiled[name])
                  for name, r in found.items()]
        progress.say(f"D={width}: best {best}, the rule {rule.micro} is {lost:.1%} slower, "
                     f"{summary[str(width)]['over_xla']:.2f} times its rate by XLA; "
                     f"{sum(compiled.values()):.0f} s to compile all")
    if args.results:
        head = ("width", "plan", "tokens_per_second", "low", "high", "compile_seconds")
        write_table(args.results / "plan_choice.csv", head, table)
        files.write_json(args.results / "plan_choice.json",
                         {"versions": machine.versions(), "environment": machine.environment(),
                          "widths": summary})
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
