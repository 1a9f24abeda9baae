"""Chunks of steps: resume, metrics one chunk behind the device, checkpoints, signals, the end.

What a stage is comes in as functions; the loop knows only states, batches and its folder.
"""

import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinylm import files
from tinylm.machine import Plan
from tinylm.train import checkpoint
from tinylm.train.batch import Batch
from tinylm.train.run import Stopped
from tinylm.train.step import Metrics, State, place, replicate

Event = Callable[[int, float], None]
"""called after every chunk with the steps done and the last chunk's loss"""


def train(
    folder: Path,
    state: State,
    chunk: Callable[[State, Any, int], tuple[State, Metrics]],
    batch_at: Callable[[int], Batch],
    steps: int,
    tokens_a_step: int,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    clock: "Clock",
    event: Event | None = None,
    kept: tuple[int, ...] = (),
) -> tuple[State, bool]:
    """Run to `steps` from the newest checkpoint or `state`; return the state and if it is finite.

    The checkpoints of the `kept` steps stay, for runs that branch off there.
    Metrics rows, checkpoints and parameters are the same however often the run was killed.
    Raises Stopped after a signal, once the state is saved.
    """
    saves, log = Path(folder) / "checkpoints", Path(folder) / "metrics.jsonl"
    with clock.doing("start"):
        state, facts = checkpoint.newest(saves, replicate(mesh, state), _say) or (
            replicate(mesh, state), {"metrics_bytes": 0, "metrics_sha256": ""})
    size = facts["metrics_bytes"]
    files.truncate(log, size, facts["metrics_sha256"])
    done, saved, finite = int(state.step), int(state.step), True
    pending: tuple[int, int, Metrics] | None = None
    clock.first_step = done

    def settle() -> bool:
        nonlocal pending, size
        if pending is None:
            return True
        first, n, metrics = pending
        row, pending = _row(metrics, first, n, tokens_a_step), None
        size = files.append_lines(log, [json.dumps(row)])
        if event:
            event(first + n, row["train/nats_per_token"] or float("nan"))
        return row["train/nats_per_token"] is not None

    def save() -> None:
        nonlocal saved
        with clock.doing("save"):
            checkpoint.save(saves, state, metrics_bytes=size, metrics_sha256=files.sha256(log))
            checkpoint.keep_last(saves, 2, kept)
        saved = done

    with _signals() as stop:
        while done < steps and finite:
            n = min(plan.chunk, *(k - done for k in (*kept, steps) if k > done))
            with clock.doing("input"):
                batches = place(mesh, _stack([batch_at(done + i) for i in range(n)], plan.chunk))
            state, metrics = chunk(state, batches, n)
            finite = settle()
            pending, done = (done, n, metrics), done + n
            clock.last_step = done
            if stop() and done < steps:
                finite = settle() and finite
                save()
                raise Stopped(f"stopped at step {done} of {steps}; the same command goes on")
            if done < steps and (done in kept or done - saved >= plan.checkpoint_every):
                finite = settle() and finite
                if finite:
                    save()
        finite = settle() and finite
        if finite and saved < steps:
            save()
        checkpoint.keep_last(saves, 1, kept)
    return state, finite


class Clock:
    """One row of timing.jsonl: where the wall time of a process that worked on a run went.

    Seconds of compile (tracing, lowering and loading from the cache too), start (initialise,
    restore), input, save and evaluate; the rest of the wall time was computing.
    """

    def __init__(self, folder: Path):
        self.path, self.began = Path(folder) / "timing.jsonl", time.perf_counter()
        self.spent = {"start": 0.0, "input": 0.0, "save": 0.0, "evaluate": 0.0}
        self.compiling = _compiling()
        self.first_step = self.last_step = 0

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Count the time inside, but for what was compiled meanwhile, as spent on one of those."""
        began = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - began - self._compiled(began)

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *fault: Any) -> None:
        wall = time.perf_counter() - self.began
        spent = {"compile": self._compiled(self.began), **self.spent}
        spent |= {"compute": wall - sum(spent.values()), "wall": wall}
        row = {f"{k}_seconds": round(v, 3) for k, v in spent.items()}
        files.append_lines(self.path, [json.dumps({
            "first_step": self.first_step, "last_step": self.last_step, **row})])

    def _compiled(self, since: float) -> float:
        return sum(end - began for began, end in self.compiling if began >= since)


@functools.cache
def _compiling() -> list[tuple[float, float]]:
    """Keep a list of the spans of time in which this process traces, lowers or compiles."""
    spans: list[tuple[float, float]] = []

    def note(event: str, seconds: float, **facts: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            while spans and spans[-1][0] >= end - seconds:  # what lies inside counts once
                spans.pop()
            spans.append((end - seconds, end))

    jax.monitoring.register_event_duration_secs_listener(note)
    return spans


def _row(metrics: Metrics, first: int, n: int, tokens_a_step: int) -> dict[str, Any]:
    means = {f"train/{k}": float(np.mean(np.asarray(v)[:n])) for k, v in metrics.items()}
    sound = {k: v if np.isfinite(v) else None for k, v in means.items()}
    return {"step": first + n, "tokens": (first + n) * tokens_a_step, **sound}


def _stack(batches: list[Batch], size: int) -> Batch:
    filled = batches + batches[-1:] * (size - len(batches))
    return jax.tree.map(lambda *rows: np.stack(rows), *filled)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM, SIGINT and SIGHUP as a wish to stop; one that is ignored (nohup) stays so."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise Stopped("stopped at once by a second signal; the same command goes on")
        caught.append(number)

    try:
        old = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
               if signal.getsignal(s) != signal.SIG_IGN}
    except ValueError:  # not the main thread: whoever runs there handles its own signals
        old = {}
    try:
        yield lambda: bool(caught)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
