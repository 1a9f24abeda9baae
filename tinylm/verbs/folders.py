"""What the verbs open: prepared text, the plan of a run, finished runs with their tokenizer."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm import files, machine
from tinylm.config import BadInput, from_json
from tinylm.look import progress
from tinylm.text import corpora, prepare
from tinylm.text.shards import Dataset, open_dataset
from tinylm.text.tokenizer import Tokenizer
from tinylm.train import run

if TYPE_CHECKING:
    from tinylm.model.decoder import ModelConfig


def prepared(folder: Path, corpus: tuple[str, ...], field: str, V: int,
              reuse: bool = False) -> tuple[Dataset, Tokenizer]:
    if reuse:
        if corpus:
            raise BadInput(f"--text {folder} and --corpus {corpus[0]} are two sources; give one")
        return open_dataset(folder / "tokens"), prepare.open_tokenizer(folder)
    loaded = corpora.load(corpus, field)
    progress.say(progress.corpus(loaded))
    with progress.bar("tokens") as event:
        return prepare.prepare(folder, loaded, V, event)


def plan_of(out: Path, rows: int, model: "ModelConfig", devices: int = 0) -> machine.Plan:
    if (bound := run.planned(out)) is not None:
        return bound
    return machine.plan_for(rows, model.T, model.D, *machine.survey(), devices)


def records(folder: Path) -> list[dict[str, Any]]:
    """Read a sweep's transformers (of a study its sweep's), but for those that test a forecast."""
    inside = folder / "sweep" if (folder / "sweep").is_dir() else folder
    found = [r for r in run.table(sorted(p.parent for p in inside.rglob("record.json")))
             if r["kind"] in ("pretrain", "branch") and not r["config"]["forecast_sha256"]
             and r["config"]["model"]["kind"] == "transformer"]
    if not found:
        raise BadInput(f"{folder} holds no finished runs; give the folder of a sweep")
    return found


def finished(folder: Path) -> dict[str, Any]:
    record = run.record(folder)
    if record is None:
        raise BadInput(f"{folder} is no finished run (no record.json); train it first")
    return record


def opened(folder: Path, text: Path | None) -> tuple["ModelConfig", Dataset, Tokenizer]:
    """Open a finished run's model config, token files and tokenizer."""
    from tinylm.model.decoder import ModelConfig

    record = finished(folder)
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
