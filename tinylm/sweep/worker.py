"""One worker of a sweep: take the next run that nobody holds, train it, say how it goes.

Started as `python -m tinylm.sweep.worker FOLDER DATA INDEX`; it prints one JSON object a line on
stdout. Any number may run over one folder: a run belongs to whoever holds its lease. A run with a
failure.json is over until the sweep is called again.
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
from typing import Any, Literal

from tinylm import files, leases, machine
from tinylm.config import BadInput, from_json, identity
from tinylm.train import run

PATIENCE = 10.0
"""seconds to wait for runs that others hold and do not finish"""
PAUSE = 0.2
"""seconds between two looks for something to do"""


def main(argv: list[str]) -> int:
    """Work until every run is finished, failed or held by another worker."""
    folder, data_folder, index = Path(argv[0]), Path(argv[1]), int(argv[2])
    listed = files.read_json(folder / "sweep.json")
    available = machine.cores()
    mine = (available[index % len(available)],) if listed["workers"] > 1 else ()
    machine.pin(max(p["devices"] for p in listed["plans"].values()), mine)
    return _work(folder, data_folder, listed, index)


def share(runs: dict[str, Any], workers: int, index: int) -> list[str]:
    """Order the names of a sweep's runs for one worker: its own shapes, then those of the others.

    Runs of one shape share a compiled program, so a shape has one worker: the shapes are dealt out
    from the longest, each to who has least to do. Own runs and those of others go longest first.
    """
    shapes: dict[str, list[str]] = {}
    for name, c in runs.items():
        shapes.setdefault(c.program, []).append(name)
    cost = {name: c.spent for name, c in runs.items()}
    dealt: list[list[str]] = [[] for _ in range(workers)]
    for names in sorted(shapes.values(), key=lambda names: -sum(cost[n] for n in names)):
        min(dealt, key=lambda have: sum(cost[n] for n in have)).extend(names)
    return sorted(runs, key=lambda n: (n not in dealt[index], -cost[n]))


def _work(folder: Path, data_folder: Path, listed: dict[str, Any], index: int) -> int:
    from tinylm.stages.pretrain import PretrainConfig
    from tinylm.text.shards import open_dataset
    from tinylm.train import checkpoint

    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    data = open_dataset(data_folder)
    runs = {n: from_json(PretrainConfig, c, n) for n, c in listed["runs"].items()}
    plans = {n: from_json(machine.Plan, p, n) for n, p in listed["plans"].items()}
    packs = {names[0]: names for names in listed["packs"]}
    trunks = {identity(c): folder / n for n, c in runs.items()}

    def over(n: str) -> bool:
        return run.record(folder / n) is not None or (folder / n / "failure.json").exists()

    def ready(n: str) -> bool:
        parent = runs[n].parent
        trunk = parent and trunks.get(parent.id)
        return (trunk is None or over(trunk.name)
                or checkpoint.at(trunk / "checkpoints", parent.step).exists())

    order = share({n: runs[n] for n in packs}, listed["workers"], index)
    idle_since = time.monotonic()
    while time.monotonic() < idle_since + PATIENCE:
        left = [n for n in order if not all(map(over, packs[n]))]
        if not left:
            break
        ways = (_one(folder, {m: runs[m] for m in packs[n]}, data, plans[n],
                     runs[n].parent and trunks.get(runs[n].parent.id)) for n in left if ready(n))
        way = next((w for w in ways if w != "held"), "held")
        if way == "stopped":
            return 75
        if way == "held":
            time.sleep(PAUSE)
        if way != "held" or left != order or not all(map(ready, left)):
            idle_since = time.monotonic()
        order = left
    return 0


def _one(folder: Path, configs: dict[str, Any], data: Any, plan: machine.Plan,
         trunk: Path | None) -> Literal["ended", "held", "stopped"]:
    """Train one pack unless another holds it; say how that ended."""
    from tinylm.stages import pretrain

    names = list(configs)

    def told(name: str, step: int, loss: float) -> None:
        say(run=name, step=step, loss=loss if loss == loss else None)

    say(begin=names)
    try:
        if plan.population == 1:
            (name, config), = configs.items()
            records = {name: pretrain.pretrain(folder / name, config, data, plan,
                                               functools.partial(told, name), trunk)}
        else:
            records = _together(folder, configs, data, plan, told)
        for name, record in records.items():
            say(done=name, status=record["status"])
    except leases.Owned:
        say(owned=names[0])
        return "held"
    except run.Stopped as stop:
        say(stopped=names[0], reason=str(stop))
        return "stopped"
    except (BadInput, RuntimeError, MemoryError, OSError, ValueError) as fault:
        for name in names:
            if run.record(folder / name) is None:
                _failed(folder, name, configs[name], fault)
    return "ended"


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
    reason = f"{type(fault).__name__}: {fault}".splitlines()[0]
    with contextlib.suppress(leases.Owned), leases.hold(folder / name):  # who has it now tells
        run.fail(folder / name, config, config.kind, reason)
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
