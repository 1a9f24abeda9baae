"""The verbs of the command line: each a thin call of library functions with the same defaults."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional

from tinylm import files, machine
from tinylm.config import BadInput, from_json, require
from tinylm.evaluate import heldout
from tinylm.laws import accounting, table
from tinylm.laws import forecast as forecasts
from tinylm.laws import plan as planning
from tinylm.laws.fit import Estimator
from tinylm.laws.plan import cell
from tinylm.look import progress
from tinylm.model import generate
from tinylm.model.decoder import ModelConfig
from tinylm.stages import pretrain
from tinylm.stages import sft as tuning
from tinylm.sweep import cells, law, runner
from tinylm.sweep.presets import RateRule
from tinylm.text import corpora, prepare
from tinylm.text.chat import pack, read_jsonl, render
from tinylm.text.shards import Dataset, open_dataset
from tinylm.text.tokenizer import BOS, Tokenizer
from tinylm.train import run
from tinylm.train.optim import OptimConfig

NOTES = ("config.json", "plan.json", "record.json", "failure.json", "environment.json",
         "sweep.json", "tuning.json", "baselines.json", "law.json", "forecast.json", "score.json",
         "samples.json")
"""the files that a run, a sweep and a study leave outside sealed folders"""


def tokenizer(out: Path, corpus: tuple[str, ...] = (), field: str = "text", V: int = 1024,
              text: str = "", json: bool = False) -> None:
    """Train a tokenizer and token files in OUT, or show how they cut TEXT.

    Args:
        out: folder for the tokenizer and the token files
        corpus: .txt, .jsonl or .parquet files, plain or .gz/.bz2/.xz; none: the default corpus
        field: the text field of .jsonl and .parquet rows
        V: rows of the vocabulary
        text: a text to cut into pieces
        json: print one JSON object on the last line
    """
    if text:
        learnt = prepare.open_tokenizer(out)
        ids = learnt.encode(text)
        shown = {"pieces": [learnt.piece(int(i)) for i in ids], "ids": ids.tolist()}
        _out(shown, json, " | ".join(shown["pieces"]))
        return
    data, learnt = _prepared(out, corpus, field, V)
    _out({"V": learnt.V, "id": learnt.id, "data_id": data.id, **data.facts["counts"]}, json,
         f"V={learnt.V}, {data.bytes_per_token:.3f} bytes a token, id {learnt.id}")


def train(out: Path, corpus: tuple[str, ...] = (), field: str = "text", text: Path | None = None,
          model: ModelConfig = ModelConfig(), optim: OptimConfig = OptimConfig(),  # noqa: B008
          steps: int = 1000, batch: int = 512, seed: int = 0, devices: int = 0,
          forecast: Path | None = None, json: bool = False) -> None:
    """Pretrain one model and evaluate it; the same command again goes on or shows the result.

    Args:
        out: folder of the run
        corpus: .txt, .jsonl or .parquet files, plain or .gz/.bz2/.xz; none: the default corpus
        field: the text field of .jsonl and .parquet rows
        text: a prepared folder to use instead of a corpus
        model: the shape; D is the dial
        optim: AdamW and its schedule
        steps: optimiser steps
        batch: tokens a step
        seed: of the parameters and the order of the data
        devices: to split a batch over; 0 means all that divide it
        forecast: a forecast file that this run tests
        json: print the record on the last line
    """
    pretrain.PretrainConfig(model, optim, steps, batch)  # refuse impossible shapes before reading
    data, _ = _prepared(text or out / "text", corpus, field, model.V, reuse=text is not None)
    target = forecasts.read(forecast).target_flops if forecast else 0.0
    sha = files.sha256(forecast) if forecast else ""
    config = pretrain.PretrainConfig(model, optim, steps, batch, seed, data.id, sha)
    if target and abs(config.flops / target - 1) > 0.01:
        raise BadInput(f"this run takes {config.flops:.4g} FLOPs and {forecast} is for "
                       f"{target:.4g}; choose the D and steps that `tinylm forecast` printed")
    plan = _plan(out, config.rows, config.model, devices)
    with progress.bar("train", steps) as event:
        record = pretrain.pretrain(out, config, data, plan, event)
    _out(record, json, progress.result(record))
    if record["status"] != "ok":
        raise SystemExit(1)


def sweep(out: Path, budgets: tuple[float, ...], widths: tuple[int, ...],
          corpus: tuple[str, ...] = (), field: str = "text", text: Path | None = None,
          model: ModelConfig = ModelConfig(), optim: OptimConfig = OptimConfig(),  # noqa: B008
          rule: RateRule = RateRule(), per_budget: int = 7, spread: float = 4.0,  # noqa: B008
          batch: int = 512, seed: int = 0, dry_run: bool = False, json: bool = False) -> None:
    """Train an isoFLOP grid: for each budget the widths around its expected best size.

    Args:
        out: folder of the sweep
        budgets: training FLOPs of each curve
        widths: the ladder of D
        corpus: text files; none: the default corpus
        field: the text field of .jsonl and .parquet rows
        text: a prepared folder to use instead of a corpus
        model: what the ladder leaves as it is
        optim: AdamW and its schedule; the rule sets its rate
        rule: the learning rate by training tokens
        per_budget: sizes a budget
        spread: sizes lie within this factor of the expected best
        batch: tokens a step
        seed: of every run
        dry_run: print every run with its cost and stop
        json: print the records on the last line
    """
    data, _ = _prepared(text or out / "text", corpus, field, model.V, reuse=text is not None)
    models = cells.ladder(model, widths)
    chosen = cells.grid(models, budgets, per_budget, spread, batch)
    runs = [cells.config(c, models, optim, rule, batch, data.id, seed) for c in chosen]
    if dry_run:
        progress.say(progress.listing(runs, data, 1e11))
        return
    for one in runs:
        pretrain.check(one, data, machine.Plan())
    with progress.live("sweep") as watch:
        records = runner.sweep(out / "runs", runs, data.folder, watch)
    failed = len(runs) - sum(r["status"] == "ok" for r in records)
    _out({"runs": records, "failed": failed}, json, f"{len(runs) - failed} runs ok, {failed} not")
    if failed:
        raise SystemExit(1)


def fit(runs: Positional[Path], form: table.Form = "chinchilla",
        objective: Estimator = "huber", delta: float = 1e-3, ceiling: float = 0.0,
        params_col: str = "", tokens_col: str = "", flops_col: str = "", loss_col: str = "",
        unique_col: str = "", drop_worst: int = 0, bootstrap: int = 0, compare: bool = False,
        json: bool = False) -> None:
    """Fit every law to a sweep's folder, or one law to any CSV of runs; or rank the laws.

    Args:
        runs: folder whose subfolders are runs, or a CSV with loss and two of params, tokens, flops
        form: the law to fit to a CSV
        objective: huber or lad of log loss, or ls of the loss
        delta: log loss at which huber turns from square to absolute
        ceiling: nats at which the saturating law levels off, such as ln V
        params_col: the CSV's name for parameters
        tokens_col: the CSV's name for training tokens
        flops_col: the CSV's name for training FLOPs
        loss_col: the CSV's name for the loss
        unique_col: the CSV's name for different tokens, for data-constrained
        drop_worst: leave out this many of the largest losses
        bootstrap: refits to resampled runs, for standard deviations
        compare: rank the laws by their forecasts from below to above a cut of compute
        json: print the fit on the last line
    """
    if runs.is_dir() and not compare:
        fitted = law.fit(_records(runs))
        _out(fitted, json, progress.law(fitted))
        return
    columns = {"params": params_col, "tokens": tokens_col, "flops": flops_col, "loss": loss_col,
               "unique": unique_col}
    found, dropped = ((law.runs_of(_records(runs))[0], []) if runs.is_dir() else
                      table.cleaned(runs, {k: v for k, v in columns.items() if v}, drop_worst))
    if compare:
        ranked = table.compare(found, objective, delta, ceiling)
        _out({"dropped": dropped, "ranked": ranked}, json, progress.ranked(ranked, dropped))
        return
    told = table.told(table.fit_form(found, form, objective, delta, ceiling), bootstrap)
    _out({"form": form, "estimator": objective, "dropped": dropped, **told}, json,
         progress.fitted(told, dropped))


def forecast(runs: Positional[Path], flops: float, out: Path, D: int = 0, batch: int = 512,
             tuning: Path | None = None, json: bool = False) -> None:
    """Write down the loss to expect of a larger run, before it is trained.

    Args:
        runs: folder whose subfolders are the runs of a sweep
        flops: training FLOPs of the target
        out: the forecast file to write, never overwritten
        D: width of the target; 0 takes the best by the fitted exponents
        batch: tokens a step
        tuning: folder of runs of the same sizes at several learning rates
        json: print the forecast on the last line
    """
    require("flops", flops, 1e6, 1e30)
    records = _records(runs)
    table, ids, eval_id = law.runs_of(records)
    base = from_json(ModelConfig, records[0]["config"]["model"], "model")
    widths = [D] if D else range(base.H * 2, 64 * base.H * 2, base.H * 2)
    best = cells.nearest(cells.ladder(base, widths), cells.best_params(law.fit(records), flops))
    target = cell(flops, best.shape, batch)
    gate = law.tuning_gate(law.tuning_verdict(_records(tuning)) if tuning else [])
    made = forecasts.make(table, ids, target.flops, target.params, target.tokens, eval_id,
                          warning=gate)
    sha = forecasts.write(out, made)
    how = f"train it: tinylm train --model.D {best.D} --steps {target.steps} --forecast {out}"
    _out({"sha256": sha, "D": best.D, "steps": target.steps, "predicted": made.predicted,
          "low": made.low, "high": made.high, "coverage": made.coverage,
          "warning": made.warning}, json, f"{progress.forecast(made, sha)}\n{how}")


def plan(flops: float, device: str = "H200", dollars_per_hour: float = 0.0,
         utilisation: float = 0.4, model: ModelConfig = ModelConfig(),  # noqa: B008
         per_budget: int = 7, spread: float = 4.0, batch: int = 512, noise: float = 0.003,
         json: bool = False) -> None:
    """Plan a sweep and the larger run it forecasts: cells, precision to expect, time and cost.

    Args:
        flops: training FLOPs of all runs together
        device: by its maker's sheet: V100, A100, H100, H200 or TPU v4
        dollars_per_hour: of one device
        utilisation: share of the device's peak
        model: what the ladder of widths leaves as it is
        per_budget: sizes a budget
        spread: sizes lie within this factor of the expected best
        batch: tokens a step
        noise: a run's standard deviation as a share of its loss
        json: print the plan on the last line
    """
    require("flops", flops, 1e9, 1e30)
    known = {d.name: d for d in accounting.DEVICES}
    if device not in known:
        raise BadInput(f"device={device} is not known; choose one of {', '.join(known)}")
    widths = np.unique(np.round(np.geomspace(2 * model.H, 1e5, 300) / 2 / model.H)) * 2 * model.H
    shapes = [m.shape for m in cells.ladder(model, widths.astype(int).tolist())]
    made = planning.propose(flops, shapes, known[device], per_budget, spread, batch,
                            noise=noise, dollars_per_hour=dollars_per_hour,
                            utilisation=utilisation)
    told = {"cells": [{**c._asdict(), "shape": c.shape._asdict()} for c in made.cells],
            "target": {**made.target._asdict(), "shape": made.target.shape._asdict()},
            "expected": {**made.expected._asdict(), "form_risk": made.expected.form_risk},
            "sweep": made.sweep._asdict(), "run": made.run._asdict()}
    _out(told, json, progress.planned(made, device))


def check(forecast: Positional[Path], target: Positional[Path],
          ledger: Path | None = None, json: bool = False) -> None:
    """Score a forecast against the run that names it.

    Args:
        forecast: the forecast file
        target: folder of the run that was trained with --forecast
        ledger: a CSV to append the score to
        json: print the score on the last line
    """
    score = forecasts.check(forecast, _finished(target))
    if ledger:
        forecasts.append_to_ledger(ledger, score)
    _out(score._asdict(), json, progress.score(score))


def sft(parent: Positional[Path], out: Path, data: tuple[Path, ...] = (),
        corpus: tuple[str, ...] = (), field: str = "text", text: Path | None = None,
        optim: OptimConfig = OptimConfig(lr=1e-3, decay=1.0),  # noqa: B008
        steps: int = 400, rows: int = 16, seed: int = 0, json: bool = False) -> None:
    """Tune a finished run on conversations, with the loss on what the assistant says.

    Args:
        parent: folder of the run to tune
        out: folder of the new run
        data: .jsonl files of {"messages": [{"role", "content"}, ...]}; none: the corpus's own
        corpus: text files to take conversations from where there is no data; none: the default
        field: the text field of .jsonl and .parquet rows
        text: the prepared folder of the parent, where it has moved
        optim: AdamW and its schedule
        steps: optimiser steps
        rows: packed rows a step
        seed: of the order of the rows
        json: print the record on the last line
    """
    config, tokens, learnt = _opened(parent, text)
    packed = _conversations(data, corpus, field, learnt, config.T)
    wanted = tuning.SftConfig(config, optim, _finished(parent)["id"],
                              tuning.conversations_id(*packed), steps, rows, seed)
    with progress.bar("sft", steps) as event:
        record = tuning.sft(out, wanted, parent, *packed, tokens, _plan(out, rows, config), event)
    _out(record, json, progress.result(record))


def evaluate(target: Positional[Path], text: Path | None = None, json: bool = False) -> None:
    """Measure the held-out loss of a finished run, by part of the corpus.

    Args:
        target: folder of the run
        text: a prepared folder with the run's tokenizer; none: the run's own
        json: print the losses on the last line
    """
    config, tokens, _ = _opened(target, text)
    found = heldout.heldout(config, tuning.load_params(target, config), tokens)
    _out({**found._asdict(), "eval_id": heldout.eval_id(tokens, config.T)}, json,
         f"{found.nats_per_token:.4f} nats a token (se {found.stderr:.4f}), "
         f"{found.bits_per_byte:.4f} bits a byte, {found.tokens} tokens")


def sample(target: Positional[Path], prompt: str = "", count: int = 100, seed: int = 0,
           temperature: float = 0.8, text: Path | None = None) -> None:
    """Continue a text with a finished run, streaming to stdout.

    Args:
        target: folder of the run
        prompt: the text to continue
        count: new tokens at most
        seed: of the draws
        temperature: 0 takes the likeliest token each time
        text: the prepared folder of the run, where it has moved
    """
    config, _, learnt = _opened(target, text)
    ids = np.concatenate([[BOS], learnt.encode(prompt)])
    _stream(target, config, learnt, ids, count, seed, temperature)


def chat(target: Positional[Path], prompt: str = "", system: str = "", seed: int = 0,
         temperature: float = 0.8, text: Path | None = None) -> None:
    """Talk to a base or chat checkpoint; an empty line or end of input leaves.

    A base checkpoint continues the talk as plain lines; a tuned one gets the template.

    Args:
        target: folder of the run
        prompt: one message, instead of a talk
        system: a system prompt, for tuned checkpoints
        seed: of the draws
        temperature: 0 takes the likeliest token each time
        text: the prepared folder of the run, where it has moved
    """
    config, _, learnt = _opened(target, text)
    tuned = _finished(target)["kind"] != "pretrain"
    said: list[tuple[str, str]] = []
    for message in [prompt] if prompt else _typed():
        said.append(("user", message))
        ids, said = _prompt(said, system, learnt, config.T, tuned)
        try:
            answer = _stream(target, config, learnt, ids, config.T, seed + len(said), temperature)
        except BadInput as refusal:
            if prompt:
                raise
            progress.say(f"error: {refusal}")
            said.pop()
            continue
        said.append(("assistant", answer))


def bench(what: Positional[Literal["machine", "train", "decode"]],
          shapes: tuple[str, ...] = ("s", "m", "l", "xl"), models: int = 1, rounds: int = 5,
          json: bool = False) -> None:
    """Time this machine's matrix products, training or decoding.

    Args:
        what: machine is the ceiling that the others are held against
        shapes: s, m, l or xl (tinylm/bench.py)
        models: for train: 1 model over all devices, or so many pinned processes with one each
        rounds: the median is over these, taken in turn
        json: print the record on the last line
    """
    from tinylm import bench as timed

    match what:
        case "machine":
            found = timed.peak(rounds)
        case "train":
            found = timed.train(shapes, models, rounds)
        case "decode":
            found = timed.generation(shapes, rounds=rounds)
    _out(found, json, progress.benched(found))


def report(study: Positional[Path]) -> None:
    """Write the report of a study again from its records.

    Args:
        study: folder of the study
    """
    from tinylm.look import report as reports  # its plots take a second to import

    if not (study / "law.json").exists():
        raise BadInput(f"{study} is no study (no law.json); give a folder that study.py filled")
    print(reports.write(study))


def verify(path: Positional[Path], json: bool = False) -> None:
    """Check every manifest and record below a folder and name each bad file.

    Args:
        path: a run, a sweep, a prepared folder or a whole study
        json: print what was found on the last line
    """
    sealed = sorted(p.parent for p in path.rglob(files.MANIFEST))
    notes = sorted(p for name in NOTES for p in path.rglob(name))
    if not sealed and not notes:
        raise BadInput(f"{path} holds nothing that tinylm sealed; give a run, text or study folder")
    bad = [problem for folder in sealed for problem in files.problems(folder)]
    for note in notes:
        try:
            listed = files.read_json(note).get("files", {})
        except files.Damaged as damage:
            bad.append(str(damage))
            continue
        bad += [f"{note.parent / name} has other bytes than its record says"
                for name, sha in listed.items()
                if not (note.parent / name).exists() or files.sha256(note.parent / name) != sha]
    _out({"checked": len(sealed) + len(notes), "bad": bad}, json,
         "\n".join(bad) or f"{len(sealed)} sealed folders and {len(notes)} notes are sound")
    if bad:
        raise SystemExit(1)


def _prepared(folder: Path, corpus: tuple[str, ...], field: str, V: int,
              reuse: bool = False) -> tuple[Dataset, Tokenizer]:
    if reuse:
        if corpus:
            raise BadInput(f"--text {folder} and --corpus {corpus[0]} are two sources; give one")
        return open_dataset(folder / "tokens"), prepare.open_tokenizer(folder)
    loaded = corpora.load(corpus, field)
    progress.say(progress.corpus(loaded))
    with progress.bar("tokens") as event:
        return prepare.prepare(folder, loaded, V, event)


def _plan(out: Path, rows: int, model: ModelConfig, devices: int = 0) -> machine.Plan:
    if (bound := run.planned(out)) is not None:
        return bound
    return machine.plan_for(rows, model.T, model.D, *machine.survey(), devices)


def _records(folder: Path) -> list[dict[str, Any]]:
    found = run.table(sorted(p.parent for p in folder.rglob("record.json")))
    found = [r for r in found if r["kind"] == "pretrain"]
    if not found:
        raise BadInput(f"{folder} holds no finished runs; give the folder of a sweep")
    return found


def _finished(folder: Path) -> dict[str, Any]:
    record = run.record(folder)
    if record is None:
        raise BadInput(f"{folder} is no finished run (no record.json); train it first")
    return record


def _opened(folder: Path, text: Path | None) -> tuple[ModelConfig, Dataset, Tokenizer]:
    """Open a finished run's model config, token files and tokenizer."""
    record = _finished(folder)
    link = files.read_json(folder / "environment.json").get("text", "")
    place = text or Path(os.path.normpath(folder.absolute() / link))
    if not (place / "tokenizer").exists():
        raise BadInput(f"{place} holds no tokenizer; give the run's prepared folder with --text")
    learnt = prepare.open_tokenizer(place)
    if learnt.id != record["tokenizer_id"]:
        raise BadInput(f"{place} has tokenizer {learnt.id}, the run {record['tokenizer_id']}; "
                       "give the prepared folder it was trained on with --text")
    model = from_json(ModelConfig, record["config"]["model"], "model")
    return model, open_dataset(place / "tokens"), learnt


