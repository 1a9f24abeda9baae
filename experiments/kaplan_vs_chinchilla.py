"""What do counting, warmup and tuning each do to the exponent of the best size?

question   Kaplan et al. found best params ~ FLOPs^.73 or more, Hoffmann et al. about ^.5. Porian et
           al. (2406.19146) name three causes: the head's work not counted, a warmup as long for
           short runs as for long ones, rates not tuned by size. What is each worth on our runs?
command    python experiments/kaplan_vs_chinchilla.py --out studies/kaplan
cost       about 12 minutes on two cores
expected   counting blocks alone, 6ND: +.1; a fixed long warmup: +.05 or more; one rate for all
           sizes: unknown sign; all three together above .65, none of them .54
result     .535 (.012) tuned and counted with the head; counting +.107, a fixed warmup +.023, one
           rate -.094, all together .648 (.008) (results/kaplan_vs_chinchilla.*)
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from lr_by_width import arguments, guarded, write_table

from tinylm import files
from tinylm.config import BadInput
from tinylm.laws.accounting import Parameters
from tinylm.laws.isoflop import conventions, minima
from tinylm.look import progress
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import cells, law, runner
from tinylm.sweep.presets import LAPTOP
from tinylm.text import corpora, prepare
from tinylm.text.shards import Dataset
from tinylm.train.optim import WIDTH

WAYS = {"tuned": (False, False), "fixed warmup": (True, False), "one rate": (False, True),
        "fixed warmup, one rate": (True, True)}
KAPLAN, OURS = "blocks 6nd", "blocks+head exact"


@dataclass
class Args:
    """Sweep one grid four ways and count each six ways; finished runs are kept."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    budgets: tuple[float, ...] = (1e11, 2.2e11, 4.6e11, 1e12)
    """FLOPs of the isoFLOP curves"""
    widths: tuple[int, ...] = LAPTOP.widths
    """the ladder"""
    per_budget: int = 7
    """sizes a budget"""
    spread: float = LAPTOP.spread
    """sizes lie within this factor of the expected best"""
    V: int = LAPTOP.base.V
    """rows of the vocabulary"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Train the grid every way; print the exponents, and what each cause moves."""
    data, _ = prepare.prepare(args.out / "text", corpora.load(args.corpus), args.V, lower=True)
    grid = tuned(args, data)
    table, exponents = [], {}
    for way, (warmup, rate) in WAYS.items():
        with progress.live(way) as watch:
            records = runner.sweep(args.out / way.replace(", ", "-").replace(" ", "-"),
                                   spoiled(grid, warmup, rate), data.folder, watch)
        table += [(way, r["config"]["model"]["D"], f"{r['flops']['exact']:.4g}",
                   r["config"]["optim"]["lr"], r["config"]["optim"]["warmup_steps"],
                   r["loss"]["nats_per_token"], r["id"]) for r in records if r["loss"]]
        exponents[way] = counted(records)
        progress.say(f"{way}: " + ", ".join(
            f"{k} {e['a']:.3f} ({e['a_se']:.3f})" if "a" in e else f"{k}: {e['refused']}"
            for k, e in exponents[way].items()))
    moved = effects(exponents)
    progress.say("moves the exponent by: " + ", ".join(f"{k} {v:+.3f}" for k, v in moved.items()))
    if args.results:
        head = ("way", "width", "flops", "lr", "warmup_steps", "nats_per_token", "id")
        write_table(args.results / "kaplan_vs_chinchilla.csv", head, table)
        files.write_json(args.results / "kaplan_vs_chinchilla.json",
                         {"exponents": exponents, "moved": moved})
    return 0


def tuned(args: Args, data: Dataset) -> list[PretrainConfig]:
    """Give the grid as the default study trains it."""
    models = cells.ladder(replace(LAPTOP.base, V=data.V), args.widths)
    planned = cells.grid(models, args.budgets, args.per_budget, args.spread, LAPTOP.batch)
    return [cells.config(c, models, LAPTOP.optim, LAPTOP.rule, LAPTOP.batch, data.id)
            for c in planned]


def spoiled(grid: list[PretrainConfig], warmup: bool, rate: bool) -> list[PretrainConfig]:
    """Give all runs one warmup, a tenth of the longest run, or one Adam rate, that of the middle.

    The middle is the run of median size; `lr` is of width 64, so it grows with the width here.
    """
    long = round(LAPTOP.optim.warmup * max(c.steps for c in grid))
    middle = sorted(grid, key=lambda c: (c.model.D, c.steps))[len(grid) // 2]
    plain = middle.optim.lr * WIDTH / middle.model.D
    out = []
    for c in grid:
        optim = replace(c.optim, warmup_steps=long if warmup else 0,
                        lr=plain * c.model.D / WIDTH if rate else c.optim.lr)
        out.append(replace(c, optim=optim))
    return out


def counted(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Give the exponents by convention and the number of minima, or why there are none."""
    runs = law.runs_of(records)[0]
    held = sum(m.bracketed for m in minima(runs))
    try:
        found = conventions(runs, [Parameters(**r["params"]) for r in law.finished(records)])
    except BadInput as refusal:
        return {way: {"refused": str(refusal)} for way in (KAPLAN, OURS)}
    return {k: {**e._asdict(), "minima": held} for k, e in found.items()}


def effects(exponents: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Give what each cause alone, and all together, add to the exponent of the tuned runs.

    A cause whose curves show no exponent is left out.
    """
    causes = {"counting": ("tuned", KAPLAN), "warmup": ("fixed warmup", OURS),
              "tuning": ("one rate", OURS), "all": ("fixed warmup, one rate", KAPLAN)}
    true = exponents["tuned"][OURS]
    found = {cause: exponents[way][convention] for cause, (way, convention) in causes.items()}
    return {cause: e["a"] - true["a"] for cause, e in found.items() if "a" in e and "a" in true}


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
