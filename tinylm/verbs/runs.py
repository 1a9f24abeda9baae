"""Verbs that prepare text, train and measure: tokenizer, train, sweep, sft, eval."""

import os
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tinylm import files, machine
from tinylm.config import BadInput, require
from tinylm.evaluate import heldout, minimal_pairs, suite
from tinylm.laws import forecast as forecasts
from tinylm.look import alignment, progress
from tinylm.model.decoder import ModelConfig
from tinylm.stages import pretrain
from tinylm.stages import sft as tuning
from tinylm.sweep import cells, runner
from tinylm.sweep.presets import RateRule
from tinylm.sweep.trunks import saved, shared
from tinylm.text import corpora, prepare
from tinylm.text.chat import pack, read_jsonl, render
from tinylm.train import checkpoint
from tinylm.train.optim import OptimConfig
from tinylm.verbs import folders, models


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
        progress.answer(shown, json, " | ".join(shown["pieces"]))
        return
    data, learnt = folders.prepared(out, corpus, field, V)
    told = {"V": learnt.V, "id": learnt.id, "data_id": data.id, **data.facts["counts"]}
    words = f"V={learnt.V}, {data.bytes_per_token:.3f} bytes a token, id {learnt.id}"
    progress.answer(told, json, words)


def train(out: Path, corpus: tuple[str, ...] = (), field: str = "text", text: Path | None = None,
          model: ModelConfig = ModelConfig(), optim: OptimConfig = OptimConfig(),  # noqa: B008
          steps: int = 1000, batch: int = 512, seed: int = 0, devices: int = 0,
          keep: tuple[int, ...] = (), forecast: Path | None = None, json: bool = False) -> None:
    """Pretrain one model and evaluate it; the same command again goes on or shows the result.

    Args:
        out: folder of the run
        corpus: .txt, .jsonl or .parquet files, plain or .gz/.bz2/.xz; none: the default corpus
        field: the text field of .jsonl and .parquet rows
        text: a prepared folder to use instead of a corpus
        model: the shape; D is the dial
        optim: the optimiser and its schedule
        steps: optimiser steps
        batch: tokens a step
        seed: of the parameters and the order of the data
        devices: to split a batch over; 0 means all that divide it
        keep: steps whose checkpoints stay, to look at afterwards
        forecast: a forecast file that this run tests
        json: print the record on the last line
    """
    pretrain.PretrainConfig(model, optim, steps, batch)  # refuse impossible shapes before reading
    pretrain.check_memory(model)
    for step in keep:
        require("keep", step, 1, steps)
    data, _ = folders.prepared(text or out / "text", corpus, field, model.V, reuse=text is not None)
    target = forecasts.read(forecast).target_flops if forecast else 0.0
    sha = files.sha256(forecast) if forecast else ""
    config = pretrain.PretrainConfig(model, optim, steps, batch, seed, data.id, sha)
    if target and abs(config.flops / target - 1) > 0.01:
        raise BadInput(f"this run takes {config.flops:.4g} FLOPs and {forecast} is for "
                       f"{target:.4g}; choose the D and steps that `tinylm forecast` printed")
    plan = folders.plan_of(out, config.rows, model.shape, model.compute, devices, keep)
    with progress.bar("train", steps) as event:
        record = pretrain.pretrain(out, config, data, plan, event)
    progress.outcome(record, json, progress.result(record))


def sweep(out: Path, budgets: tuple[float, ...], widths: tuple[int, ...],
          corpus: tuple[str, ...] = (), field: str = "text", text: Path | None = None,
          model: ModelConfig = ModelConfig(), optim: OptimConfig = OptimConfig(),  # noqa: B008
          rule: RateRule = RateRule(), per_budget: int = 7, spread: float = 4.0,  # noqa: B008
          batch: int = 512, seed: int = 0, population: int = 0, trunks: bool = False,
          dry_run: bool = False, json: bool = False) -> None:
    """Train an isoFLOP grid: for each budget the widths around its expected best size.

    Args:
        out: folder of the sweep
        budgets: training FLOPs of each curve
        widths: the ladder of D
        corpus: text files; none: the default corpus
        field: the text field of .jsonl and .parquet rows
        text: a prepared folder to use instead of a corpus
        model: what the ladder leaves as it is
        optim: the optimiser and its schedule; the rule sets its rate
        rule: the learning rate by training tokens
        per_budget: sizes a budget
        spread: sizes lie within this factor of the expected best
        batch: tokens a step
        seed: of every run
        population: runs of one shape trained together at most; 0: one on a CPU, else what fits
        trunks: runs of one width share warmup and stable phase, at one rate
        dry_run: print every run with its cost and stop
        json: print the records on the last line
    """
    data, _ = folders.prepared(text or out / "text", corpus, field, model.V, reuse=text is not None)
    ladder = cells.ladder(model, widths)
    chosen = cells.grid(ladder, budgets, per_budget, spread, batch)
    runs = [cells.config(c, ladder, optim, rule, batch, data.id, seed) for c in chosen]
    wanted, runs = len(runs), shared(runs, rule) if trunks else runs
    for one in runs:
        pretrain.check_memory(one.model)
        pretrain.check(one, data, machine.Plan())
    if dry_run:
        found = progress.expected({"sweep": runs}, data, 1e11)
        progress.say(progress.listing(found))
        progress.answer(found, json, "nothing was trained")
        return
    with progress.live("sweep") as watch:
        records = runner.sweep(out / "runs", runs, data.folder, watch, population)
    failed = wanted - sum(r["status"] == "ok" for r in records)
    progress.answer({"runs": records, "failed": failed, "saved_share": saved(runs)}, json,
                    f"{wanted - failed} runs ok, {failed} not" + (
                        f"; trunks saved {saved(runs):.1%} of the FLOPs" if trunks else ""))
    if failed:
        raise SystemExit(1)


