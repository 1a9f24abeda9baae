"""Where the time went: a study's by stage, a run's or sweep's to compiling, waiting, computing."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tinylm import files

KINDS = ("compile", "start", "input", "compute", "sample", "save", "evaluate")
"""what a row of timing.jsonl tells apart (see train/loop.Clock)"""


def spent(folder: Path) -> dict[str, float]:
    """Add up the seconds of every process that worked on a run or on a sweep, by kind.

    `wait` is all time of a sweep's workers outside their runs: Python and JAX starting, nothing
    to do, the last run of another worker. `wall` is the sum. A kind that older rows do not tell
    apart is 0.
    """
    folder = Path(folder)
    rows = [row for place in folder.rglob("timing.jsonl") for row in files.read_rows(place)]
    out = {kind: sum(row.get(f"{kind}_seconds", 0.0) for row in rows) for kind in KINDS}
    inside = sum(row["wall_seconds"] for row in rows)
    whole = sum(row["workers"] * row["wall_seconds"]
                for row in files.read_rows(folder / "workers.jsonl"))
    wait = max(0.0, whole - inside)
    return {"wall": inside + wait, "wait": wait, **out}


@contextlib.contextmanager
def stage(folder: Path, name: str) -> Iterator[None]:
    """Add a row to stages.jsonl: the wall and processor seconds spent inside, workers too.

    A process that is killed inside leaves no row.
    """
    began, used = time.perf_counter(), sum(os.times()[:4])
    try:
        yield
    finally:
        row = {"stage": name, "wall_seconds": round(time.perf_counter() - began, 3),
               "processor_seconds": round(sum(os.times()[:4]) - used, 3)}
        files.append_row(Path(folder) / "stages.jsonl", row)


def stages(folder: Path) -> dict[str, tuple[float, float]]:
    """Add up a study's seconds (wall, processor) by stage over all calls of it, in order."""
    out: dict[str, tuple[float, float]] = {}
    for row in files.read_rows(Path(folder) / "stages.jsonl"):
        wall, processor = out.get(row["stage"], (0.0, 0.0))
        out[row["stage"]] = (wall + row["wall_seconds"], processor + row["processor_seconds"])
    return out
