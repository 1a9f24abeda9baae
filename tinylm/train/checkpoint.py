"""Checkpoints: Orbax inside (it checksums no array data), our sealed manifest outside."""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tinylm import files
from tinylm.config import BadInput
from tinylm.model import heads
from tinylm.model.decoder import ModelConfig, Params, init
from tinylm.train import run
from tinylm.train.step import State


def save(folder: Path, state: State, **facts: Any) -> Path:
    """Write folder/step-N whole (params and the rest apart), verified at every load."""
    step = int(np.max(state.step))  # of a population: its furthest member's
    place = at(folder, step)
    rest = {"opt": state.opt, "hyper": state.hyper, "step": state.step}
    # compressing noise would cost training more than writing it
    plain = ocp.PyTreeCheckpointHandler(use_compression=False)
    try:
        with (files.staged(place, step=step, **facts) as draft, _hushed(),
              ocp.AsyncCheckpointer(plain) as writer):
            if sum(a.nbytes for a in jax.tree.leaves(state)) > shutil.disk_usage(draft).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
            writer.save(draft / "params", state.params)
            writer.save(draft / "rest", rest)
            writer.wait_until_finished()
    except ValueError as fault:  # how TensorStore reports a full disk and the like
        if not (code := re.search(r"os_error_code='(\d+)'", str(fault))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(place)) from None
    return place


class Saver:
    """Writes checkpoints behind the training, one at a time, from a copy in the host's memory.

    Each names the run whose it is. A write that failed is raised by the next `check`, `save` or
    `wait`, or at the end.
    """

    def __init__(self, folder: Path, owner: str = "", kept: tuple[int, ...] = ()):
        self.folder, self.owner, self.kept = folder, owner, kept
        self._thread, self._writing = ThreadPoolExecutor(1, initializer=_yielding), None
        self._copy: State | None = None

    def save(self, state: State, **facts: Any) -> None:
        """Begin to write a state, whose buffers may be donated after that; keep the last two."""
        self.wait()
        if self._copy is None:
            self._copy = jax.tree.map(np.array, state)
        else:  # into its memory again: the first touch of new pages costs more than copying
            jax.tree.map(np.copyto, self._copy, state)
        self._writing = self._thread.submit(self._write, self._copy, facts)

    def check(self) -> None:
        """Raise what a write came to that has ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Let the write end, and raise what it came to."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: State, facts: dict[str, Any]) -> None:
        save(self.folder, state, run=self.owner, **facts)
        keep_last(self.folder, 2, self.kept)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except Exception:
            if fault is None:  # else what stopped the run is told
                raise
        finally:
            self._thread.shutdown()


def _yielding() -> None:
    """Let this thread run where training leaves a core idle, yet not starve beside other jobs."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(15)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep the writer's threads from printing tracebacks of what it raises as well.

    After a fault they stay hushed: the writes of other arrays fail later, into a closed loop.
    """
    loggers = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    loud = sys.unraisablehook
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda fault: None if fault.object is None else loud(fault)
    yield
    sys.unraisablehook = loud
    for name, level in loggers.items():
        logging.getLogger(name).setLevel(level)


def steps(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, oldest step first."""
    return sorted(Path(folder).glob("step-*"))


def held(folder: Path) -> list[int]:
    """List the steps whose checkpoints a run's folder holds, oldest first."""
    return [int(p.name.partition("-")[2]) for p in steps(Path(folder) / "checkpoints")]


def at(folder: Path, step: int) -> Path:
    """Give the place of a folder's checkpoint of one step."""
    return Path(folder).absolute() / f"step-{step:08d}"


def keep_last(folder: Path, count: int, spared: tuple[int, ...] = ()) -> None:
    """Delete all but the newest `count` checkpoints and those of the `spared` steps."""
    for old in set(steps(folder)[:-count]) - {Path(folder) / at(folder, s).name for s in spared}:
        shutil.rmtree(old)


def restore(place: Path, like: State) -> tuple[State, dict[str, Any]]:
    """Load a checkpoint into the structure, dtypes and sharding of `like`, with its facts."""
    facts = files.verified(place)
    rest = {"opt": like.opt, "hyper": like.hyper, "step": like.step}
    params = _read(place / "params", like.params)
    rest = _read(place / "rest", rest)
    return State(params, rest["opt"], rest["hyper"], rest["step"]), facts


def restore_params(place: Path, like: Params, owner: str = "") -> Params:
    """Load a checkpoint's parameters alone; BadInput where it is not the run's that is named."""
    _of(place, files.verified(place), owner)
    return _read(place / "params", like)


