"""Chunks of steps: resume, metrics one chunk behind the device, checkpoints, signals, the end.

What a stage is comes in as functions; the loop knows only states, batches and its folder.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tinylm import files, machine
from tinylm.machine import Plan
from tinylm.train import checkpoint, run
from tinylm.train.batch import Batch
from tinylm.train.step import Metrics, State, place, replicate

LOSSES = ("nats_per_token", "nats_per_pair", "policy_loss")
"""metrics by which a run is watched, whichever it has; one that is not finite ends it"""
Event = Callable[[int, float], None]
"""called after every chunk with the steps done and the last chunk's loss"""


class Member(NamedTuple):
    """One run of a loop: where its rows go, at which step it ends, who is told."""

    log: Path
    steps: int
    event: Event | None = None


def train(
    folder: Path,
    members: Sequence[Member],
    state: State,
    chunk: Callable[[State, Any, int], tuple[State, Metrics]],
    batch_at: Callable[[int], Batch],
    tokens_a_step: int,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    clock: "Clock",
    kept: tuple[int, ...] = (),
    over: Callable[[], bool] = lambda: False,
    probe: Callable[[State], dict[str, float]] | None = None,
    probe_every: int = 0,
) -> tuple[State, list[bool]]:
    """Run to the members' ends from the newest checkpoint or `state`; say whose loss is finite.

    A population's state, batches and metrics have a leading axis of members, padding at its end.
    The checkpoints of the `kept` steps stay, for runs that branch off there. Where `over` says so
    the run ends before its last step. What `probe` measures of the state, about every `probe_every`
    steps, is a row of the first member's log.
    Metrics rows, checkpoints and parameters are the same however often the run was killed.
    Raises Stopped after a signal, once the state is saved.
    """
    saves = Path(folder) / "checkpoints"
    with clock.doing("start"):
        state = replicate(mesh, state)
        owner = run.owner(folder)
        state, facts = checkpoint.newest(saves, state, _say, owner) or (
            state, {"step": int(np.max(state.step)), "logs": [[0, "", True]] * len(members)})
    sizes, shas, sound = (list(of) for of in zip(*facts["logs"], strict=True))
    for member, size, sha in zip(members, sizes, shas, strict=True):
        files.truncate(member.log, size, sha)
    done = saved = clock.first_step = facts["step"]
    pending: tuple[int, int, Metrics] | None = None

    def left() -> int:
        return max((m.steps - done for m, ok in zip(members, sound, strict=True) if ok), default=0)

    def settle() -> None:
        nonlocal pending
        if pending is None:
            return
        (first, n, metrics), pending = pending, None
        for i, (member, values) in enumerate(zip(members, _by_member(metrics), strict=False)):
            taken = min(n, member.steps - first)
            if taken < 1 or not sound[i]:
                continue
            row = _row(values, first, taken, tokens_a_step)
            sizes[i] = files.append_lines(member.log, [json.dumps(row)])
            told = next(row[f"train/{name}"] for name in LOSSES if f"train/{name}" in row)
            sound[i] = told is not None
            if member.event:
                member.event(first + taken, float("nan") if told is None else told)

    def save() -> None:
        nonlocal saved
        with clock.doing("save"):
            logs = [[size, files.sha256(m.log), ok]
                    for m, size, ok in zip(members, sizes, sound, strict=True)]
            saver.save(state, logs=logs)
        saved = done

    with _signals() as stop, checkpoint.Saver(saves, owner, kept) as saver:
        while left() > 0 and not over():
            n = min(plan.chunk, left(), *(k - done for k in kept if k > done))
            with clock.doing("input"):
                batches = place(mesh, _stack([batch_at(done + i) for i in range(n)], plan.chunk),
                                1 if plan.population == 1 else 2)
            state, metrics = chunk(state, batches, n)
            settle()
            saver.check()
            pending, done = (done, n, metrics), done + n
            clock.last_step = done
            if probe and probe_every and done // probe_every > (done - n) // probe_every:
                settle()
                with clock.doing("evaluate"):
                    row = {"step": done, "tokens": done * tokens_a_step, **probe(state)}
                sizes[0] = files.append_lines(members[0].log, [json.dumps(row)])
            if stop() and left() > 0:
                settle()
                save()
                with clock.doing("save"):
                    saver.wait()
                raise run.Stopped(f"stopped at step {done}; the same command goes on")
            if left() > 0 and (done in kept or done - saved >= plan.checkpoint_every):
                settle()
                if left() > 0:
                    save()
        settle()
        if any(sound) and saved < done:
            save()
        with clock.doing("save"):
            saver.wait()
            checkpoint.keep_last(saves, 1, kept)
    return state, sound


