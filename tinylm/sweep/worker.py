"""One worker of a sweep: take the next run that nobody holds, train it, say how it goes.

Started as `python -m tinylm.sweep.worker FOLDER DATA INDEX [SKIP ...]`; it prints one JSON object
a line on stdout. Any number may run over one folder: a run belongs to whoever holds its lease.
"""

import contextlib
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
    from tinylm.stages.pretrain import PretrainConfig
    from tinylm.text.shards import open_dataset
    from tinylm.train import run

    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    data, runs = open_dataset(data_folder), listed["runs"]
    owned, patience = list(runs), PATIENCE
    while owned and patience:
        for name in owned:
            if name not in skip and run.record(folder / name) is None:
                code = _one(folder / name, from_json(PretrainConfig, runs[name], name), data,
                            from_json(machine.Plan, listed["plans"][name], name))
                if code:
                    return code
        left = [n for n in owned if n not in skip and run.record(folder / n) is None
                and not (folder / n / "failure.json").exists()]
        patience = patience - 1 if len(left) == len(owned) else PATIENCE
        owned = left
        time.sleep(1 if owned else 0)
    return 0


def _one(place: Path, config: Any, data: Any, plan: machine.Plan) -> int:
    """Train one run unless another holds it; return 75 if a signal stopped it, else 0."""
    from tinylm.stages.pretrain import pretrain
    from tinylm.train import run

    name = place.name
    try:
        (place / "failure.json").unlink(missing_ok=True)
        say(begin=name)
        record = pretrain(place, config, data, plan, lambda step, loss: say(
            run=name, step=step, loss=loss if loss == loss else None))
        say(done=name, status=record["status"])
    except files.Owned:
        say(owned=name)
    except run.Stopped as stop:
        say(stopped=name, reason=str(stop))
        return 75
    except (BadInput, RuntimeError, MemoryError, OSError, ValueError) as fault:
        reason = f"{type(fault).__name__}: {fault}".splitlines()[0]
        run.fail(place, config, "pretrain", reason)
        say(failed=name, reason=reason)
    return 0


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
