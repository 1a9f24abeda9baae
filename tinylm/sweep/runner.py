"""Run a list of configs over long-lived workers; finished runs are skipped, faults are rows.

sweep.json (runs, plans, workers) is written before the first step; the same call goes on later.
workers.jsonl has a row a call: how many workers, for how long.
"""

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinylm import config as configs
from tinylm import files, leases, machine
from tinylm.config import BadInput
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import packing
from tinylm.sweep.cells import name
from tinylm.train import run


@dataclasses.dataclass
class Progress:
    """What is known of a sweep while it runs."""

    configs: dict[str, PretrainConfig]
    steps: dict[str, int]
    losses: dict[str, float | None]
    status: dict[str, str]
    began: float
    flops_before: float

    @property
    def flops(self) -> float:
        """FLOPs done, in all."""
        return sum(c.spent * max(0, self.steps[k] - c.first) / (c.steps - c.first)
                   for k, c in self.configs.items())

    @property
    def total(self) -> float:
        """FLOPs asked for."""
        return sum(c.spent for c in self.configs.values())

    @property
    def seconds_left(self) -> float | None:
        """Time to the end at the throughput measured so far."""
        done = self.flops - self.flops_before
        spent = time.monotonic() - self.began
        return (self.total - self.flops) * spent / done if done > 0 else None


def sweep(
    folder: Path,
    runs: list[PretrainConfig],
    data_folder: Path,
    watch: Callable[[Progress], None] = lambda progress: None,
    population: int = 0,
) -> list[dict[str, Any]]:
    """Train every config in `folder`, longest first; return the records, failed runs left out.

    A CPU's core has a run each, a run alone has them all. Trunks are trained before their branches
    and have records, but are not returned. Runs of one shape train `population` at once at most;
    0: one on a CPU, more on an accelerator.
    Raises Stopped when a signal stopped the workers; nothing is lost.
    """
    folder = Path(folder)
    wanted = {name(c): c for c in sorted(runs, key=lambda c: -c.spent)}
    with leases.hold(folder):
        listed = _settle(folder, wanted, population)
        progress = Progress(wanted, *_so_far(folder, wanted), time.monotonic(), 0.0)
        progress.flops_before = progress.flops
        if any(run.record(folder / n) is None for n in wanted):
            _supervise(folder, data_folder, listed["workers"], progress, watch)
        held = [n for n in wanted if run.record(folder / n) is None
                and progress.status[n] != "failed"]
        if held:
            raise leases.Owned(f"{len(held)} runs of {folder} ({held[0]}, ...) are held by another "
                              "process; run again when it has ended")
    return run.table(folder / n for n, c in wanted.items() if c.kind != "trunk")


def _settle(folder: Path, wanted: dict[str, PretrainConfig], population: int) -> dict[str, Any]:
    runs = {n: configs.to_json(c) for n, c in wanted.items()}
    place = folder / "sweep.json"
    if place.exists():
        listed = run.listed(place)
        begun = {n: configs.from_json(PretrainConfig, c, n) for n, c in listed["runs"].items()}
        if begun != wanted:
            mine, here = (", ".join(sorted(a.keys() - b.keys())[:2]) or "the same names"
                          for a, b in ((begun, wanted), (wanted, begun)))
            raise BadInput(f"{folder} holds another list of {len(begun)} runs ({mine}) than these "
                           f"{len(wanted)} ({here}); go on with the same settings or choose a new "
                           "folder")
        if population not in (0, listed.get("population", population)):
            raise BadInput(f"{folder} was begun with --population {listed['population']}, not "
                           f"{population}; go on with that or choose a new folder")
        plans = listed.get("plans")
        if not (isinstance(plans, dict) and plans.keys() == wanted.keys()
                and all(isinstance(p, dict) for p in plans.values())
                and isinstance(listed.get("packs"), list)
                and isinstance(listed.get("workers"), int)):
            raise files.Damaged(f"{place} lists no plans, packs or workers; delete it and run "
                                "again")
        if not all(run.record(folder / n) for n in wanted):
            here = run.surroundings()
            run.same(place, listed, here, tuple(
                k for k in here if k in listed and (
                    k not in machine.LIBRARIES or any(p.get(k) for p in plans.values()))))
        return listed
    backend, count = machine.survey()
    alone = backend != "cpu" or len(wanted) == 1
    workers, each = (1, count) if alone else (count, 1)
    plans = {n: machine.plan_for(c.rows, c.model.T, c.model.D, c.model.compute, backend, each)
             for n, c in wanted.items()}
    most = population or (1 if backend == "cpu" else packing.MOST)
    packs, plans = packing.pack(wanted, plans, most, machine.memory() / workers)
    listed = {**run.surroundings(), "population": most, "workers": workers, "packs": packs,
              "idle": packing.idle(packs, wanted, plans),
              "plans": {n: dataclasses.asdict(p) for n, p in plans.items()}, "runs": runs}
    files.write_json(place, listed)
    return listed


