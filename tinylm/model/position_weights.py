"""The position-weights predictor: the next token from a table for each of the last L positions.

logits = sum over j < L of W[j, token at distance j, :], so it knows which token stands where but
nothing about which tokens stand together. W[j] is dense where D >= V, else factored with rank D:
W[j] = embed_tokens[j] @ lm_head.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tinylm.model.embedding import Draw, param


class PositionWeights(nnx.Module):
    """One table a distance, dense or factored with a shared head."""

    def __init__(self, V: int, D: int, L: int, draw: Draw):
        self.embed_tokens = param(draw, (L, V, min(D, V)), 0.02)
        self.lm_head = param(draw, (D, V), D**-0.5) if D < V else None

    def __call__(self, tokens: Int[Array, "B T"], segments: None = None) -> Float[Array, "B T V"]:
        """Give the logits of the next token; positions before the window count as nothing."""
        length = tokens.shape[1]
        tables = self.embed_tokens[...]
        total = jnp.zeros((*tokens.shape, tables.shape[-1]), jnp.float32)
        for j in range(min(tables.shape[0], length)):
            total = total.at[:, j:].add(tables[j][tokens[:, : length - j]])
        return total if self.lm_head is None else total @ self.lm_head[...]
