"""What do tuning and alignment reach at .1, .3 and 1 million parameters?

question   After the same tuning, preferences and budgets at three sizes: exact answers by family,
           turns that end, system prompts obeyed, base text's tax, a reward model's accuracy beside
           its ceiling, and what DPO, PPO, GRPO and best-of-n add to the tuned model.
command    python experiments/alignment_bands.py --out studies/bands --study studies/laptop
cost       an hour to two on two cores (measured in parts, other work beside it)
expected   at 1M parameters: 80% of copies, lists and choices, 99% of turns ended, 90% of system
           prompts obeyed, a tax of 5%, 90% of the ceiling at 4,000 pairs, 5 points by a policy on
           the family that tuning left between 50 and 80%, and DPO winning 55% or more
result     experiments/results/alignment_bands.json; the bands are replaced, see LOG.md

What is asked, how many times and which judge wins is hashed before anything trains (`suite.json`);
a folder keeps to what it began with.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro
from lr_by_width import arguments, guarded, write_table

from tinylm import files
from tinylm.config import BadInput, digest
from tinylm.evaluate import suite
from tinylm.laws.plan import cell
from tinylm.look import alignment, progress
from tinylm.stages.policy import Dials
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import cells, runner
from tinylm.sweep.presets import LAPTOP
from tinylm.text import corpora, prepare, tasks
from tinylm.text.shards import Dataset
from tinylm.train.optim import OptimConfig
from tinylm.verbs import align, folders
from tinylm.verbs.runs import evaluate, sft

FAMILY = ("sentence",)
"""what is ranked and, against the reward model, optimised: fixed beforehand"""
EXACT = ("copy", "glossary", "sentence", "recall")
"""what is optimised against its exact reward"""
JUDGE = OptimConfig(lr=3e-3, decay=1.0)
"""of the reward model, which on 4,000 pairs is at 88% of its ceiling after two epochs (LOG)"""
METHODS = ("dpo", "grpo", "ppo", "exact")


@dataclass
class Args:
    """Train, tune and align one model a size; finished runs are kept."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    widths: tuple[int, ...] = (32, 80, 160)
    """D of each size"""
    flops: tuple[float, ...] = (2e12, 8e12, 3.2e13)
    """of each base run"""
    tasks: int = 40000
    """generated to tune on"""
    steps: int = LAPTOP.sft_steps
    """of tuning, 16 rows each"""
    ranked: int = 4500
    """tasks whose answers are ranked, two each: a pair a task, of which a tenth judges"""
    rollouts: int = 40
    """of the policies"""
    asked: int = 600
    """tasks a family; the glossary has 630"""
    sentences: int = 1000
    """of which the better one wins"""
    study: Path | None = None
    """a finished default study, whose chat model is aligned and measured too"""
    best_of: int = 4
    """samples that the reward model chooses from"""
    V: int = LAPTOP.base.V
    """rows of the vocabulary"""
    results: Path | None = None
    """folder for the table and the rows"""


