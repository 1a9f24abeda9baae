"""The run folder: config, plan, metrics, checkpoints and, written once and last, the record.

config.json and plan.json are there before the first step; metrics.jsonl and record.json hold only
what is reproducible; timing.jsonl and environment.json hold clocks and host facts.
"""

import functools
import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinylm import config as configs
from tinylm import files, machine
from tinylm.config import BadInput

SCHEMA = 2

METRICS = {
    "step": "optimiser steps done",
    "tokens": "tokens trained on",
    "train/nats_per_token": "mean training loss since the last row, nats a token",
    "train/grad_norm": "mean global norm of the gradient before clipping",
    "train/lr": "mean learning rate of a width-64 model",
    "train/skipped": "share of the steps that were not finite and passed by; left out of the means",
    "heldout/answers_nats_per_token": "loss on held-out answers, rows of instruction tuning",
}
"""the columns of metrics.jsonl"""


LOST = ("has lost its checkpoints; delete the folder and give the command that made it (tinylm "
        "train, sft or sweep, or study.py) again")


OTHERS = "is a checkpoint of run {}, not of {}"


class Stopped(Exception):
    """A signal asked the run to stop; it has saved its state (exit code 75)."""


def settle(folder: Path, config: Any, kind: str, plan: machine.Plan, text: Path) -> machine.Plan:
    """Write a new run's config and plan, or check a resumed one's; return the plan to follow.

    `text` is the prepared folder; environment.json keeps the way to it, and no hash covers that.
    """
    folder = Path(folder)
    mine = {"schema": SCHEMA, "kind": kind, "id": configs.identity(config),
            "code_id": code_id(), "versions": machine.versions(), "config": configs.to_json(config)}
    place = folder / "config.json"
    if place.exists():
        finished = record(folder)
        begun = _current(files.read_json(place))  # before some fields were there, perhaps
        same(place, begun, mine, ("kind",))
        begun["config"] = configs.to_json(configs.from_json(type(config), begun["config"]))
        same(place, begun, mine, ("kind", "config") if finished else
             ("kind", "config", "versions", "code_id"))
        plan = configs.from_json(machine.Plan, files.read_json(folder / "plan.json"), "plan.json")
        if not finished:
            kept, here = files.read_json(folder / "environment.json"), machine.environment()
            same(place, kept, here, tuple(k for k in machine.BITS if k in kept and (
                k not in machine.LIBRARIES or getattr(plan, k))))
        elif bad := files.changed(folder, finished.get("files", {})):
            raise files.Damaged(f"{bad[0]}; delete {folder} and run again")
        return plan
    if (folder / "checkpoints").exists():
        raise files.Damaged(f"{place} is missing where checkpoints are; delete {folder} and run "
                            "again")
    files.write_json(folder / "plan.json", asdict(plan))
    way = {"text": os.path.relpath(text, folder)}
    files.write_json(folder / "environment.json", {**machine.environment(), **way})
    files.write_json(place, mine)
    return plan


def adopt(folder: Path) -> bool:
    """Let a run that has begun go on with the code, versions and machine of here, on record.

    False where nothing differs. What it was begun with stays in its config.json and its record.
    So does its plan, and what `machine.BOUND` names; another backend raises BadInput.
    """
    folder = Path(folder)
    if record(folder) is not None:
        raise BadInput(f"{folder} is finished and needs no other machine; train a new run")
    begun, kept = (files.read_json(folder / name) for name in ("config.json", "environment.json"))
    before = {"code_id": begun["code_id"], "versions": begun["versions"],
              **{name: kept[name] for name in machine.BITS
                 if name in kept and name != "threads"}}
    here = {"code_id": code_id(), "versions": machine.versions(), **machine.environment()}
    if all(here[name] == value for name, value in before.items()):
        return False
    same(folder / "config.json", before, here, ("backend",) if "backend" in before else ())
    files.write_json(folder / "environment.json", {
        **kept, **machine.environment(), "threads": kept.get("threads", "several")})
    files.write_json(folder / "config.json", {
        **begun, "code_id": here["code_id"], "versions": here["versions"],
        "adopted_from": [*begun.get("adopted_from", []), before]})
    return True


def adopt_sweep(place: Path) -> bool:
    """Let a sweep train its other runs with what is here, as `adopt` does; its list says so.

    The plans of those that have not begun no longer name a library that is not here.
    """
    found, here = listed(place), surroundings()
    before = {name: found[name] for name in here if name in found}
    if all(here[name] == value for name, value in before.items()):
        return False
    same(place, before, here, ("backend",) if "backend" in before else ())
    lacking = {name: False for name in machine.LIBRARIES if not here[name]}
    plans = {n: p if planned(place.parent / n) else {**p, **lacking}
             for n, p in found.get("plans", {}).items()}
    files.write_json(place, {**found, **here, "plans": plans,
                             "adopted_from": [*found.get("adopted_from", []), before]})
    return True


def surroundings() -> dict[str, Any]:
    """Give what a sweep's bits depend on, as its list has it; JAX need not have started."""
    return {"code_id": code_id(), "versions": machine.versions(),
            **machine.basis(machine.survey()[0])}


def planned(folder: Path) -> machine.Plan | None:
    """Return the plan a started run is bound to, or None (JAX need not have started)."""
    place = Path(folder) / "plan.json"
    if not place.exists():
        return None
    return configs.from_json(machine.Plan, files.read_json(place), str(place))


