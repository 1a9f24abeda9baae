"""What comes next, by counting and by models, after the same text."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from scipy.special import softmax

from tinylm.config import BadInput
from tinylm.model.baselines import NGram
from tinylm.model.capture import filled
from tinylm.model.decoder import ModelConfig, Params, rebuild


class Next(NamedTuple):
    """One candidate for the next token."""

    id: int
    p: float
    count: int = 0
    """how often it followed in the training tokens; 0 for a model, which does not count"""


def counted(table: NGram, ids: np.ndarray, k: int) -> list[Next]:
    """Give what most often followed the text's last order - 1 tokens."""
    return [Next(i, p, seen) for i, seen, p in table.counts(ids, k)]


def predicted(config: ModelConfig, params: Params, ids: np.ndarray, k: int) -> list[Next]:
    """Give what a model expects after a text of at most its context."""
    if not 1 <= len(ids) <= config.T:
        raise BadInput(f"the text has {len(ids)} tokens and the context of the model T={config.T}; "
                       f"give 1 to {config.T}")
    tokens = filled(np.asarray(ids, np.int32), config.T)
    logits = _forward(config, params, tokens[None])[0, len(ids) - 1]
    p = softmax(np.asarray(logits, np.float64))
    return [Next(int(i), float(p[i])) for i in np.argsort(-p, kind="stable")[:k]]


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return rebuild(config, params)(tokens)
