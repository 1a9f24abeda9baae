"""Would the held-out run have met its forecast with another depth or batch?

question   The pilot's registered forecast missed by 1.85%. Its run had L=4 where its sweep's best
           had L=2 and 3, and kept the sweep's batch at five times the compute. Our study keeps one
           depth and batch, and errs by less than .5%. Trained in its place, at its FLOPs and as
           near to its parameters as the ladder comes: another seed, other depths, larger batches.
command    python experiments/held_out_choices.py --out studies/choices \\
               --results experiments/results
cost       about 15 minutes on two cores
expected   4 layers cost 1% or more; batches nothing
result     experiments/LOG.md, "The pilot's miss, by experiment"
"""

import csv
import io
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from tinylm import files, machine

machine.command()

from tinylm.__main__ import arguments, guarded  # noqa: E402  (JAX must start pinned)
from tinylm.config import BadInput, from_json  # noqa: E402
from tinylm.laws.blend import Target, blend  # noqa: E402
from tinylm.laws.plan import cell  # noqa: E402
from tinylm.look import progress  # noqa: E402
from tinylm.stages.pretrain import PretrainConfig  # noqa: E402
from tinylm.sweep import cells, law, runner  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402

LAPTOP = Path(__file__).parent / "results" / "laptop"


@dataclass
class Args:
    """Train the held-out run in other ways; finished runs are kept."""

    out: Path
    """folder of the runs"""
    results: Path | None = None
    """folder for the record, held_out_choices.csv"""
    study: Path = LAPTOP
    """folder of a finished study: its sweep forecasts, its held-out run is varied"""
    corpus: tuple[str, ...] = ()
    """the study's text files; none: the default corpus"""
    depths: tuple[int, ...] = (1, 4)
    """layers, each at the size nearest to the held-out run's"""
    batches: tuple[int, ...] = (1024, 2048)
    """tokens a step; the rate grows as the root of the batch"""
    seeds: tuple[int, ...] = (1,)
    """of the run as it was"""


def main(args: Args) -> int:
    """Train every way, forecast each one's own size, and print the table."""
    held = read(args.study / "target/record.json")
    records = [read(p) for p in sorted(args.study.glob("sweep/*/record.json"))]
    config = from_json(PretrainConfig, held["config"], "config")
    data, _ = prepare.prepare(args.out / "text", corpora.load(args.corpus), config.model.V,
                              lower=True)
    if data.id != config.data_id:
        raise BadInput(f"the text is {data.id} and the study's is {config.data_id}; give the "
                       "study's --corpus")
    ways = {"seed 0": config} | choices(config, held, args)
    with progress.live("other ways") as watch:
        made = runner.sweep(args.out / "runs", [c for n, c in ways.items() if n != "seed 0"],
                            data.folder, watch)
    joined = blend(law.runs_of(records)[0])
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("way", "layers", "width", "batch", "lr", "params", "flops", "nats_per_token",
                    "stderr", "forecast", "error_percent", "id"))
    for way, r in zip(ways, [held, *made], strict=True):
        c, loss = r["config"], r["loss"]["nats_per_token"] if r["loss"] else math.nan
        params = r["params"]["head"] + r["params"]["blocks"]
        told = joined.predicted(Target(r["flops"]["exact"], params, r["tokens"]))
        table.writerow((way, c["model"]["L"], c["model"]["D"], c["batch"], c["optim"]["lr"],
                        params, f"{r['flops']['exact']:.5g}", f"{loss:.5f}",
                        f"{r['loss']['stderr']:.5f}" if r["loss"] else "", f"{told:.5f}",
                        f"{100 * math.log(told / loss):+.3f}", r["id"]))
    print(text.getvalue(), end="")
    if args.results:
        files.write_text(args.results / "held_out_choices.csv", text.getvalue())
    return 0


def read(place: Path) -> dict:
    """Read a record; the committed ones are older than their seals."""
    if not place.exists():
        raise BadInput(f"{place} is missing; give --study a finished study")
    return json.loads(place.read_text("utf-8"))


def choices(config: PretrainConfig, held: dict, args: Args) -> dict[str, PretrainConfig]:
    """Give the held-out run's other ways, none of which was forecast by name."""
    base = replace(config, forecast_sha256="")
    flops, params = held["flops"]["exact"], held["params"]["head"] + held["params"]["blocks"]
    out = {f"seed {seed}": replace(base, seed=seed) for seed in args.seeds}
    for L in args.depths:
        shaped = replace(config.model, L=L)
        model = cells.nearest(cells.ladder(shaped, range(32, 4 * config.model.D, 8)), params)
        out[f"{L} layers"] = replace(base, model=model,
                                     steps=cell(flops, model.shape, base.batch).steps)
    for batch in args.batches:
        rate = base.optim.lr * math.sqrt(batch / base.batch)
        out[f"batch {batch}"] = replace(base, batch=batch, optim=replace(base.optim, lr=rate),
                                        steps=cell(flops, base.model.shape, batch).steps)
    return out


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
