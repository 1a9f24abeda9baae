"""What comes with scale and with training: the same views of every run, or checkpoint, in turn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tinylm import files
from tinylm.config import BadInput, from_json
from tinylm.evaluate import heldout
from tinylm.laws import isoflop
from tinylm.look.heads import habits
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.shards import Dataset
from tinylm.train import checkpoint, run

Row = dict[str, Any]
Told = Callable[[float], None]
"""is told the share that is done"""


def history(config: ModelConfig, folder: Path, record: Row, data: Dataset,
            told: Told = lambda _: None) -> list[Row]:
    """Say the same of the checkpoints that a run kept on its way."""
    rows, kept = [], checkpoint.held(folder)
    for step in kept:
        done = step / record["config"]["steps"]
        rows.append({"step": step, "tokens": round(done * record["tokens"]),
                     "FLOPs": done * record["flops"]["exact"],
                     **_learnt(config, checkpoint.final_params(folder, config, step), data)})
        told(len(rows) / len(kept))
    return rows


def ladder(runs: dict[Path, Row], data: Dataset, told: Told = lambda _: None) -> list[Row]:
    """Say of finished runs (folder to record) of one text, least compute first, what they learnt.

    `gain` is by how many nats a token a repeat is easier than what it repeats; `previous`, `first`
    and `induction` are the strongest head's habits (heads.Habits); `by_position` and
    `by_frequency` are nats a held-out token by how many tokens of the window are read, and by how
    often the token occurs in training.
    """
    rows = []
    kept = {folder: record for folder, record in runs.items() if record["loss"]}
    for folder, record in sorted(kept.items(), key=lambda one: one[1]["flops"]["exact"]):
        config = from_json(ModelConfig, record["config"]["model"], "model")
        if record["eval_id"] != (found := heldout.eval_id(data, config.T)):
            raise BadInput(f"{folder} was scored on held-out text {record['eval_id']}, not on "
                           f"{found}; give runs of one text")
        rows.append({"run": record["id"], "width": config.D, "layers": config.L,
                     "FLOPs": record["flops"]["exact"],
                     **_learnt(config, checkpoint.final_params(folder, config), data)})
        told(len(rows) / len(kept))
    return rows


def of_study(folder: Path, records: list[Row]) -> dict[Path, Row]:
    """Give the folders of a sweep's records, and the held-out run of a study."""
    inside = folder / "sweep" if (folder / "sweep").is_dir() else folder
    places = {files.read_json(p)["id"]: p.parent for p in inside.rglob("record.json")}
    held_out = run.record(folder / "target")
    return {places[r["id"]]: r for r in records} | (
        {folder / "target": held_out} if held_out else {})


def best(runs: dict[Path, Row]) -> dict[Path, Row]:
    """Keep the run of least loss at each budget."""
    kept = {folder: record for folder, record in runs.items() if record["loss"]}
    labels = isoflop.group(np.array([record["flops"]["exact"] for record in kept.values()]))
    least: dict[int, tuple[Path, Row]] = {}
    for label, one in zip(labels, kept.items(), strict=True):
        least[label] = min(least.get(label, one), one, key=lambda r: r[1]["loss"]["nats_per_token"])
    return dict(least.values())


def _learnt(config: ModelConfig, params: Params, data: Dataset) -> Row:
    found, nats = habits(config, params), heldout.each(config, params, data)
    return {"bits_per_byte": heldout.summarise(nats, data).bits_per_byte,
            "previous": float(found.previous.max()), "first": float(found.first.max()),
            "induction": float(found.induction.max()), "gain": float(found.nats[0] - found.nats[1]),
            "by_position": by_position(nats, config.T), "by_frequency": by_frequency(nats, data)}


def passed(rows: list[Row], tables: dict[str, Row]) -> dict[str, float | None]:
    """Give the FLOPs of the least run whose bits per byte beat each n-gram table; None for none."""
    return {f"{order}-gram": min((r["FLOPs"] for r in rows
                                  if r["bits_per_byte"] < table["bits_per_byte"]), default=None)
            for order, table in sorted(tables.items())}


def by_position(nats: Float[np.ndarray, "N"], T: int) -> list[Row]:
    """Average the held-out loss (heldout.each) by how many tokens of the window are read.

    Groups double: 1, 2, 3 to 4, 5 to 8 and so on; `at_most` is the last of each.
    """
    read = np.tile(np.arange(1, T + 1), len(nats) // T)
    return _grouped(nats, read, np.unique([*(1 << np.arange(T.bit_length())), T]))


def by_frequency(nats: Float[np.ndarray, "N"], data: Dataset, groups: int = 6) -> list[Row]:
    """Average the held-out loss by how often its token occurs in training, rare to frequent.

    Groups hold equal numbers of held-out tokens, up to ties.
    """
    seen = np.bincount(data.train, minlength=data.V)[data.heldout[1:len(nats) + 1]]
    return _grouped(nats, seen, np.quantile(seen, np.linspace(0, 1, groups + 1)[1:]))


def _grouped(nats: np.ndarray, of: np.ndarray, edges: np.ndarray) -> list[Row]:
    edges = np.unique(edges.astype(np.int64))
    place = np.searchsorted(edges, of)
    return [{"at_most": int(edge), "tokens": int((place == n).sum()),
             "nats": float(nats[place == n].mean())}
            for n, edge in enumerate(edges) if (place == n).any()]