class Clock:
    """One row of timing.jsonl: where the wall time of a process that worked on a run went.

    Seconds of compile (tracing, lowering and loading from the cache too), start (initialise,
    restore), input, save and evaluate, of a policy's run sample too; the rest was computing.
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
        try:
            yield
        finally:
            seconds = time.perf_counter() - began - self._compiled(began)
            self.spent[what] = self.spent.get(what, 0.0) + seconds

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        wall = time.perf_counter() - self.began
        spent = {"compile": self._compiled(self.began), **self.spent}
        spent |= {"compute": wall - sum(spent.values()), "wall": wall}
        row = {f"{k}_seconds": round(v, 3) for k, v in spent.items()}
        try:
            files.append_row(self.path, {
                "first_step": self.first_step, "last_step": self.last_step, **row})
        except OSError:
            if fault is None:  # else what stopped the run is told
                raise

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


def _by_member(metrics: Metrics) -> list[dict[str, np.ndarray]]:
    """Turn metrics [steps] or [steps, members] into one dict a member, contiguous in steps."""
    columns = {k: np.ascontiguousarray(np.asarray(v).reshape(len(v), -1).T)
               for k, v in metrics.items()}
    return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]


def _row(metrics: dict[str, np.ndarray], first: int, n: int, tokens_a_step: int) -> dict[str, Any]:
    taken = ~(metrics["skipped"][:n] > 0) if "skipped" in metrics else slice(None)
    kept = {f"train/{k}": v[:n][taken] if k != "skipped" else v[:n] for k, v in metrics.items()}
    means = {k: float(np.mean(v)) if len(v) else np.nan for k, v in kept.items()}
    sound = {k: v if np.isfinite(v) else None for k, v in means.items()}
    return {"step": first + n, "tokens": (first + n) * tokens_a_step, **sound}


def _stack(batches: list[Batch], size: int) -> Batch:
    filled = batches + batches[-1:] * (size - len(batches))
    return jax.tree.map(lambda *rows: np.stack(rows), *filled)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _end(patience: float) -> None:
    print(f"stopped without a new checkpoint after {patience:g} s of grace (TINYLM_GRACE); the "
          "same command goes on", file=sys.stderr, flush=True)
    os._exit(75)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM, SIGINT and SIGHUP as a wish to stop; one that is ignored (nohup) stays so.

    Where stopping takes longer than the grace there is (machine.grace), the process ends all the
    same, its last checkpoint as it was.
    """
    caught: list[int] = []
    patience = machine.grace()
    grace = threading.Timer(patience, _end, (patience,))
    grace.daemon = True

    def note(number: int, frame: Any) -> None:
        if caught:
            raise run.Stopped("stopped at once by a second signal; the same command goes on")
        caught.append(number)
        if patience:
            grace.start()

    try:
        old = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
               if signal.getsignal(s) != signal.SIG_IGN}
    except ValueError:  # not the main thread: whoever runs there handles its own signals
        old = {}
    try:
        yield lambda: bool(caught)
    finally:
        grace.cancel()
        for s, handler in old.items():
            signal.signal(s, handler)
