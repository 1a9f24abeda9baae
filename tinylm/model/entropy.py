"""A narrow model's cross-entropy and its gradient in one call of our C, no logits kept.

A table of 2048 x 16 makes products of a few kilobytes and logits of megabytes: XLA writes and reads
them five times, which is half of such a model's step.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from tinylm.model.product import FULL, Arithmetic, can_call, foreign, named

WIDEST = {"float32": 80, "bfloat16": 128}
"""channels below which it is faster than products by a library and XLA's logits: in float32 at 512
positions 1.8 times as fast at 16 (V=2048), 1.2 at 64 (1024), .95 at 96; a step in bfloat16 with it
takes .8 of the time at 24, .93 at 96 (2048), 1.02 at 128 (1024) (by hand: experiments/LOG.md)"""


def pays(by: Arithmetic, D: int) -> bool:
    """Tell whether a head of D channels shall be asked for `cross_entropy` rather than logits."""
    return by.native and WIDEST[by.dtype.name] > D and can_call(named(by, "entropy"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
    by: Arithmetic, x: Float[Array, "B T D"], table: Float[Array, "V D"],
    targets: Int[Array, "B T"], weights: Float[Array, "B T"], z_loss: ArrayLike = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Give sum(weights (nll + z_loss logz^2)) and sum(weights nll), nats, of logits x table'.

    `by` says which operands the products have. The gradient is of the first sum. It is made on the
    way there, so a loss alone is better had from logits. A target out of range gives NaN.
    """
    return _forward(by, x, table, targets, weights, z_loss)[0]


def _forward(by, x, table, targets, weights, z_loss):
    each = jax.ShapeDtypeStruct(targets.shape, FULL)
    nll, logz, *grads = foreign(*named(by, "entropy"), (each, each, x, table), x, table, targets,
                                weights, jnp.asarray(z_loss, FULL))
    return (jnp.sum(weights * (nll + z_loss * logz**2)), jnp.sum(weights * nll)), grads


def _backward(by, grads, d_sums):
    return *(d_sums[0] * grad for grad in grads), None, None, None


cross_entropy.defvjp(_forward, _backward)
