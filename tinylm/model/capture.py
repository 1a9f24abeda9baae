"""The same forward pass with its insides kept: attention's vectors and weights, the stream.

Every number comes from the modules' own methods; attention's weights are computed once to be seen
and once more by the block that uses them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from tinylm.config import BadInput
from tinylm.model.attention import sight_from, weigh
from tinylm.model.decoder import ModelConfig, Params, rebuild
from tinylm.model.embedding import rotation

LENGTHS = 16
"""tokens of a text, rounded up to a multiple"""


class Insides(NamedTuple):
    """What one text does inside a model."""

    q: Float[Array, "L T H K"]
    k: Float[Array, "L G S K"]
    v: Float[Array, "L G S K"]
    weights: Float[Array, "L H T S"]
    stream: Float[Array, "L1 T D"]
    """the residual stream: the embeddings, then after each block"""
    logits: Float[Array, "T V"]


def capture(config: ModelConfig, params: Params, tokens: Integer[np.ndarray, "T"]) -> Insides:
    """Run a model over one text of at most its context and keep what it did."""
    if config.kind != "transformer" or not 1 <= len(tokens) <= config.T:
        raise BadInput(f"{len(tokens)} tokens through a {config.kind} model with context "
                       f"T={config.T}; give a transformer 1 to {config.T} tokens")
    n = len(tokens)
    found = _capture(config, params, filled(np.asarray(tokens, np.int32), config.T))
    return Insides(found.q[:, :n], found.k[:, :, :n], found.v[:, :, :n],
                   found.weights[:, :, :n, :n], found.stream[:, :n], found.logits[:n])


def filled(rows: Shaped[np.ndarray, "T ..."] | Shaped[Array, "T ..."],
           most: int) -> Shaped[Array, "T1 ..."]:
    """Fill rows up with zeros to a multiple of LENGTHS, or `most`: few lengths, few programs.

    What is causal says the same of the rows that were given.
    """
    room = min(most, -(-len(rows) // LENGTHS) * LENGTHS)
    return jnp.pad(jnp.asarray(rows), [(0, room - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


@functools.partial(jax.jit, static_argnums=0)
def streams(config: ModelConfig, params: Params,
            tokens: Integer[Array, "T"]) -> Float[Array, "L1 T D"]:
    """Give the residual stream alone; XLA leaves out what only the other insides need."""
    return _capture(config, params, tokens).stream


@functools.partial(jax.jit, static_argnums=0)
def lens(config: ModelConfig, params: Params,
         stream: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """Read the stream after any block as the last one is read: the logit lens."""
    return rebuild(config, params).head(stream[None])[0]


@functools.partial(jax.jit, static_argnums=0)
def _capture(config, params, tokens):
    model, index = rebuild(config, params), np.arange(len(tokens))
    sight = sight_from(np.zeros_like(index)[None])
    turn = rotation(index[None], config.T, config.head_width, config.rope_theta)
    x = model.embed_tokens(tokens[None])
    kept, stream = [], [x[0]]
    for block in model.blocks():
        q, k, v = block.self_attn.project(block.input_layernorm(x), turn)
        k = block.self_attn.smeared(k, sight.follows)
        weights_HTS = weigh(q, k, sight.visible)[0].reshape(config.H, len(tokens), len(tokens))
        kept.append((q[0], k[0], v[0], weights_HTS))
        x, _ = block(x, turn, sight)
        stream.append(x[0])
    return Insides(*map(jnp.stack, zip(*kept, strict=True)), jnp.stack(stream), model.head(x)[0])
