"""The n-gram tables on the loss axis of the models: same held-out tokens, same units."""

from pathlib import Path
from typing import Any

import numpy as np

from tinylm import files
from tinylm.evaluate.heldout import eval_id, scored, summarise
from tinylm.model import baselines
from tinylm.text.shards import Dataset


def measured(path: Path, data: Dataset, T: int, order: int) -> dict[str, Any]:
    """Count the tables of orders 1 to `order` on the training split and score them, once.

    Their context may cross the models' windows, which favours the tables a little.
    """
    if Path(path).exists():
        kept = files.read_json(path)
        if (kept["eval_id"], len(kept["tables"])) == (eval_id(data, T), order):
            return kept
    count = scored(data, T)
    tables = {}
    for n, model in baselines.fit_orders(data.train, range(1, order + 1), data.V).items():
        nats = model.nats(np.asarray(data.heldout[: count + 1]))[1:]
        tables[str(n)] = {**summarise(nats, data)._asdict(), "discount_factor": model.factor}
    kept = {"eval_id": eval_id(data, T), "tables": tables}
    files.write_json(path, kept)
    return kept
