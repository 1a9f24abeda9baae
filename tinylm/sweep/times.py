"""Where the time of the processes that worked on runs went: compiling, waiting, computing."""

from pathlib import Path

from tinylm import files

KINDS = ("compile", "start", "input", "compute", "save", "evaluate")
"""what a row of timing.jsonl tells apart (see train/loop.Clock)"""


def spent(folder: Path) -> dict[str, float]:
    """Add up the seconds of every process that worked on a run or on a sweep, by kind.

    `wait` is all time of a sweep's workers outside their runs: Python and JAX starting, nothing
    to do, the last run of another worker. `wall` is the sum. A kind that older rows do not tell
    apart is 0.
    """
    folder = Path(folder)
    rows = [row for place in folder.rglob("timing.jsonl") for row in files.read_lines(place)]
    out = {kind: sum(row.get(f"{kind}_seconds", 0.0) for row in rows) for kind in KINDS}
    inside = sum(row["wall_seconds"] for row in rows)
    whole = sum(row["workers"] * row["wall_seconds"]
                for row in files.read_lines(folder / "workers.jsonl"))
    wait = max(0.0, whole - inside)
    return {"wall": inside + wait, "wait": wait, **out}
