"""The main job: text -> tokenizer -> baselines -> sweep -> law -> forecast -> held-out run -> chat.

question   How well does a law fitted to small runs forecast a larger one, on this text?
command    python experiments/study.py --preset laptop --out studies/laptop
cost       laptop: 21 to 54 minutes on two cores (both measured on shared machines)
expected   the held-out loss within 3% of the forecast
result     +0.57%, +0.85%, +1.10%, -0.40%, -0.42%: experiments/results/forecasts.csv, laptop/
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tinylm import files, machine

machine.command()

import tyro  # noqa: E402

from tinylm.__main__ import arguments, guarded  # noqa: E402  (JAX must start pinned)
from tinylm.config import BadInput  # noqa: E402
from tinylm.evaluate import baselines, samples  # noqa: E402
from tinylm.laws import forecast  # noqa: E402
from tinylm.laws.plan import cell  # noqa: E402
from tinylm.look import notebook, progress, report  # noqa: E402
from tinylm.stages import sft as stage  # noqa: E402
from tinylm.stages.pretrain import pretrain  # noqa: E402
from tinylm.sweep import cells, law, runner  # noqa: E402
from tinylm.sweep.presets import PRESETS  # noqa: E402
from tinylm.sweep.trunks import shared  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402


@dataclass
class Args:
    """Run a whole study; the same command again goes on where it was stopped."""

    out: Path
    """folder of the study"""
    preset: Literal["smoke", "laptop", "overnight", "accelerator"] = "laptop"
    """which budgets"""
    corpus: tuple[str, ...] = ()
    """.txt, .jsonl or .parquet files, plain or .gz/.bz2/.xz; none: the default corpus"""
    field: str = "text"
    """the text field of .jsonl and .parquet rows"""
    dry_run: bool = False
    """print every run of the sweep and stop"""


def main(args: Args) -> int:
    """Do every stage that is not done yet, in order."""
    study, out = PRESETS[args.preset], args.out
    say = progress.say
    corpus = corpora.load(args.corpus, args.field)
    say(progress.corpus(corpus))
    with progress.bar("tokens") as event:
        data, tokenizer = prepare.prepare(out / "text", corpus, study.base.V, event, lower=True)
    base = replace(study.base, V=data.V)

    models = cells.ladder(base, study.widths)
    cells.check_tokens(study, models, data)
    plan_cells = cells.grid(models, study.budgets, study.per_budget, study.spread, study.batch)
    grid = [cells.config(c, models, study.optim, study.rule, study.batch, data.id)
            for c in plan_cells]
    grid = shared(grid, study.rule) if study.trunks else grid
    tuning = cells.tuning(study, models, data.id)
    position = [cells.position(study, base, data.id)]
    if args.dry_run:
        runs = {"tuning": tuning, "position": position, "sweep": grid}
        runs |= cells.expected(study, models, data.id)
        say(progress.listing(progress.expected(runs, data, study.rate)))
        return 0

    tables = baselines.measured(out / "baselines.json", data, base.T, study.order)
    say(progress.baselines(tables))
    verdict = []
    if tuning:
        verdict = law.tuning_verdict(run(out / "tuning", tuning, data))
        files.write_json(out / "tuning.json", {"sizes": verdict})
        say(progress.tuning(verdict))
    run(out / "position", position, data)
    records = run(out / "sweep", grid, data)

    fitted = law.fit(records)
    files.write_json(out / "law.json", fitted)
    say(progress.law(fitted))
    runs, ids, eval_id = law.runs_of(records)
    place = out / "forecast.json"
    best = (cells.nearest(models, forecast.read(place).target_params) if place.exists()
            else cells.best_target(models, fitted, study, data))
    target = cell(study.target, best.shape, study.batch)
    if not place.exists():
        forecast.write(place, forecast.make(
            runs, ids, target.flops, target.params, target.tokens, eval_id, study.name,
            rough=True, warning=law.tuning_gate(verdict)))
    sha = files.sha256(place)
    say(progress.forecast(forecast.read(place), sha))

    config = replace(cells.config(target, models, study.optim, study.rule, study.batch, data.id),
                     forecast_sha256=sha)
    backend, (T, D) = machine.survey(), (config.model.T, config.model.D)
    plan = machine.plan_for(config.rows, T, D, *backend)
    with progress.bar("held-out run", config.steps) as event:
        record = pretrain(out / "target", config, data, plan, event)
    score = forecast.check(place, record)
    files.write_json(out / "score.json", score._asdict())
    say(progress.score(score))

    packed = stage.pack_splits(corpus, tokenizer, base.T, study.sft_steps)
    tuned = stage.SftConfig(config.model, study.sft, record["id"],
                            stage.conversations_id(*packed), study.sft_steps)
    plan = machine.plan_for(tuned.rows, T, D, *backend)
    with progress.bar("instruction tuning", study.sft_steps) as event:
        stage.sft(out / "chat", tuned, out / "target", *packed, data, plan, event)
    pair = [stage.load_params(out / name, config.model) for name in ("target", "chat")]
    samples.write(out / "samples.json", config.model, *pair, tokenizer)
    say(f"report: {report.write(out)}")
    try:
        forecast.append_to_ledger(out.resolve().parent / "forecasts.csv", score)
    except (OSError, BadInput) as fault:
        say(f"the score is in {out / 'score.json'} and in no ledger: {fault}")
    if book := notebook.execute(Path(__file__).parents[1] / "notebooks/study.py", out):
        say(f"notebook: {book}")
    return 0


def run(folder: Path, configs: list, data) -> list:
    """Run a list of configs with a live table."""
    with progress.live(folder.name) as watch:
        records = runner.sweep(folder, configs, data.folder, watch)
    wanted = sum(c.kind != "trunk" for c in configs)
    if len(records) < wanted:
        progress.say(f"{folder}: {wanted - len(records)} of {wanted} runs failed; "
                     "each failure.json says why")
    return records


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
