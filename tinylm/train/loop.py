"""Chunks of steps: resume, metrics one chunk behind the device, checkpoints, signals, the end.

What a stage is comes in as functions; the loop knows only states, batches and its folder.
"""

import contextlib
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
    event: Event | None = None,
) -> tuple[State, bool]:
    """Run to `steps` from the newest checkpoint or `state`; return the state and if it is finite.

    Metrics rows, checkpoints and parameters are the same however often the run was killed.
    Raises Stopped after a signal, once the state is saved.
    """
    saves, log = Path(folder) / "checkpoints", Path(folder) / "metrics.jsonl"
    found = checkpoint.newest(saves, replicate(mesh, state), _say)
    state, size = (found[0], found[1]["metrics_bytes"]) if found else (replicate(mesh, state), 0)
    files.truncate(log, size, found[1]["metrics_sha256"] if found else "")
    done, saved, finite = int(state.step), int(state.step), True
    pending: tuple[int, int, Metrics] | None = None
    clock = Clock(Path(folder) / "timing.jsonl")

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
        checkpoint.save(saves, state, metrics_bytes=size, metrics_sha256=files.sha256(log))
        checkpoint.keep_last(saves, 2)
        saved = done

    with _signals() as stop:
        while done < steps and finite:
            n = min(plan.chunk, steps - done)
            batches = _stack([batch_at(done + i) for i in range(n)], plan.chunk)
            state, metrics = chunk(state, place(mesh, batches), n)
            finite = settle()
            pending, done = (done, n, metrics), done + n
            clock.tick(done)
            if stop() and done < steps:
                finite = settle() and finite
                save()
                raise Stopped(f"stopped at step {done} of {steps}; the same command goes on")
            if done < steps and done - saved >= plan.checkpoint_every:
                finite = settle() and finite
                if finite:
                    save()
        finite = settle() and finite
        if finite and saved < steps:
            save()
        checkpoint.keep_last(saves, 1)
    clock.close(done)
    return state, finite


class Clock:
    """Rows of timing.jsonl: wall seconds of every process that worked on the run."""

    def __init__(self, path: Path):
        self.path, self.began, self.first = path, time.perf_counter(), None

    def tick(self, done: int) -> None:
        """Note when the first chunk, which compiles, had been sent."""
        if self.first is None:
            self.first = (done, time.perf_counter() - self.began)

    def close(self, done: int) -> None:
        """Append this process's row."""
        if self.first is None:
            return
        row = {"first_step": self.first[0], "first_chunk_seconds": round(self.first[1], 3),
               "last_step": done, "wall_seconds": round(time.perf_counter() - self.began, 3)}
        files.append_lines(self.path, [json.dumps(row)])


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
