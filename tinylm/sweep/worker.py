"""One worker of a sweep: take the next run that nobody holds, train it, say how it goes.

Started as `python -m tinylm.sweep.worker FOLDER DATA INDEX [SKIP ...]`; it prints one JSON object
a line on stdout. Any number may run over one folder: a run belongs to whoever holds its lease.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tinylm import files, machine
from tinylm.config import BadInput, from_json

PATIENCE = 10
"""seconds to wait for runs that others hold and do not finish"""


def main(argv: list[str]) -> int:
    """Work until every run is finished, failed or held by another worker."""
    folder, data_folder, index, skip = Path(argv[0]), Path(argv[1]), int(argv[2]), argv[3:]
    listed = files.read_json(folder / "sweep.json")
    available = machine.cores()
    mine = (available[index % len(available)],) if listed["workers"] > 1 else ()
    machine.pin(max(p["devices"] for p in listed["plans"].values()), mine)
    return _work(folder, data_folder, listed, skip)


def _work(folder: Path, data_folder: Path, listed: dict[str, Any], skip: list[str]) -> int:
    from tinylm.text.shards import open_dataset
    from tinylm.train import run

    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    data, packs = open_dataset(data_folder), listed["packs"]
    patience = PATIENCE
    while packs and patience:
        for names in packs:
            if not set(names) & set(skip) and any(run.record(folder / n) is None for n in names):
                code = _one(folder, names, listed, data)
                if code:
                    return code
        left = [names for names in packs if not set(names) & set(skip) and any(
            run.record(folder / n) is None and not (folder / n / "failure.json").exists()
            for n in names)]
        patience = patience - 1 if len(left) == len(packs) else PATIENCE
        packs = left
        time.sleep(1 if packs else 0)
    return 0


def _one(folder: Path, names: list[str], listed: dict[str, Any], data: Any) -> int:
    """Train one pack unless another holds it; return 75 if a signal stopped it, else 0."""
    from tinylm.stages import pretrain
    from tinylm.train import run

    plan = from_json(machine.Plan, listed["plans"][names[0]], names[0])
    configs = {n: from_json(pretrain.PretrainConfig, listed["runs"][n], n) for n in names}
    for name in names:
        (folder / name / "failure.json").unlink(missing_ok=True)

    def told(name: str, step: int, loss: float) -> None:
        say(run=name, step=step, loss=loss if loss == loss else None)

    say(begin=names)
    try:
        records = {}
        if plan.population == 1:
            (name, config), = configs.items()
            records[name] = pretrain.pretrain(folder / name, config, data, plan,
                                              functools.partial(told, name))
        else:
            records = _together(folder, configs, data, plan, told)
        for name, record in records.items():
            say(done=name, status=record["status"])
    except files.Owned:
        say(owned=names[0])
    except run.Stopped as stop:
        say(stopped=names[0], reason=str(stop))
        return 75
    except (BadInput, RuntimeError, MemoryError, OSError, ValueError) as fault:
        for name in names:
            if run.record(folder / name) is None:
                _failed(folder, name, configs[name], fault)
    return 0


def _together(folder: Path, configs: dict[str, Any], data: Any, plan: machine.Plan,
              told: Any) -> dict[str, dict[str, Any]]:
    """Train those of a pack that can be trained; the others fail by themselves."""
    from tinylm.stages import pretrain

    sound = {}
    for name, config in configs.items():
        try:
            pretrain.check(config, data, plan)
            sound[name] = config
        except BadInput as fault:
            _failed(folder, name, config, fault)
    if not sound:
        return {}
    return dict(zip(sound, pretrain.pretrain_population(folder, sound, data, plan, told),
                    strict=True))


def _failed(folder: Path, name: str, config: Any, fault: Exception) -> None:
    from tinylm.train import run

    reason = f"{type(fault).__name__}: {fault}".splitlines()[0]
    run.fail(folder / name, config, "pretrain", reason)
    say(failed=name, reason=reason)


def say(**news: object) -> None:
    """Print one line of news for the sweep that started this worker; nobody may be listening."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(news), flush=True)


def _follow(parent: int) -> None:
    """Ask this process to save and stop once the sweep that started it is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