def slim(folder: Path, out: Path) -> None:
    """Copy a finished run without what only training goes on from: a third of its size.

    The copy's parameters, records and log are the run's, so it can be used and verified as that.
    """
    folder, out = Path(folder), Path(out)
    if run.record(folder) is None:
        raise BadInput(f"{folder} is no finished run; train it first")
    if not (places := steps(folder / "checkpoints")):
        raise files.Damaged(f"{folder} {run.LOST}")
    if run.record(out) is not None:
        raise BadInput(f"{out} holds a run already; choose a new folder")
    facts = {k: v for k, v in files.verified(places[-1]).items() if k not in ("schema", "files")}
    with files.staged(out / "checkpoints" / places[-1].name, **facts) as draft:
        try:
            shutil.copytree(places[-1] / "params", draft / "params")
        except shutil.Error as fault:  # which has a list of faults and no number
            (_, where, why), *_ = fault.args[0]
            raise OSError(errno.EIO, str(why), str(where)) from None
    here = files.read_json(folder / "environment.json")
    text = os.path.normpath(folder.absolute() / here["text"])
    files.write_json(out / "environment.json", {**here, "text": os.path.relpath(text, out)})
    for name in ("config.json", "plan.json", "metrics.jsonl", "timing.jsonl", "record.json"):
        if (folder / name).exists():  # the record last: then the copy is whole
            files.write_bytes(out / name, (folder / name).read_bytes())


def params_sha256(folder: Path) -> str:
    """Hash the newest checkpoint's parameters by name, type, shape and bytes (64 hex digits)."""
    place = steps(folder)[-1].absolute()
    files.verified(place)
    with _readable(place), ocp.StandardCheckpointer() as reader:
        tree = reader.restore(place / "params")
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\0".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def final_params(folder: Path, model: ModelConfig, step: int = 0) -> Params:
    """Load the final parameters of a finished run of this shape; of PPO's the policy alone.

    With `step` those of a checkpoint that the run kept on its way.
    """
    record, place, like = _final(folder, model, step)
    if record["kind"] == "reward":
        raise BadInput(f"{folder} is a reward model and says nothing; give a run that speaks")
    wanted = {**like, "value": _scored(model)} if record["kind"] == "ppo" else like
    found = restore_params(place, wanted, record["id"])
    return {name: found[name] for name in like}


def final_scorer(folder: Path, model: ModelConfig) -> Params:
    """Load a finished reward model: scores of mean 0 and deviation 1 where it was normalised."""
    record, place, _ = _final(folder, model)
    if record["kind"] != "reward":
        raise BadInput(f"{folder} is a run of kind {record['kind']!r}; give a reward model, which "
                       "`tinylm reward` trains")
    mean, deviation = (record["preferences"]["scores"][k] for k in ("mean", "deviation"))
    return heads.normalised(restore_params(place, _scored(model), record["id"]), mean, deviation)


def usable(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Give the record and the checkpoints of a run to start from; refuse one that cannot be."""
    if (record := run.record(folder)) is None:
        raise BadInput(f"{folder} is no finished run; train it first")
    if record["status"] != "ok":
        raise BadInput(f"{folder} ended as {record['status']}; train another at a lower rate")
    if not (places := steps(Path(folder) / "checkpoints")):
        raise files.Damaged(f"{folder} {run.LOST}")
    return record, places


def _final(folder: Path, model: ModelConfig,
           step: int = 0) -> tuple[dict[str, Any], Path, Params]:
    record, places = usable(folder)
    place = at(Path(folder) / "checkpoints", step) if step else places[-1]
    if not place.exists():
        raise BadInput(f"{folder} holds checkpoints of steps {held(folder)}, not {step}; train it "
                       f"with --keep {step}")
    return record, place, jax.eval_shape(functools.partial(init, model), jax.random.key(0))


def _scored(model: ModelConfig) -> Params:
    return jax.eval_shape(lambda key: heads.with_head(model, init(model, key), key),
                          jax.random.key(0))


def newest(folder: Path, like: State, warn: Any,
           owner: str = "") -> tuple[State, dict[str, Any]] | None:
    """Load the newest sound checkpoint; a damaged one is announced through `warn` and passed by.

    One of another run than `owner` raises BadInput.
    """
    for place in reversed(steps(folder)):
        try:
            found = restore(place, like)
        except files.Damaged as damage:
            warn(f"passing by a damaged checkpoint: {damage}")
            continue
        _of(place, found[1], owner)
        return found
    return None


def _of(place: Path, facts: dict[str, Any], owner: str) -> None:
    """Refuse a checkpoint of another run; older ones do not name theirs."""
    if owner and facts.get("run", owner) != owner:
        raise BadInput(f"{place} {run.OTHERS.format(facts['run'], owner)}; put the run's own back, "
                       f"or delete {place.parent.parent} and run again")


def _read(place: Path, like: Any) -> Any:
    place, target = Path(place).absolute(), jax.tree.map(_target, like)  # Orbax needs whole paths
    with _readable(place), ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(place).item_metadata.tree
        _same_dtypes(place, stored, like)
        return reader.restore(place, target)


@contextlib.contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Name a checkpoint whose seal is whole and whose insides Orbax cannot read."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        if isinstance(fault, BadInput):
            raise
        said = str(fault).strip().splitlines()
        raise files.Damaged(f"{place} is no checkpoint that can be read ({type(fault).__name__}: "
                            f"{said[0] if said else ''}); delete it and run again") from None


def _same_dtypes(place: Path, stored: Any, like: Any) -> None:
    kept = [np.dtype(leaf.dtype) for leaf in jax.tree.leaves(stored)]
    want = [np.dtype(leaf.dtype) for leaf in jax.tree.leaves(like)]
    if sorted(map(str, kept)) != sorted(map(str, want)):
        raise BadInput(f"{place} holds other dtypes or arrays than this model; "
                       "load it with the config it was trained with")


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