def sft(parent: Positional[Path], out: Path, data: tuple[Path, ...] = (),
        corpus: tuple[str, ...] = (), field: str = "text", text: Path | None = None,
        tasks: int = 0, optim: OptimConfig = OptimConfig(lr=1e-3, decay=1.0),  # noqa: B008
        steps: int = 400, rows: int = 16, replay: float = 0.0, seed: int = 0,
        probe_every: int = 100, skip_bad_lines: bool = False, json: bool = False) -> None:
    """Tune a finished run on conversations, with the loss on what the assistant says.

    Args:
        parent: folder of the run to tune
        out: folder of the new run
        data: .jsonl files of {"messages": [{"role", "content"}, ...]}; none: the corpus's own
        corpus: text files to take conversations from where there is no data; none: the default
        field: the text field of .jsonl and .parquet rows
        text: the prepared folder of the parent, where it has moved
        tasks: generated instruction tasks to mix in, of every family and rule; of conversations
            from a corpus a quarter as many rows are kept then, of --data all
        optim: the optimiser and its schedule
        steps: optimiser steps
        rows: packed rows a step
        replay: share of the rows that are base text, one at least; all of their tokens count
        seed: of the order of the rows
        probe_every: about so many steps between two looks at held-out answers, in metrics.jsonl;
            0: none
        skip_bad_lines: put bad lines of the data into OUT/quarantine.jsonl instead of refusing
        json: print the record on the last line
    """
    config, tokens, learnt = models.opened(parent, text)
    if data and corpus:
        raise BadInput(f"--data {data[0]} and --corpus {corpus[0]} both hold conversations; give "
                       "one of them")
    require("tasks", tasks, 0, 1e6)
    tuning.SftConfig(config, optim, "", "", steps, rows, replay, seed, probe_every)
    aside = folders.Aside(out, skip_bad_lines)
    read = folders.read_lines(data, read_jsonl, aside)
    if data:
        packed = _talks(read, learnt, config.T)
        if tasks:
            among = tuning.asked(tasks, learnt, config.T, seed)
            _left_out(among, f"{tasks} tasks", config.T)
            packed = tuning.mixed(packed, among, seed)
    else:
        packed = tuning.pack_splits(corpora.load(corpus, field), learnt, config.T, steps, rows,
                                    tasks, seed)
        _left_out(packed, "the conversations and tasks", config.T)
    wanted = tuning.SftConfig(config, optim, folders.finished(parent)["id"],
                              tuning.conversations_id(*packed), steps, rows, replay, seed,
                              probe_every)
    plan = folders.plan_of(out, rows, config.shape, config.compute)
    with aside.kept(), progress.bar("sft", steps) as event:
        record = tuning.sft(out, wanted, parent, *packed, tokens, plan, event)
    progress.outcome(record, json, progress.result(record))


