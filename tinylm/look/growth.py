"""What comes with scale and with training: the same views of every run, or checkpoint, in turn."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tinylm.config import from_json
from tinylm.evaluate.heldout import heldout
from tinylm.look.heads import habits
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.shards import Dataset
from tinylm.train import checkpoint

Row = dict[str, Any]


def history(config: ModelConfig, folder: Path, record: Row, data: Dataset) -> list[Row]:
    """Say the same of the checkpoints that a run kept on its way, each scored on held-out text."""
    rows = []
    for step in checkpoint.held(folder):
        params = checkpoint.final_params(folder, config, step)
        done = step / record["config"]["steps"]
        rows.append({"step": step, "tokens": round(done * record["tokens"]),
                     "FLOPs": done * record["flops"]["exact"],
                     "bits_per_byte": heldout(config, params, data).bits_per_byte,
                     **_learnt(config, params)})
    return rows


def ladder(runs: dict[Path, Row]) -> list[Row]:
    """Say of finished runs (folder to record), least compute first, what their heads have learnt.

    `gain` is by how many nats a token a repeat is easier than what it repeats; the others are the
    strongest head's habits (heads.Habits).
    """
    rows = []
    for folder, record in sorted(runs.items(), key=lambda run: run[1]["flops"]["exact"]):
        if not record["loss"]:
            continue
        config = from_json(ModelConfig, record["config"]["model"], "model")
        rows.append({"run": record["id"], "width": config.D, "layers": config.L,
                     "FLOPs": record["flops"]["exact"],
                     "bits_per_byte": record["loss"]["bits_per_byte"],
                     **_learnt(config, checkpoint.final_params(folder, config))})
    return rows


def _learnt(config: ModelConfig, params: Params) -> Row:
    found = habits(config, params)
    return {"previous": float(found.previous.max()), "first": float(found.first.max()),
            "induction": float(found.induction.max()),
            "gain": float(found.nats[0] - found.nats[1])}


def passed(rows: list[Row], tables: dict[str, Row]) -> dict[str, float | None]:
    """Give the FLOPs of the least run whose bits per byte beat each n-gram table; None for none."""
    return {f"{order}-gram": min((r["FLOPs"] for r in rows
                                  if r["bits_per_byte"] < table["bits_per_byte"]), default=None)
            for order, table in tables.items()}


def by_position(nats: Float[np.ndarray, "N"], T: int) -> Float[np.ndarray, "T"]:
    """Average the held-out loss (heldout.each) by how many tokens of the window were seen."""
    return nats.reshape(-1, T).mean(axis=0)


def by_frequency(nats: Float[np.ndarray, "N"], data: Dataset, groups: int = 8) -> list[Row]:
    """Average the held-out loss by how often its token occurs in training, rare to frequent.

    Groups hold equal numbers of held-out tokens, up to ties.
    """
    seen = np.bincount(data.train, minlength=data.V)[data.heldout[1:len(nats) + 1]]
    edges = np.unique(np.quantile(seen, np.linspace(0, 1, groups + 1)[1:]).astype(np.int64))
    place = np.searchsorted(edges, seen)
    return [{"at_most": int(edge), "tokens": int((place == n).sum()),
             "nats": float(nats[place == n].mean())}
            for n, edge in enumerate(edges) if (place == n).any()]

