"""The clock of a run: what was compiled counts once, and as nothing else."""

from types import SimpleNamespace

import jax
import pytest

from tinylm import files
from tinylm.train import loop

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
    row, = files.read_lines(tmp_path / "timing.jsonl")
    del row["first_step"], row["last_step"]
    assert row == {"compile_seconds": 15.0, "start_seconds": 0.0, "input_seconds": 0.0,
                   "save_seconds": 0.0, "evaluate_seconds": 5.0, "compute_seconds": 10.0,
                   "wall_seconds": 30.0}
