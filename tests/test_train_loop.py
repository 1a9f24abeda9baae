"""A run's clock, which counts what was compiled once, and its checkpoints on a full disk."""

import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.train import checkpoint, loop
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
        monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, second)
    assert capfd.readouterr().err == "" and len(list(tmp_path.iterdir())) == 1
    kept, _ = checkpoint.newest(tmp_path, first, None)
    assert (kept.params["w"] == 1).all()


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
        with pytest.raises(loop.Stopped, match="second signal"):
            signal.raise_signal(signal.SIGTERM)
    assert ended == codes and ("of grace" in capsys.readouterr().err) == bool(codes)


@pytest.mark.parametrize("grace", ["soon", "-1", "nan"])
def test_a_grace_that_is_no_time_is_refused(monkeypatch, grace):
    monkeypatch.setenv("TINYLM_GRACE", grace)
    with pytest.raises(BadInput, match=f"TINYLM_GRACE='{grace}'"):
        machine.grace()
