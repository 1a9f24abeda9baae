"""Token embedding, root-mean-square norm and rotary positions: what attention stands on."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def param(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Draw a float32 parameter from a normal distribution with standard deviation `std`."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Embedding(nnx.Module):
    """A table of V rows of width D; read by token on the way in, by product on the way out."""

    def __init__(self, V: int, D: int, rngs: nnx.Rngs):
        self.weight = param(rngs, (V, D), 0.02)

    def __call__(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Look the tokens up."""
        return self.weight[...].astype(dtype)[tokens]

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Score every row against x, accumulating in float32."""
        weight = self.weight[...].astype(x.dtype)
        return jnp.einsum("btd,vd->btv", x, weight, preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """Divide by the root mean square of the last axis, then multiply by a gain (1910.07467)."""

    def __init__(self, shape: tuple[int, ...]):
        self.weight = nnx.Param(jnp.ones(shape, jnp.float32))

    def __call__(self, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        """Normalise in float32 and return x's dtype."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean + 1e-6) * self.weight[...]).astype(x.dtype)


def rope_angles(positions: Int[Array, "B T"], K: int, theta: float) -> Float[Array, "B T half"]:
    """Give the rotation angle of each position and pair of channels (2104.09864)."""
    rates = theta ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    return positions[..., None].astype(jnp.float32) * rates


def rotate(
    x: Float[Array, "B T N K"], angles: Float[Array, "#B T half"]
) -> Float[Array, "B T N K"]:
    """Rotate channel pairs (k, k + K/2) of every head by the angle of their position."""
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
