"""Losses: arrays in, a weighted sum and its metrics out. The step divides by the total weight.

Sums, not means, so that micro-batches and devices of unequal weight add up to the same gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinylm.model.decoder import ModelConfig, Params, rebuild
from tinylm.train.batch import Batch

Sums = dict[str, Array]
Loss = Callable[[Params, Any], tuple[Array, Sums]]


def nll(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Give -log p(target) in nats and the log of the normaliser, each position."""
    logz = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logz - chosen, logz


def next_token(config: ModelConfig, z_loss: float = 0.0, unroll: bool = True) -> Loss:
    """Build the loss of predicting tokens[:, 1:]: weighted nll + z_loss * logz^2 (2204.02311)."""

    def loss(params: Params, batch: Batch) -> tuple[Array, Sums]:
        model = rebuild(config, params)
        segments = None if batch.segments is None else batch.segments[:, :-1]
        logits = model(batch.tokens[:, :-1], segments=segments, unroll=unroll)
        each, logz = nll(logits, batch.tokens[:, 1:])
        w = batch.weights
        sums = {"nats_per_token": jnp.sum(w * each), "weight": jnp.sum(w)}
        return jnp.sum(w * (each + z_loss * logz**2)), sums

    return loss