def evaluate(target: Positional[Path], also: tuple[Path, ...] = (), tasks: int = 0,
             pairs: tuple[Path, ...] = (), out: Path | None = None,
             split: Literal["test", "reworded"] = "test", budget: int = 32,
             reward: Path | None = None, best_of: int = 0, sentences: int = 0, seed: int = 0,
             text: Path | None = None, json: bool = False) -> None:
    """Measure the held-out loss of a finished run, or put runs of one lineage into one table.

    Args:
        target: folder of the run; in a table what KL and wins of the others are against
        also: folders of the runs to put beside it
        tasks: instruction tasks a family to ask every run; 0: the held-out loss alone
        out: file that the table is also written to
        pairs: .jsonl files, or a .zip of them, of minimal pairs (BLiMP) to judge the run by
        split: test: words unseen in training; reworded: phrases unseen too
        budget: tokens of an answer at most
        reward: folder of a reward model whose scores the table gives too
        best_of: samples of the first run of which that reward model chooses, for a row of its own
        sentences: sentences to ask, whose grades win or lose; 0: as many as of other --tasks
        seed: of the tasks and the draws
        text: a prepared folder with the run's tokenizer; none: the run's own
        json: print the losses on the last line
    """
    if (also or out) and not tasks:
        raise BadInput(f"{f'--also {also[0]}' if also else f'--out {out}'} is for the table; say "
                       "how many --tasks a family to ask")
    if pairs and tasks:
        raise BadInput(f"--pairs {pairs[0]} judge one run and --tasks make a table; ask for them "
                       "one at a time")
    for flag, value in (("reward", reward), ("sentences", sentences)):
        if value and not tasks:
            raise BadInput(f"--{flag} {value} is for the table; say how many --tasks a family to "
                           "ask")
    if best_of and not reward:
        raise BadInput(f"--best-of {best_of} has nothing to choose by; name a --reward model")
    require("best_of", best_of, 0, 1024)
    if out and out.is_dir():
        raise BadInput(f"--out {out} is a folder; name the file to write")
    if out and out.exists() and not _is_table(out):
        raise BadInput(f"--out {out} holds something else than such a table; name another file")
    require("tasks", tasks, 0, 1e5)
    config, tokens, learnt = models.opened(target, text)
    read: dict[str, list[minimal_pairs.Pair]] = {}
    for path in pairs:
        for name, some in minimal_pairs.read(path).items():
            if name in read:
                raise BadInput(f"{path} holds the paradigm {name!r} a second time; rename one")
            read[name] = some
    ref = checkpoint.final_params(target, config)
    if pairs:
        judged = minimal_pairs.scored(config, ref, learnt, read)
        progress.answer(judged, json, alignment.paradigms(judged))
        return
    if not tasks:
        found = heldout.heldout(config, ref, tokens)
        progress.answer({**found._asdict(), "eval_id": heldout.eval_id(tokens, config.T)}, json,
                        f"{found.nats_per_token:.4f} nats a token (se {found.stderr:.4f}), "
                        f"{found.bits_per_byte:.4f} bits a byte, {found.tokens} tokens")
        return
    asked = suite.SuiteConfig(tasks, split, budget, seed, sentences)
    rows, first = {}, None
    for place in also:
        model, others, _ = models.opened(place, text)
        if (model, others.tokenizer_id, others.id) != (config, tokens.tokenizer_id, tokens.id):
            raise BadInput(f"{place} has another model, tokenizer or text than {target}; compare "
                           "runs of one lineage")
    judge, _ = models.judge(reward, config, learnt, text) if reward else (None, "")
    each = [(target, 1), *[(target, best_of)][:best_of], *((one, 1) for one in also)]
    with progress.bar("tasks") as done:
        for at, (place, n) in enumerate(each):
            params = checkpoint.final_params(place, config)
            row, grades = suite.table_row(asked, config, params, ref, learnt, judge, n)
            loss = _bits_per_byte(place, config, params, tokens)
            first = grades if first is None else first
            name = os.path.relpath(place, out.parent) if out else str(place)
            name += f", best of {n}" if n > 1 else ""
            rows[name] = {**row, "bits_per_byte": loss, "wins": suite.wins(grades, first)}
            done(sum(m for _, m in each[: at + 1]) / sum(m for _, m in each))
    told = {"suite": vars(asked), "runs": rows}
    if reward:
        told["reward"] = alignment.of_judge(folders.finished(reward))
    if out:
        files.write_json(out, told)
    progress.answer(told, json, alignment.table(rows, told.get("reward")))


def _is_table(path):
    try:
        return "suite" in files.read_json(path)
    except BadInput:
        return False


def _bits_per_byte(place, config, params, tokens):
    """Give what the run's record says of this held-out text, or measure it."""
    record = folders.finished(place)
    if record["loss"] and record["eval_id"] == heldout.eval_id(tokens, config.T):
        return record["loss"]["bits_per_byte"]
    return heldout.heldout(config, params, tokens).bits_per_byte


def _talks(read, learnt, T):
    talks = list(dict.fromkeys(read))  # a repeated one could lie on both sides of the split
    sides = [[render(t, learnt) for n, t in enumerate(talks) if (n % 25 > 0) == train]
             for train in (True, False)]
    packed = [pack(side, T) for side in sides]
    if len(talks) < len(read):
        progress.say(f"{len(read) - len(talks)} duplicate conversations dropped")
    if sum(side.dropped for side in packed) == len(talks):
        least = min(len(ids) for side in sides for ids, _ in side)
        raise BadInput(f"all {len(talks)} conversations are longer than T={T} tokens, the "
                       f"shortest is {least}; bring shorter ones or tune a model of larger T")
    _left_out(packed, f"{len(talks)} conversations", T)
    return packed


def _left_out(packed, of, T):
    if dropped := sum(side.dropped for side in packed):
        progress.say(f"{dropped} of {of} left out: longer than T={T} tokens")
