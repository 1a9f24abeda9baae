"""The position-weights predictor: the next token from a table for each of the last T positions.

logits = sum over j < T of W[j, token at distance j, :], with W[j] = embed[j] @ head (rank D), so it
knows which token stands where but nothing about which tokens stand together.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tinylm.model.embedding import param


class PositionWeights(nnx.Module):
    """One factored table a distance; the head is shared."""

    def __init__(self, V: int, D: int, T: int, rngs: nnx.Rngs):
        self.embed_tokens = param(rngs, (T, V, D), 0.02)
        self.lm_head = param(rngs, (D, V), D**-0.5)

    def __call__(
        self, tokens: Int[Array, "B T"], segments: None = None, unroll: bool = True
    ) -> Float[Array, "B T V"]:
        """Give the logits of the next token; positions before the window count as nothing."""
        length = tokens.shape[1]
        tables = self.embed_tokens[...]
        total = jnp.zeros((*tokens.shape, tables.shape[-1]), jnp.float32)
        for j in range(min(tables.shape[0], length)):
            total = total.at[:, j:].add(tables[j][tokens[:, : length - j]])
        return jnp.einsum("btd,dv->btv", total, self.lm_head[...])
