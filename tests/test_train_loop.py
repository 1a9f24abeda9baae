"""A run's clock, its checkpoints on a full disk, its batches, and how it goes on."""

import contextlib
import itertools
import json
import signal
import time
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.train import checkpoint, loop, run
from tinylm.train.batch import Batch
from tinylm.train.optim import OptimConfig
from tinylm.train.step import State

EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def pause(monkeypatch):
    """A clock of our own, and the function that turns it on."""
    loop._compiling().clear()
    now = [100.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    yield lambda seconds: now.__setitem__(0, now[0] + seconds)
    loop._compiling().clear()


def test_compiling_counts_once_however_deep_it_lies(tmp_path, pause):
    jax.monitoring.record_event_duration_secs(EVENT, 50.0)  # before the run: not its own
    with loop.Clock(tmp_path) as clock:
        with clock.doing("evaluate"):
            pause(20)
            jax.monitoring.record_event_duration_secs(EVENT, 5.0)  # inside the next
            jax.monitoring.record_event_duration_secs(EVENT, 15.0)
            jax.monitoring.record_event_duration_secs("/jax/other", 15.0)
        pause(10)
    row, = files.read_rows(tmp_path / "timing.jsonl")
    del row["first_step"], row["last_step"]
    assert row == {"compile_seconds": 15.0, "start_seconds": 0.0, "input_seconds": 0.0,
                   "save_seconds": 0.0, "evaluate_seconds": 5.0, "compute_seconds": 10.0,
                   "wall_seconds": 30.0}


@pytest.mark.parametrize("met", ["before", "while"])
def test_a_checkpoint_too_large_for_its_disk_is_an_os_error_and_the_one_before_stays(
        tmp_path, monkeypatch, capfd, met):
    first, second = (State({"w": np.full(30_000, step, np.float32)}, {}, {}, np.int32(step))
                     for step in (1, 2))
    checkpoint.save(tmp_path, first)

    def full(*args):  # what TensorStore says where the disk fills meanwhile
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

    if met == "before":
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: SimpleNamespace(free=9))
    else:
        monkeypatch.setattr(checkpoint.ocp.AsyncCheckpointer, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, second)
    assert capfd.readouterr().err == "" and len(list(tmp_path.iterdir())) == 1
    kept, _ = checkpoint.newest(tmp_path, first, None)
    assert (kept.params["w"] == 1).all()


def test_a_state_is_written_as_it_was_while_training_goes_on(tmp_path):
    state = State({"w": np.zeros(9, np.float32)}, {}, {}, np.int32(1))
    with checkpoint.Saver(tmp_path) as saver:
        for step in (1, 2, 3):
            saver.save(state._replace(step=np.int32(step)), logs=step)
            state.params["w"] += 1  # as a donated buffer is used again
        saver.wait()
        kept, facts = checkpoint.newest(tmp_path, state, None)
    assert (kept.params["w"] == 2).all() and facts["logs"] == 3
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_failed_write_is_told_by_the_next_call_or_at_the_end(tmp_path, monkeypatch):
    state, place = State({}, {}, {}, np.int32(1)), tmp_path / "checkpoints"

    def full(*args, **facts):
        raise OSError(28, "No space left on device", str(place))

    monkeypatch.setattr(checkpoint, "save", full)
    for then in ("check", "wait", "save"):
        with checkpoint.Saver(place) as saver:
            saver.save(state)
            while not saver._writing.done():
                pass
            with pytest.raises(OSError, match="No space left"):
                getattr(saver, then)(*([state] if then == "save" else []))
            saver.check()  # it is told once
    with pytest.raises(OSError, match="No space left"), checkpoint.Saver(place) as saver:
        saver.save(state)
    with pytest.raises(KeyError, match="first"), checkpoint.Saver(place) as saver:
        saver.save(state)
        raise KeyError("first")


@pytest.mark.parametrize(("grace", "codes"), [("0.05", [75]), ("", []), ("60", [])])
def test_a_signal_grants_the_grace_that_there_is(monkeypatch, capsys, grace, codes):
    monkeypatch.setenv("TINYLM_GRACE", grace)
    ended = []
    monkeypatch.setattr(loop.os, "_exit", ended.append)
    with loop._signals() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        until = time.monotonic() + 10
        while codes and not ended and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(run.Stopped, match="second signal"):
            signal.raise_signal(signal.SIGTERM)
    assert ended == codes and ("of grace" in capsys.readouterr().err) == bool(codes)


@pytest.mark.parametrize("grace", ["soon", "-1", "nan"])
def test_a_grace_that_is_no_time_is_refused(monkeypatch, grace):
    monkeypatch.setenv("TINYLM_GRACE", grace)
    with pytest.raises(BadInput, match=f"TINYLM_GRACE='{grace}'"):
        machine.grace()


