"""Held-out loss over disjoint windows: nats a token, bits a byte, standard error by document.

The protocol (documents, tokenizer, window, tokens scored) is hashed into `eval_id`; losses with
different ids are not comparable and never share a fit.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tinylm.config import digest
from tinylm.model.decoder import ModelConfig, Params, rebuild
from tinylm.text.shards import Dataset
from tinylm.train import rowwise
from tinylm.train.losses import nll


class Heldout(NamedTuple):
    """A held-out loss: pooled, its standard error, and by part of the corpus."""

    nats_per_token: float
    bits_per_byte: float
    stderr: float
    parts: dict[str, float]
    tokens: int


def scored(data: Dataset, T: int) -> int:
    """Count the held-out tokens that the protocol scores."""
    return (len(data.heldout) - 1) // T * T


def eval_id(data: Dataset, T: int) -> str:
    """Hash the protocol: 16 hex digits."""
    return digest({"data": data.id, "window": T, "stride": T, "tokens": scored(data, T),
                   "bos": "before each document"})[:16]


def heldout(config: ModelConfig, params: Params, data: Dataset) -> Heldout:
    """Score the held-out split with a model."""
    return summarise(each(config, params, data), data)


def each(config: ModelConfig, params: Params, data: Dataset) -> Float[np.ndarray, "N"]:
    """Give -log p of tokens 1..N of the held-out stream, window by window, nats."""
    T = config.T
    count = scored(data, T) // T
    windows = data.heldout[np.arange(count)[:, None] * T + np.arange(T + 1)].astype(np.int32)
    return rowwise.each(_nats, config, params, windows).ravel()


def summarise(nats: np.ndarray, data: Dataset) -> Heldout:
    """Pool the nats of tokens 1..len(nats) of the held-out stream."""
    ends = np.append(data.documents.start[1:], len(data.heldout))
    document = np.searchsorted(ends, np.arange(1, len(nats) + 1), side="right")
    n = len(data.documents.start)
    loss = np.bincount(document, nats.astype(np.float64), n)
    tokens = np.bincount(document, minlength=n).astype(np.float64)
    share = np.divide(tokens, data.documents.tokens, where=data.documents.tokens > 0,
                      out=np.zeros(n))
    size = data.documents.bytes * np.minimum(share, 1.0)
    mean = loss.sum() / tokens.sum()
    spread = loss - mean * tokens
    seen = max(2, int((tokens > 0).sum()))
    stderr = math.sqrt(float((spread**2).sum()) * seen / (seen - 1)) / tokens.sum()
    parts = {}
    for part in sorted(set(data.documents.part)):
        here = np.array([p == part for p in data.documents.part])
        if tokens[here].sum():
            parts[part] = float(loss[here].sum() / math.log(2) / max(size[here].sum(), 1.0))
    return Heldout(float(mean), float(loss.sum() / math.log(2) / size.sum()), float(stderr), parts,
                   int(tokens.sum()))


def _nats(config: ModelConfig, params: Params, row: jax.Array) -> jax.Array:
    return nll(rebuild(config, params)(row[None, :-1]), row[None, 1:])[0][0]
