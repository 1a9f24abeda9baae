"""What the verbs open without JAX: prepared text, the plan of a run, finished runs."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.laws.accounting import Shape
from tinylm.look import progress
from tinylm.text import corpora, lines, prepare
from tinylm.text.shards import Dataset
from tinylm.text.tokenizer import Tokenizer
from tinylm.train import run

Row = TypeVar("Row")


def prepared(folder: Path, corpus: tuple[str, ...], field: str, V: int,
              reuse: bool = False) -> tuple[Dataset, Tokenizer]:
    if reuse:
        if corpus:
            raise BadInput(f"--text {folder} and --corpus {corpus[0]} are two sources; give one")
        if not folder.is_dir():
            raise BadInput(f"--text {folder} is no prepared folder; give a run's text/ or "
                           "text files with --corpus")
        return prepare.open_text(folder)
    loaded = corpora.load(corpus, field)
    progress.say(progress.corpus(loaded))
    with progress.bar("tokens") as event:
        return prepare.prepare(folder, loaded, V, event)


def plan_of(out: Path, rows: int, shape: Shape, compute: str, devices: int = 0,
            kept: tuple[int, ...] = ()) -> machine.Plan:
    if (bound := run.planned(out)) is not None:
        if devices not in (0, bound.devices):
            raise BadInput(f"{out} was begun on {bound.devices} devices, not {devices}; go on "
                           "without --devices or choose a new folder")
        if kept not in ((), bound.kept):
            raise BadInput(f"{out} was begun to keep checkpoints {bound.kept}, not {kept}; go on "
                           "without --keep or choose a new folder")
        return bound
    plan = machine.plan_for(rows, shape.T, shape.D, compute, *machine.survey(), devices)
    return dataclasses.replace(plan, kept=kept)


def records(folder: Path) -> list[dict[str, Any]]:
    """Read a sweep's transformers (of a study its sweep's), but for those that test a forecast.

    A run that the sweep lists and that has no record is said to be left out.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder; give the folder of a sweep")
    inside = folder / "sweep" if (folder / "sweep").is_dir() else folder
    for listed in files.named(inside, "sweep.json"):
        for place in run.unfinished(listed):
            progress.say(f"left out: {place} is missing (not finished yet, or failed, or lost)")
    for log in files.named(inside, "workers.jsonl"):
        if not log.with_name("sweep.json").exists():
            progress.say(f"{log.with_name('sweep.json')} is missing: which runs this sweep had is "
                         "not known")
    found = [r for r in run.table(p.parent for p in files.named(inside, "record.json"))
             if r["kind"] in ("pretrain", "branch") and not r["config"]["forecast_sha256"]
             and r["config"]["model"]["kind"] == "transformer"]
    if not found:
        raise BadInput(f"{folder} holds no finished runs; give the folder of a sweep")
    return found


def columns(runs: Path, **named: str) -> dict[str, str]:
    """Give the columns of a CSV that were named; BadInput where the runs are a folder."""
    given = {key: column for key, column in named.items() if column}
    if given and runs.is_dir():
        key, column = next(iter(given.items()))
        raise BadInput(f"--{key}-col {column} is for a CSV and {runs} is a folder; leave it out")
    return given


def chosen(runs: Path, where: tuple[str, ...]) -> dict[str, str]:
    """Read COLUMN=VALUE words about a CSV; BadInput where the runs are a folder."""
    found = {}
    for word in where:
        column, equal, value = word.partition("=")
        if runs.is_dir() or not equal:
            raise BadInput(f"--where {word} is for a CSV and {runs} is a folder; leave it out"
                           if runs.is_dir() else
                           f"--where {word} is no COLUMN=VALUE; write one, such as corpus=c4")
        if found.setdefault(column, value) != value:
            raise BadInput(f"--where names {column} twice, as {found[column]} and {value}; runs of "
                           "one value are one study: give one")
    return found


def text_of(folder: Path) -> Path:
    """Give the prepared folder of the runs in a folder; `TEXT` where none of them names it."""
    for place in sorted(folder.rglob("environment.json")):
        if link := files.read_json(place).get("text", ""):
            return Path(os.path.relpath(place.parent.resolve() / link))
    return Path("TEXT")


class Aside:
    """Bad lines that a run leaves out, if they may be skipped, kept beside it with the reasons."""

    def __init__(self, out: Path, skip: bool):
        self.place, self.refused = out / "quarantine.jsonl", list[lines.Refused]() if skip else None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Hold them in OUT/quarantine.jsonl; not where what comes refuses to begin a run."""
        place, begun = self.place, self.place.with_name("config.json")
        text = "".join(json.dumps(r._asdict()) + "\n" for r in self.refused or ())
        new = bool(text) and not begun.exists()
        if new and place.exists() and place.read_text("utf-8", "replace") != text:
            raise BadInput(f"{place} holds other lines; choose a new folder with --out")
        if new:
            files.write_text(place, text)
            progress.say(f"{place} holds the lines left out, with the reasons")
        try:
            yield
        except BadInput:
            if new and not begun.exists():
                place.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # what others put there stays
                    place.parent.rmdir()
            raise


def read_lines(data: tuple[Path, ...], read: Callable[..., list[Row]], aside: Aside) -> list[Row]:
    """Read .jsonl files; lines that may be skipped are put aside, and counted.

    BadInput for the first bad line where none may be skipped, or where all are bad.
    """
    found = [row for path in data for row in read(path, aside.refused)]
    if bad := aside.refused:
        if not found:
            raise BadInput(f"all {len(bad)} lines are bad, the first: {bad[0].reason}")
        progress.say(f"{len(bad)} bad lines of {len(bad) + len(found)} left out")
    return found


def finished(folder: Path) -> dict[str, Any]:
    record = run.record(folder)
    if record is None:
        raise BadInput(f"{folder} is no finished run (no record.json); train it first")
    return record
