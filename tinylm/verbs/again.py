"""A recorded number made again from what it rests on: replay."""

import sys
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.laws import forecast
from tinylm.look import progress
from tinylm.train import run
from tinylm.verbs import folders

SEAL = "sha256"


def replay(record: Positional[Path], text: Path | None = None, runs: Path | None = None,
           json: bool = False) -> None:
    """Make a recorded number again and say that it is equal, or what differs.

    A run's held-out loss comes from its checkpoint, a study's law and forecast from its runs, a
    score from forecast and run.

    Args:
        record: a run's folder or record.json, a forecast, or a study's law.json or score.json
        text: the prepared folder of the run, where it has moved
        runs: folder of the runs that a law or forecast was made from; none: `sweep` beside it
        json: print what was compared on the last line
    """
    place = record / "record.json" if record.is_dir() else record
    if not place.exists():
        raise BadInput(f"{place} does not exist; give a run's folder, or a study's law.json, "
                       "forecast.json or score.json")
    makers = {"record.json": _loss, "law.json": _law, "forecast.json": _forecast,
              "score.json": _score}
    maker = makers.get(place.name) or (
        _forecast if place.suffix == ".json" and "target_flops" in files.read_json(place) else None)
    if maker is None:
        raise BadInput(f"{place.name} cannot be made again; give one of {', '.join(makers)}")
    kept, made, facts = maker(place, text if maker is _loss else runs)
    apart = differences(kept, made)
    told = {"equal": not apart, "differs": apart, "facts": facts}
    words = (f"{place}: equal, {len(list(_leaves(kept)))} values" if not apart else "\n".join(
        [f"{place}: {len(apart)} values differ",
         *(f"  {name}: recorded {a!r}, now {b!r}" for name, (a, b) in list(apart.items())[:20]),
         *(f"  {name}: recorded under {a!r}, now {b!r}" for name, (a, b) in facts.items())]))
    progress.answer(told, json, words)
    if apart:
        raise SystemExit(1)


def differences(kept: Any, made: Any) -> dict[str, list[Any]]:
    """Give [recorded, made] of every value that is not the same, by its dotted name."""
    old, new = dict(_leaves(kept)), dict(_leaves(made))
    return {name: [old.get(name), new.get(name)] for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)}


def _leaves(value: Any, name: str = ""):
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != SEAL:
                yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for n, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{n}]")
    else:
        yield name, value


def _loss(place: Path, text: Path | None) -> tuple[Any, Any, dict[str, list[Any]]]:
    then = files.read_json(place.parent / "environment.json")
    if (then.get("threads"), machine.survey()[0]) == ("one", "cpu") and "jax" not in sys.modules:
        # other products, by a bit
        machine.pin(1, tuple(machine.cores()[:1]))
    from tinylm.evaluate import heldout  # JAX takes seconds to import
    from tinylm.train import checkpoint
    from tinylm.verbs import models

    record = run.record(place.parent)
    if not record["loss"]:
        raise BadInput(f"{place} records no held-out loss (kind {record['kind']}, status "
                       f"{record['status']}); give a run that has one")
    config, data, _ = models.opened(place.parent, text)
    found = heldout.heldout(config, checkpoint.final_params(place.parent, config), data)
    return record["loss"], found._asdict(), _facts(record)


def _facts(record: dict[str, Any]) -> dict[str, list[Any]]:
    """Give what the number was recorded under and is not the same now."""
    now = {"code_id": run.code_id(), **machine.versions()}
    then = {"code_id": record["code_id"], **record["versions"]}
    return {name: [then.get(name), now[name]] for name in now if then.get(name) != now[name]}


def _records(place: Path, runs: Path | None) -> list[dict[str, Any]]:
    """Read the runs that a file was made from: a study's sweep beside it, or those of `runs`."""
    if runs is not None and not runs.is_dir():
        raise BadInput(f"{runs} is no folder of runs; forecast again from a table into a new file "
                       "and compare the two")
    if runs is not None:
        return folders.records(runs)
    found = run.table(p.parent for p in (place.parent / "sweep").glob("*/record.json"))
    if not found:
        raise BadInput(f"{place} has no sweep beside it; name the folder of its runs with --runs")
    return found


def _law(place: Path, folder: Path | None) -> tuple[Any, Any, dict[str, list[Any]]]:
    from tinylm.sweep import law

    kept, records = files.read_json(place), _records(place, folder)
    made = law.fit(records)
    return kept, {name: made.get(name) for name in kept if name != SEAL}, _facts(records[0])


def _forecast(place: Path, folder: Path | None) -> tuple[Any, Any, dict[str, list[Any]]]:
    from tinylm.config import to_json
    from tinylm.sweep import law

    kept, records = forecast.read(place), _records(place, folder)
    runs, ids, eval_id = law.runs_of(records)
    made = forecast.make(runs, ids, kept.target_flops, kept.target_params, kept.target_tokens,
                         eval_id, kept.name, law.noise(records), clusters=law.clusters(records),
                         rough=True, warning=kept.warning)
    return to_json(kept), to_json(made), _facts(records[0])


def _score(place: Path, folder: Path | None) -> tuple[Any, Any, dict[str, list[Any]]]:
    record = run.record(place.parent / "target")
    if record is None:
        raise BadInput(f"{place.parent} holds no finished target run; replay it where it lies")
    made = forecast.check(place.parent / "forecast.json", record)._asdict()
    return files.read_json(place), made, _facts(record)