def _conversations(data, corpus, field, learnt, T):
    if not data:
        loaded = corpora.load(corpus, field)
        return [tuning.pack_corpus(split, learnt, T) for split in (loaded.train, loaded.heldout)]
    talks = [messages for path in data for messages in read_jsonl(path)]
    held = talks[::25] if len(talks) > 1 else []
    kept = [t for n, t in enumerate(talks) if n % 25] if held else talks
    return [pack([render(t, learnt) for t in part], T) for part in (kept, held)]


def _prompt(said, system, learnt, T, tuned):
    """Render the talk, forgetting its oldest turns until half the context is left to answer."""
    while True:
        if tuned:
            head = [("system", system)] if system else []
            ids = render([*head, *said], learnt, prompt=True)[0]
        else:
            ids = np.concatenate([[BOS], learnt.encode("\n".join(t for _, t in said) + "\n")])
        if len(ids) <= T // 2 or len(said) == 1:
            return ids, said
        said = said[2:]


def _typed() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _stream(folder, config, learnt, ids, count, seed, temperature) -> str:
    params = tuning.load_params(folder, config)
    made, shown = [], ""
    for part in generate.stream(config, params, ids, count, seed, temperature):
        made += part.tolist()
        whole = learnt.decode(made)
        sure = whole.rstrip("\ufffd")  # the end may be inside a character
        print(sure[len(shown):], end="", flush=True)
        shown = sure
    print(flush=True)
    return shown


def _out(value: dict[str, Any], as_json: bool, words: str) -> None:
    """Show the result to a person, or as one JSON object on the last line of stdout."""
    if as_json:
        print(json.dumps(value))
    else:
        print(words)


VERBS = {"tokenizer": tokenizer, "train": train, "sweep": sweep, "fit": fit, "forecast": forecast,
         "plan": plan, "check": check, "sft": sft, "eval": evaluate, "sample": sample, "chat": chat,
         "bench": bench, "report": report, "verify": verify}
