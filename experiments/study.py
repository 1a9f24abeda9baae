"""The main job: text -> baselines -> sweep -> law -> forecast -> held-out run -> chat -> alignment.

question   How well does a law fitted to small runs forecast a larger one, on this text?
command    python experiments/study.py --preset laptop --out studies/laptop
cost       laptop: 20 minutes on two cores with AVX-512, more without
expected   the held-out loss within 3% of the forecast
result     +.57, +.85, +1.10, -.40, -.42, +.32, -.28, +.42, +.41, +.05,
           +.15, +.32, +.27, +.10, +.16, -.75, -.73%: experiments/results/forecasts.csv
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tinylm import files, machine

machine.command()

import tyro  # noqa: E402

from tinylm.__main__ import arguments, guarded  # noqa: E402  (JAX must start pinned)
from tinylm.config import BadInput, identity  # noqa: E402
from tinylm.evaluate import baselines, samples  # noqa: E402
from tinylm.laws import forecast  # noqa: E402
from tinylm.laws.plan import cell  # noqa: E402
from tinylm.look import growth, notebook, progress, report  # noqa: E402
from tinylm.model.decoder import ModelConfig  # noqa: E402
from tinylm.stages import sft  # noqa: E402
from tinylm.stages.pretrain import PretrainConfig, pretrain  # noqa: E402
from tinylm.sweep import cells, law, runner  # noqa: E402
from tinylm.sweep.presets import PRESETS, Study  # noqa: E402
from tinylm.sweep.times import stage  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402
from tinylm.text.shards import Dataset  # noqa: E402
from tinylm.text.tokenizer import Tokenizer  # noqa: E402
from tinylm.train import checkpoint  # noqa: E402
from tinylm.verbs import align as verbs  # noqa: E402
from tinylm.verbs.runs import evaluate  # noqa: E402


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
    corpus = corpora.load(args.corpus, args.field)
    progress.say(progress.corpus(corpus))
    with progress.bar("tokens") as event, stage(out, "text"):
        data, tokenizer = prepare.prepare(out / "text", corpus, study.base.V, event, lower=True)
    models = cells.ladder(replace(study.base, V=data.V), study.widths)
    cells.check_tokens(study, models, data)
    lists = cells.lists(study, models, data.id)
    if args.dry_run:
        lists |= cells.expected(study, models, data.id)
        progress.say(progress.listing(progress.expected(lists, data, study.rate)))
        return 0

    with stage(out, "baselines"):
        tables = baselines.measured(out / "baselines.json", data, study.base.T, study.order)
        progress.say(progress.baselines(tables))
        run(out / "position", lists["position"], data)
    with stage(out, "rate check"):
        verdict = checked_rates(out, lists["tuning"], data)
    with stage(out, "sweep"):
        records = run(out / "sweep", lists["sweep"], data)
    with stage(out, "forecast"):
        config = forecasted(out, study, models, data, records, verdict)
    with stage(out, "held-out run"):
        score = held_out(out, config, data)
    with stage(out, "growth"):
        grown(out, records, data)
    with stage(out, "chat"):
        chat(out, study, config, corpus, tokenizer, data)
    if study.policy:
        with stage(out, "alignment"):
            align(out, study)
    with stage(out, "report"):
        progress.say(f"report: {report.write(out)}")
        close(out, score)
    return 0


def checked_rates(out: Path, runs: list[PretrainConfig], data: Dataset) -> list[dict]:
    """Train the rate check, where the study has one, and give its verdict on every size."""
    if not runs:
        return []
    verdict = law.tuning_verdict(run(out / "tuning", runs, data))
    files.write_json(out / "tuning.json", {"sizes": verdict})
    progress.say(progress.tuning(verdict))
    return verdict


def forecasted(out: Path, study: Study, models: list[ModelConfig], data: Dataset,
               records: list[dict], verdict: list[dict]) -> PretrainConfig:
    """Fit the laws, write the forecast down once, and give the held-out run that names it."""
    fitted = law.fit(records)
    files.write_json(out / "law.json", fitted)
    progress.say(progress.law(fitted))
    place = out / "forecast.json"
    best = (cells.nearest(models, forecast.read(place).target_params) if place.exists()
            else cells.best_target(models, fitted, study, data))
    target = cell(study.target, best.shape, study.batch)
    if not place.exists():
        runs, ids, eval_id = law.runs_of(records)
        forecast.write(place, forecast.make(
            runs, ids, target.flops, target.params, target.tokens, eval_id, study.name,
            sigma=law.noise(records), clusters=law.clusters(records), rough=True,
            warning=law.tuning_gate(verdict)))
    sha = files.sha256(place)
    progress.say(progress.forecast(forecast.read(place), sha))
    return replace(cells.config(target, models, study.optim, study.rule, study.batch, data.id),
                   forecast_sha256=sha)


def held_out(out: Path, config: PretrainConfig, data: Dataset) -> forecast.Score:
    """Train the held-out run and score its forecast."""
    with progress.bar("held-out run", config.steps) as event:
        record = pretrain(out / "target", config, data, plan_of(config.rows, config.model), event)
    score = forecast.check(out / "forecast.json", record)
    files.write_json(out / "score.json", score._asdict())
    progress.say(progress.score(score))
    return score


def grown(out: Path, records: list[dict], data: Dataset) -> None:
    """Look into the best run of every budget and the held-out run: what comes with compute."""
    if not (out / "growth.json").exists():
        runs = growth.best(growth.of_study(out, records))
        with progress.bar("growth") as event:
            files.write_json(out / "growth.json", {"rows": growth.ladder(runs, data, event)})


def chat(out: Path, study: Study, config: PretrainConfig, corpus: corpora.Corpus,
         tokenizer: Tokenizer, data: Dataset) -> None:
    """Tune the held-out model on conversations and sample from both."""
    packed = sft.pack_splits(corpus, tokenizer, config.model.T, study.sft_steps,
                             count=study.sft_tasks)
    tuned = sft.SftConfig(config.model, study.sft, identity(config), sft.conversations_id(*packed),
                          study.sft_steps, replay=study.replay, probe_every=400)
    with progress.bar("instruction tuning", study.sft_steps) as event:
        sft.sft(out / "chat", tuned, out / "target", *packed, data,
                plan_of(tuned.rows, tuned.model), event)
    pair = [checkpoint.final_params(out / name, config.model) for name in ("target", "chat")]
    samples.write(out / "samples.json", config.model, *pair, tokenizer)


def align(out: Path, study: Study) -> None:
    """Rank the chat model's own answers, optimise it, and put all models into one table."""
    chat, family = out / "chat", (study.family,)
    try:
        if not (out / "reward/record.json").exists():
            verbs.reward(chat, out / "reward", sampled=study.ranked, family=family)
        if not (out / "policy/record.json").exists():
            verbs.grpo(chat, out / "policy", reward=(out / "reward",), family=family,
                       policy=study.policy)
        if not (out / "alignment.json").exists():
            evaluate(chat, (out / "target", out / "policy"), study.asked,
                     out=out / "alignment.json")
    except (BadInput, SystemExit) as why:  # a model that answers nothing right has no preferences
        progress.say(f"no further than this with alignment: {why}")


def close(out: Path, score: forecast.Score) -> None:
    """Append to the ledger and execute the notebook; where that fails, the study is done still."""
    try:
        forecast.append_to_ledger(out.resolve().parent / "forecasts.csv", score)
    except (OSError, BadInput) as fault:
        progress.say(f"the score is in {out / 'score.json'} and in no ledger: {fault}")
    if book := notebook.execute(Path(__file__).parents[1] / "notebooks/study.py", out):
        progress.say(f"notebook: {book}")


def plan_of(rows: int, model: ModelConfig) -> machine.Plan:
    """Plan a run that has the machine to itself."""
    return machine.plan_for(rows, model.T, model.D, model.compute, *machine.survey())


def run(folder: Path, configs: list[PretrainConfig], data: Dataset) -> list[dict]:
    """Run a list of configs with a live table."""
    with progress.live(folder.name) as watch:
        records = runner.sweep(folder, configs, data.folder, watch)
    if len(records) < len(configs):
        progress.say(f"{folder}: {len(configs) - len(records)} of {len(configs)} runs failed; "
                     "each failure.json says why")
    return records


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
