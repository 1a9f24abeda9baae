"""Verbs that look after what is there: bench, report, verify, adopt, slim."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tinylm import files, leases
from tinylm.config import BadInput, require
from tinylm.laws import forecast
from tinylm.look import progress
from tinylm.train import run

NOTES = ("config.json", "plan.json", "record.json", "failure.json", "environment.json",
         "sweep.json", "tuning.json", "baselines.json", "law.json", "forecast.json", "score.json",
         "growth.json", "samples.json", "alignment.json", "guard.json", "report.json")
"""the files that a run, a sweep and a study leave outside sealed folders"""
CLOCKS = ("timing.jsonl", "workers.jsonl", "stages.jsonl")
"""and the logs whose rows are sealed each"""
ROWS = {**dict.fromkeys(CLOCKS, files.read_rows), "forecasts.csv": forecast.ledger}
"""how a log of sealed rows is read, a ledger of scores too"""


def bench(what: Positional[Literal["machine", "train", "decode", "population", "sweep"]],
          shapes: tuple[str, ...] = ("s", "m", "l", "xl"), models: int = 1, rounds: int = 5,
          compute: Literal["f32", "bf16"] = "f32", sizes: tuple[int, ...] = (1, 8, 32, 64),
          widths: tuple[int, ...] = (64, 128, 256), tokens: int = 8192,
          preset: Literal["smoke", "laptop", "overnight", "accelerator"] = "laptop",
          scale: float = 0.02, corpus: tuple[str, ...] = (), json: bool = False) -> None:
    """Time matrix products, training, decoding, many models trained together or a whole sweep.

    Args:
        what: machine is the ceiling that the others are held against
        shapes: s, m, l or xl (tinylm/bench.py)
        models: for train: 1 model over all devices, or so many pinned processes with one each
        rounds: the median is over these, taken in turn
        compute: for train, decode and population: the type of the products' operands
        sizes: for population: members trained together
        widths: for population: of the members
        tokens: for population: of one member's step
        preset: for sweep: the study whose grid is trained, with a cold and then a warm cache
        scale: for sweep: the share of each run's steps that is trained
        corpus: for sweep: text files; none: the default corpus
        json: print the record on the last line
    """
    from tinylm import bench as timed

    require("rounds", rounds, 1, 1e6)
    match what:
        case "machine":
            found = timed.peak(rounds)
        case "train":
            found = timed.train(shapes, models, rounds, compute=compute)
        case "decode":
            found = timed.generation(shapes, rounds=rounds, compute=compute)
        case "population":
            found = timed.population(sizes, widths, rounds, compute=compute, tokens=tokens)
        case "sweep":
            found = timed.sweep(preset, scale, corpus)
    progress.answer(found, json, (progress.swept if what == "sweep" else progress.benched)(found))


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
    """Check every manifest and record below a folder, or one file, and name each bad file.

    Args:
        path: a run, a sweep, a prepared folder, a whole study, or a file of one of these
        json: print what was found, and the hashes of every sound run, on the last line
    """
    if path.is_dir():
        checked, bad = _checked(path)
    else:
        checked, bad = _checked_file(path)
    lists = files.named(path, "sweep.json") if path.is_dir() else []
    open_ = [place for listed in lists if str(listed) not in "\n".join(bad)
             for place in run.unfinished(listed)]
    records = files.named(path, "record.json") if path.is_dir() and json and not bad else []
    said = [f"{checked} sealed folders and notes are sound",
            *(f"not finished: {place} is missing" for place in open_)]
    progress.answer({"checked": checked, "bad": bad, "unfinished": list(map(str, open_)),
                     "runs": {str(p.parent): _hashes(p.parent) for p in records}}, json,
                    "\n".join(bad or said))
    if bad:
        raise SystemExit(1)


def _checked(folder: Path) -> tuple[int, list[str]]:
    """Count what was checked below a folder, and say what is bad."""
    found = files.named(folder)
    manifests = [p for p in found if p.name == files.MANIFEST]
    notes = [p for p in found if p.name in NOTES or p.suffix == ".json"
             and p.name != files.MANIFEST and files.sealed(p)]
    if not manifests and not notes:
        raise BadInput(f"{folder} holds nothing that tinylm sealed; give a run, text or study "
                       "folder")
    bad = [problem for place in manifests for problem in files.problems(place.parent)]
    for note in notes:
        bad += _noted(note)
    for log in (p for p in found if p.name in ROWS):
        bad += _rows(log)
    for place in sorted({p.parent for p in notes if p.name in ("config.json", "record.json")}
                        | {p.parents[2] for p in manifests if p.parent.parent.name == "checkpoints"}
                        ):
        try:
            bad += run.faults(place)
        except BadInput as refusal:
            bad.append(str(refusal))
    return len(manifests) + len(notes), list(dict.fromkeys(bad))


def _noted(note: Path) -> list[str]:
    """Say what is bad about a note and the files it lists."""
    try:
        return files.changed(note.parent, files.read_json(note).get("files", {}))
    except files.Damaged as damage:
        return [str(damage)]


def _rows(log: Path) -> list[str]:
    """Say what is bad about a log whose rows are sealed each."""
    try:
        ROWS[log.name](log)
    except BadInput as refusal:
        return [str(refusal)]
    return []


def _checked_file(path: Path) -> tuple[int, list[str]]:
    """The same for one file, by its own seal or by the manifest, record or report that lists it."""
    if not path.is_file():
        raise BadInput(f"{path} is no file or folder; give a run, text or study folder")
    if path.name == files.MANIFEST:
        return 1, files.problems(path.parent)
    if path.suffix == ".json" and (path.name in NOTES or files.sealed(path)):
        return 1, _noted(path)
    if path.name in ROWS:
        return 1, _rows(path)
    for place in path.absolute().parents:
        inside = str(path.absolute().relative_to(place))
        for name in (files.MANIFEST, "record.json", "report.json"):
            if (place / name).exists() and inside in files.read_json(place / name).get("files", {}):
                bad = (files.problems(place) if name == files.MANIFEST else _noted(place / name))
                return 1, [line for line in bad if str(place / inside) in line]
    raise BadInput(f"{path} is in no manifest or record of tinylm's; give the folder it belongs to")


def adopt(path: Positional[Path], json: bool = False) -> None:
    """Let begun runs go on with the code, versions and machine of here; their records say so.

    Args:
        path: a run, or a folder of runs
        json: print the runs that were adopted on the last line
    """
    begun = [p.parent for p in files.named(path, "config.json")
             if not (p.parent / "record.json").exists()]
    sweeps = [p for p in files.named(path, "sweep.json") if run.unfinished(p)]
    if not begun and not sweeps:
        raise BadInput(f"{path} holds no run that was begun and is not finished")
    taken = []
    for folder in begun:
        with leases.hold(folder):
            if run.adopt(folder):
                taken.append(str(folder))
    for place in sweeps:
        with leases.hold(place.parent):
            if run.adopt_sweep(place):
                taken.append(str(place.parent))
    progress.answer({"adopted": taken}, json, "\n".join(f"{name} goes on here" for name in taken)
                    or "nothing differs from what these runs were begun with")


def slim(target: Positional[Path], out: Path) -> None:
    """Copy a finished run without what only training goes on from: a third of its size.

    Args:
        target: folder of the run
        out: folder of the copy
    """
    from tinylm.train import checkpoint  # JAX takes seconds to import

    checkpoint.slim(target, out)
    print(f"{out} speaks, is measured, tuned from and verified as {target} is")


def _hashes(folder: Path) -> dict[str, str]:
    """Hash what a run came to: its final parameters, where it kept them, and its metrics log."""
    from tinylm.train import checkpoint  # JAX takes seconds to import

    found, saves = {}, folder / "checkpoints"
    if checkpoint.steps(saves):
        found["params_sha256"] = checkpoint.params_sha256(saves)
    if (folder / "metrics.jsonl").exists():
        found["metrics_sha256"] = files.sha256(folder / "metrics.jsonl")
    return found