def record(folder: Path) -> dict[str, Any] | None:
    """Return a finished run's record, or None; an unknown schema raises BadInput."""
    place = Path(folder) / "record.json"
    if not place.exists():
        return None
    found = files.read_json(place)
    shape = {"id": str, "kind": str, "status": str, "config": dict, "files": dict,
             "loss": dict | None, "tokenizer_id": str}
    if not {"schema", "id", "config", "loss"} <= set(found) or not all(
            isinstance(found[key], kind) for key, kind in shape.items() if key in found):
        raise files.Damaged(f"{place} is no record of ours; delete it and train again")
    if found["schema"] not in (1, SCHEMA):
        raise BadInput(f"{place} has schema {found['schema']!r}, this tinylm reads {SCHEMA}; "
                       "update tinylm")
    return _current(found)


def _current(record: dict[str, Any]) -> dict[str, Any]:
    """Give an older record as one of today's; models of schema 1 do not smear keys."""
    if record["schema"] == SCHEMA or "model" not in record["config"]:
        return record
    model = {"smear": False, **record["config"]["model"]}
    return {**record, "config": {**record["config"], "model": model}}


def listed(place: Path) -> dict[str, Any]:
    """Read a sweep.json, its runs by name."""
    found = files.read_json(place)
    if not (isinstance(runs := found.get("runs"), dict) and all(
            isinstance(config, dict) for config in runs.values())):
        raise files.Damaged(f"{place} lists no runs by name; delete it and run again")
    return found


def unfinished(place: Path) -> list[Path]:
    """Give where the records of the runs that a sweep.json lists are to be and are not."""
    return [one for name in listed(place)["runs"]
            if not (one := place.parent / name / "record.json").exists()]


def owner(folder: Path) -> str:
    """Name whose checkpoints a folder holds: its run's id, or the folder of a population."""
    place = Path(folder) / "config.json"
    return files.read_json(place).get("id", "") if place.exists() else Path(folder).name


def faults(folder: Path) -> list[str]:
    """List in words what a folder of a run has lost, or holds of another run."""
    folder, done = Path(folder), record(folder)
    saves = sorted(folder.glob("checkpoints/step-*"))
    if done is None and (not saves or folder.name.startswith("population-")):
        return []  # a population's config, plan and logs are its members'
    out = [f"{folder / name} is missing" for name in ("config.json", "plan.json",
                                                      "environment.json")
           if not (folder / name).exists()]
    if done and done["status"] == "ok" and not saves:
        out.append(f"{folder} {LOST}")
    mine = done["id"] if done else owner(folder)
    for place in saves:
        try:
            facts = files.read_json(place / files.MANIFEST)
        except files.Damaged:  # which is told with the rest of its folder
            continue
        if facts.get("run", mine) != mine:
            out.append(f"{place} {OTHERS.format(facts['run'], mine)}")
        elif not done and place == saves[-1] and facts.get("logs"):
            size, sha, _ = facts["logs"][0]
            log = folder / "metrics.jsonl"
            if size and not (log.exists() and files.sha256_of(log.read_bytes()[:size]) == sha):
                out.append(f"{log} has other bytes than its checkpoint saw")
    return out


def finish(folder: Path, config: Any, kind: str, status: str, **facts: Any) -> dict[str, Any]:
    """Write the record of a run that ended (ok or diverged) and return it.

    One whose held-out loss is not finite diverged, whatever its training loss was.
    """
    folder = Path(folder)
    if (loss := facts["loss"]) and not math.isfinite(loss["nats_per_token"]):
        status, facts["loss"] = "diverged", None
    opened = files.read_json(folder / "config.json")
    logs = {name: files.sha256(folder / name)
            for name in ("config.json", "plan.json", "metrics.jsonl") if (folder / name).exists()}
    out = {"schema": SCHEMA, "id": configs.identity(config), "kind": kind, "status": status,
           "config": opened["config"], "code_id": opened["code_id"],
           "versions": opened["versions"], "plan": files.read_json(folder / "plan.json"),
           **({"adopted_from": opened["adopted_from"]} if "adopted_from" in opened else {}),
           **facts, "files": logs}
    files.write_json(folder / "record.json", out)
    return out


def fail(folder: Path, config: Any, kind: str, reason: str) -> None:
    """Write why a run could not finish to failure.json; the same command tries it again."""
    value = {"id": configs.identity(config), "kind": kind, "status": "failed", "reason": reason}
    files.write_json(Path(folder) / "failure.json", value)


def table(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the records of the folders that have one, in order of compute."""
    found = [record(f) for f in folders]
    return sorted((r for r in found if r), key=lambda r: (r["flops"]["exact"], r["id"]))


LAUNCH = ("sweep", "look", "bench.py", "serve", "verbs", "__main__.py")


@functools.cache
def code_id() -> str:
    """Hash the sources that a run's bits depend on: 16 hex digits, recorded with every run.

    These are all of tinylm's but what launches runs, shows and serves them (LAUNCH).
    """
    root = Path(__file__).parent.parent
    total = hashlib.sha256()
    for path in sorted(p for end in ("py", "c", "h") for p in root.rglob(f"*.{end}")):
        if path.relative_to(root).parts[0] in LAUNCH:
            continue
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def same(place: Path, old: dict[str, Any], new: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Refuse to go on in `place`'s folder where what it was begun with is not what is here."""
    for key in keys:
        if old.get(key) != new[key]:
            before, after = _first_difference(old.get(key), new[key], key)
            taken = "" if key in ("kind", "config", *machine.BOUND) else (
                f"`tinylm adopt {place.parent}` to go on here and have that recorded, ")
            raise BadInput(f"{place.parent} was begun with {before}, this is {after}; "
                           f"go on as it was begun, {taken}or choose a new folder")


def _first_difference(old: Any, new: Any, name: str) -> tuple[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{name}.{key}")
    return f"{name}={old!r}", f"{name}={new!r}"
