"""What does it change that each key holds a learnt share of the key before it?

question   With and without (2209.11895), at equal tokens and seeds: the held-out loss of a base
           model, and after tuning on generated tasks the loss on held-out answers and exact
           answers about words unseen in training.
command    python experiments/smeared_keys.py --out studies/smeared_keys
cost       9 minutes on two cores
expected   base text .01 nats better or a tie; copying, at 0% without, between 10 and 50%
result     base a tie (4.060 without, 4.063 with); answers 2.38 -> 1.94 nats, copying 0 -> 10.5%,
           recall 0 -> 20.5%: experiments/results/smeared_keys.csv, smeared_keys.json
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from lr_by_width import arguments, guarded, write_table

from tinylm import files, machine
from tinylm.evaluate import suite
from tinylm.look import progress
from tinylm.stages import sft
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import cells, runner
from tinylm.sweep.presets import LAPTOP
from tinylm.text import corpora, prepare
from tinylm.text.shards import Dataset
from tinylm.text.tokenizer import Tokenizer
from tinylm.train import checkpoint

FAMILIES = ("copy", "list", "glossary", "sentence", "choice", "recall")


@dataclass
class Args:
    """Train pairs of runs with and without smeared keys, tune each on tasks; finished runs stay."""

    out: Path
    """folder of the runs"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    width: int = 64
    """D"""
    flops: float = 2e12
    """of each base run"""
    seeds: int = 2
    """of initial parameters and data order, base and tuned"""
    steps: int = 1000
    """of tuning, 16 rows each"""
    tasks: int = 30000
    """generated to tune on"""
    asked: int = 100
    """tasks a family"""
    V: int = LAPTOP.base.V
    """rows of the vocabulary"""
    results: Path | None = None
    """folder for the table and the summary"""


def main(args: Args) -> int:
    """Train, tune and ask all; print the means of both kinds."""
    corpus = corpora.load(args.corpus)
    data, tokenizer = prepare.prepare(args.out / "text", corpus, args.V)
    kinds = {smear: cells.ladder(replace(LAPTOP.base, V=data.V, smear=smear), [args.width])
             for smear in (False, True)}
    bases = [replace(cells.config(cells.cell(args.flops, models[0].shape, LAPTOP.batch), models,
                                  LAPTOP.optim, LAPTOP.rule, LAPTOP.batch, data.id), seed=seed)
             for models in kinds.values() for seed in range(args.seeds)]
    with progress.live("base") as watch:
        records = runner.sweep(args.out / "base", bases, data.folder, watch)
    packed = sft.pack_splits(corpus, tokenizer, LAPTOP.base.T, args.steps, count=args.tasks)
    table = [row(args, config, record, packed, tokenizer, data)
             for config, record in zip(bases, records, strict=True)]
    means = {str(smear): dict(zip(COLUMNS[3:], np.mean([r[3:] for r in table if r[0] == smear],
                                                       axis=0).tolist(), strict=True))
             for smear in kinds}
    for smear, mean in means.items():
        progress.say(f"smear={smear}: " + ", ".join(f"{k} {v:.3f}" for k, v in mean.items()))
    if args.results:
        write_table(args.results / "smeared_keys.csv", COLUMNS, table)
        files.write_json(args.results / "smeared_keys.json", means)
    return 0


COLUMNS = ("smear", "seed", "id", "nats_per_token", "tuned_bits_per_byte",
           "answers_nats_per_token", *FAMILIES)


def row(args: Args, base: PretrainConfig, record: dict, packed: list[sft.Packed],
        tokenizer: Tokenizer, data: Dataset) -> tuple:
    """Tune one base run on tasks and ask it; give its row of the table."""
    place, model = args.out / "base" / cells.name(base), base.model
    config = sft.SftConfig(model, LAPTOP.sft, record["id"], sft.conversations_id(*packed),
                           args.steps, replay=LAPTOP.replay, seed=base.seed, probe_every=0)
    plan = machine.plan_for(config.rows, model.T, model.D, model.compute, *machine.survey())
    with progress.bar(f"tuning {place.name}", args.steps) as event:
        tuned = sft.sft(args.out / "tuned" / place.name, config, place, *packed, data, plan, event)
    params = checkpoint.final_params(args.out / "tuned" / place.name, model)
    told, _ = suite.table_row(suite.SuiteConfig(args.asked), model, params, params, tokenizer)
    return (model.smear, base.seed, record["id"], record["loss"]["nats_per_token"],
            tuned["loss"]["bits_per_byte"], tuned["answers_nats_per_token"]["after"],
            *(told["exact"][name]["rate"] for name in FAMILIES))


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