def _so_far(folder, wanted):
    records = {n: run.record(folder / n) for n in wanted}
    steps = {n: wanted[n].steps if r else 0 for n, r in records.items()}
    losses = {n: r["loss"]["nats_per_token"] if r and r["loss"] else None
              for n, r in records.items()}
    return steps, losses, {n: r["status"] if r else "waiting" for n, r in records.items()}


def _supervise(folder, data_folder, workers, progress, watch):
    news: queue.Queue = queue.Queue()
    for n in progress.configs:
        (folder / n / "failure.json").unlink(missing_ok=True)
    alive = {i: _start(folder, data_folder, i, news) for i in range(workers)}
    holds: dict[int, tuple[str, ...]] = {}
    deaths: dict[str, int] = {}
    stopping = False
    try:
        while alive:
            watch(progress)
            try:
                index, line = news.get(timeout=0.5)
            except queue.Empty:
                continue
            if line is not None:
                _note(progress, holds, index, json.loads(line))
                continue
            code = alive.pop(index).wait()
            stopping = stopping or code == 75
            if code not in (0, 75):
                lost = holds.get(index, ())
                for n in lost or ("",):
                    deaths[n] = deaths.get(n, 0) + 1
                for n in (n for n in lost if deaths[n] > 1):
                    progress.status[n] = "failed"
                    config = progress.configs[n]
                    run.fail(folder / n, config, config.kind,
                             f"its worker died twice (last exit {code})")
                if deaths.get("", 0) < 2 and not stopping:
                    alive[index] = _start(folder, data_folder, index, news)
    except KeyboardInterrupt:
        stopping = True
    finally:
        _stop(alive)
        watch(progress)
        wall = round(time.monotonic() - progress.began, 3)
        files.append_row(folder / "workers.jsonl", {"workers": workers, "wall_seconds": wall})
    if stopping:
        raise run.Stopped("the sweep was stopped; the same command goes on")
    if deaths.get("", 0) > 1:
        log = folder / f"worker-{index}.log"
        said = log.read_text("utf-8", "replace").strip().splitlines() or ["nothing"]
        raise BadInput(f"workers end before they begin a run; {log} ends with: {said[-1]}")


def _start(folder, data_folder, index, news):
    command = [sys.executable, "-m", "tinylm.sweep.worker", str(folder), str(data_folder),
               str(index)]
    log = files.open_log(folder / f"worker-{index}.log")
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True,
                              env={**os.environ, "PYTHONUNBUFFERED": "1"},
                              start_new_session=True)  # a signal to our group comes once, from us
    log.close()

    def listen() -> None:
        with worker.stdout:
            for line in worker.stdout:
                news.put((index, line))
        news.put((index, None))

    threading.Thread(target=listen, daemon=True).start()
    return worker


def _note(progress, holds, index, said):
    if "begin" in said:
        holds[index] = tuple(said["begin"])
        progress.status.update(dict.fromkeys(said["begin"], "running"))
    elif "run" in said:
        progress.steps[said["run"]], progress.losses[said["run"]] = said["step"], said["loss"]
    elif "done" in said:
        _let_go(holds, index, said["done"])
        progress.status[said["done"]] = said["status"]
        progress.steps[said["done"]] = progress.configs[said["done"]].steps
    elif "failed" in said:
        _let_go(holds, index, said["failed"])
        progress.status[said["failed"]] = "failed"
    elif "owned" in said:
        holds.pop(index, None)


def _let_go(holds, index, name):
    holds[index] = tuple(n for n in holds.get(index, ()) if n != name)


def _stop(alive):
    for worker in alive.values():
        worker.send_signal(signal.SIGTERM)
    for worker in alive.values():
        try:
            worker.wait(timeout=30)
        except subprocess.TimeoutExpired:
            worker.kill()