class Toy:
    """A run whose state is a number that depends on every batch it was fed and on their order."""

    plan = machine.Plan(chunk=4, checkpoint_every=8)

    def __init__(self, folder, steps=30):
        self.folder, self.steps = folder, steps

    def run(self, stop_after=0):
        """Train; after so many chunks a signal comes. Give the number and the first step."""
        asked = iter([False] * (stop_after - 1) if stop_after else itertools.repeat(False))

        @contextlib.contextmanager
        def signals():
            yield lambda: next(asked, True)

        def chunk(state, batches, n):
            w, seen = int(state.params["w"]), []
            for t in np.asarray(batches.tokens)[:n, 0, 0]:
                w = (31 * w + int(t) + 1) % 65_521
                seen.append(float(w))
            seen += [0.0] * (self.plan.chunk - n)
            after = State({"w": jnp.int32(w)}, {}, {}, state.step + n)
            return after, {"nats_per_token": jnp.array(seen), "grad_norm": jnp.ones(len(seen))}

        start = State({"w": jnp.int32(1)}, {}, {}, jnp.int32(0))
        with mock.patch.object(loop, "_signals", signals), loop.Clock(self.folder) as clock:
            state, (sound,) = loop.train(
                self.folder, [loop.Member(self.folder / "metrics.jsonl", self.steps)], start, chunk,
                lambda t: Batch(np.full((1, 2), t), np.ones((1, 1))), 1, self.plan,
                machine.mesh(1), clock)
        assert sound and int(state.step) == self.steps
        return int(state.params["w"]), clock.first_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed toy comes to: its number and its log."""
    toy = Toy(tmp_path_factory.mktemp("whole"))
    w, _ = toy.run()
    return w, (toy.folder / "metrics.jsonl").read_bytes()


def test_every_step_is_fed_its_own_batch_once_and_has_its_row(whole):
    w = 1
    for t in range(30):
        w = (31 * w + t + 1) % 65_521
    assert whole[0] == w
    rows = [json.loads(line) for line in whole[1].splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert rows[-1]["tokens"] == 30


@pytest.mark.parametrize("harm", ["", "flip", "manifest", "torn log"])
def test_a_run_goes_on_from_its_newest_sound_checkpoint_to_the_same_bits(
        whole, tmp_path, capfd, harm):
    toy = Toy(tmp_path)
    with pytest.raises(run.Stopped):
        toy.run(stop_after=5)
    older, newest = checkpoint.steps(tmp_path / "checkpoints")
    assert (older.name, newest.name) == ("step-00000016", "step-00000020")
    if harm == "flip":
        place = max(newest.rglob("d/*"), key=lambda p: p.stat().st_size)
        data = bytearray(place.read_bytes())
        data[len(data) // 2] ^= 1
        place.write_bytes(data)
    elif harm == "manifest":
        (newest / files.MANIFEST).unlink()
    elif harm == "torn log":
        with open(tmp_path / "metrics.jsonl", "a") as log:
            log.write('{"step": 24, "tok')
    w, first = toy.run()
    assert (w, (tmp_path / "metrics.jsonl").read_bytes()) == whole
    damaged = harm in ("flip", "manifest")
    assert first == (16 if damaged else 20)
    assert ("passing by a damaged checkpoint" in capfd.readouterr().err) == damaged


def test_a_write_that_fails_behind_the_training_stops_it_at_the_next_chunk(tmp_path, monkeypatch):
    toy, check = Toy(tmp_path), checkpoint.Saver.check

    def full(*args, **facts):
        raise OSError(28, "No space left on device", str(tmp_path))

    def checked(saver):  # as if every chunk took longer than a write
        while saver._writing and not saver._writing.done():
            pass
        check(saver)

    with monkeypatch.context() as changed:
        changed.setattr(checkpoint, "save", full)
        changed.setattr(checkpoint.Saver, "check", checked)
        with pytest.raises(OSError, match="No space left"):
            toy.run()
    first = toy.plan.checkpoint_every
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == first // 4
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_a_slow_write_is_waited_for_and_the_last_checkpoint_stays_alone(whole, tmp_path,
                                                                       monkeypatch):
    save = checkpoint.save

    def slow(*args, **facts):
        time.sleep(0.1)
        return save(*args, **facts)

    monkeypatch.setattr(checkpoint, "save", slow)
    assert Toy(tmp_path).run()[0] == whole[0]
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-00000030"]


def test_a_log_that_was_edited_before_its_checkpoint_stops_the_run(tmp_path):
    toy = Toy(tmp_path)
    with pytest.raises(run.Stopped):
        toy.run(stop_after=5)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"tokens": 4', b'"tokens": 5'))
    with pytest.raises(files.Damaged, match="metrics.jsonl has other bytes"):
        toy.run()


def test_a_folder_is_bound_to_its_kind_code_versions_and_machine(tmp_path, monkeypatch):
    def settle(config, kind):
        return run.settle(tmp_path / "run", config, kind, machine.PLAIN, tmp_path / "text")

    settle(OptimConfig(), "pretrain")
    settle(OptimConfig(), "pretrain")
    with pytest.raises(BadInput, match="begun with kind='pretrain', this is kind='sft'"):
        settle(machine.PLAIN, "sft")
    for where, name, other in ((run, "code_id", "0"), (machine, "versions", {"python": "2"}),
                               (machine, "environment", {"device": "another"}),
                               (machine, "environment", {"matmul_precision": "another"})):
        with monkeypatch.context() as changed:
            true = getattr(where, name)()
            value = {**true, **other} if isinstance(true, dict) else other
            changed.setattr(where, name, lambda value=value: value)
            with pytest.raises(BadInput, match="tinylm adopt"):
                settle(OptimConfig(), "pretrain")
    files.write_json(tmp_path / "run/record.json", {
        "schema": run.SCHEMA, "id": "x", "config": {}, "loss": None, "files": {"plan.json": "0"}})
    with pytest.raises(files.Damaged, match="plan.json has other bytes than its record says"):
        settle(OptimConfig(), "pretrain")
    (tmp_path / "run/record.json").unlink()
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(files.Damaged, match="missing where checkpoints are"):
        settle(OptimConfig(), "pretrain")