def main(args: Args) -> int:
    """Make every size's runs and its table; print the bands."""
    if len(args.widths) != len(args.flops):
        raise BadInput(f"{len(args.widths)} widths and {len(args.flops)} FLOPs; give one a width")
    if args.study:
        folders.finished(args.study / "chat")  # else it would be tuned there, hours later
    asked = suite.SuiteConfig(args.asked, sentences=args.sentences)
    fixed = {"suite": asdict(asked), "tasks_id": tasks.tasks_id(suite.drawn(asked)),
             "ranked": FAMILY, "exact": EXACT, "judge": "rubric.graded, ties half"}
    fixed["id"] = digest(fixed)[:16]
    place = args.out / "suite.json"
    if place.exists() and files.read_json(place)["id"] != fixed["id"]:
        raise BadInput(f"{place} was fixed with other tasks; ask the same or choose a new folder")
    files.write_json(place, fixed)
    data, _ = prepare.prepare(args.out / "text", corpora.load(args.corpus), args.V, lower=True)
    bases = {width: base(width, flops, data) for width, flops in
             zip(args.widths, args.flops, strict=True)}
    with progress.live("base") as watch:
        runner.sweep(args.out / "base", list(bases.values()), data.folder, watch)
    sizes = {width: aligned(args, args.out / str(width), args.out / "base" / cells.name(config))
             for width, config in bases.items()}
    if args.study:
        sizes["study"] = aligned(args, args.out / "study", args.study / "target",
                                 args.study / "chat")
    table = [row(width, name, told) for width, size in sizes.items()
             for name, told in size["runs"].items()]
    for width, size in sizes.items():
        print(f"D={width}\n{alignment.table(size['runs'], size.get('reward'))}")
    if args.results:
        write_table(args.results / "alignment_bands.csv", COLUMNS, table)
        files.write_json(args.results / "alignment_bands.json", {
            **fixed, "sizes": sizes, "settings": {
                k: v for k, v in vars(args).items()
                if k not in ("out", "corpus", "results", "study")}})
    return 0


def base(width: int, flops: float, data: Dataset) -> PretrainConfig:
    """Give the config of a base run, by the default study's rules."""
    models = cells.ladder(replace(LAPTOP.base, V=data.V), [width])
    return cells.config(cell(flops, models[0].shape, LAPTOP.batch), models, LAPTOP.optim,
                        LAPTOP.rule, LAPTOP.batch, data.id)


def aligned(args: Args, place: Path, trunk: Path, given: Path | None = None) -> dict:
    """Tune a trunk (or take its tuned run), rank, judge and optimise in a place; give its table."""
    tuned, judge = given or place / "sft", place / "reward"
    done = {name: (place / name / "record.json").exists() for name in ("reward", *METHODS)}
    if not (tuned / "record.json").exists():
        sft(trunk, tuned, tasks=args.tasks, optim=LAPTOP.sft, steps=args.steps,
            replay=LAPTOP.replay, corpus=args.corpus)
    if not done["reward"]:
        align.reward(tuned, judge, sampled=args.ranked, family=FAMILY, responses=2, optim=JUDGE,
                     steps=max(1, int(1.8 * args.ranked) // 16))  # two epochs
    if not done["dpo"]:
        align.dpo(tuned, place / "dpo", sampled=args.ranked, family=FAMILY, responses=2)
    dials = Dials(OptimConfig(lr=1e-3, decay=1.0), rollouts=args.rollouts, beta=0.15)
    for name, method, by, family, count in (("grpo", align.grpo, (judge,), FAMILY, 2000),
                                            ("ppo", align.ppo, (judge,), FAMILY, 2000),
                                            ("exact", align.grpo, (), EXACT, 600)):
        if not done[name]:
            method(tuned, place / name, reward=by, family=family, count=count, policy=dials)
    if not (place / "table.json").exists():
        evaluate(tuned, (trunk, *(place / m for m in METHODS)), args.asked, reward=judge,
                 best_of=args.best_of, sentences=args.sentences, out=place / "table.json")
    told = files.read_json(place / "table.json")
    return {**told, "runs": {Path(name).name: row for name, row in told["runs"].items()}}


COLUMNS = ("width", "run", "macro", *tasks.FAMILIES, "stops", "obeyed", "bits_per_byte",
           "grade", "wins", "wins_low95", "kl_nats", "proxy")


def row(width: int | str, name: str, told: dict) -> tuple:
    """Give a run's row of the table."""
    exact, obeyed = told["exact"], told["obeyed"]  # of what fits the context
    return (width, name, told["macro"],
            *(exact[f]["rate"] if f in exact else None for f in tasks.FAMILIES),
            told["stops"]["rate"], obeyed and obeyed["rate"], told["bits_per_byte"], told["grade"],
            told["wins"]["rate"], told["wins"]["low95"], told["kl_nats"], told["proxy"])


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
