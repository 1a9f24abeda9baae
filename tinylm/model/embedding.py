"""Token embedding, root-mean-square norm and rotary positions: what attention stands on."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from tinylm.model.product import product

Draw = Callable[[tuple[int, ...]], Array]
"""gives standard normal float32 numbers of a shape"""


class Cut:
    """A Draw that cuts parameters, in turn, from one draw of `count` numbers or more.

    XLA compiles one draw ten times as fast as one a parameter.
    """

    def __init__(self, key: Array, count: int):
        self.numbers, self.taken = jax.random.normal(key, (count,), jnp.float32), 0

    def __call__(self, shape: tuple[int, ...]) -> Array:
        """Take the next numbers."""
        first, self.taken = self.taken, self.taken + math.prod(shape)
        return self.numbers[first:self.taken].reshape(shape)


def param(draw: Draw, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Draw a parameter from a normal distribution with standard deviation `std`."""
    return nnx.Param(std * draw(shape))


class Embedding(nnx.Module):
    """A table of V rows of width D; read by token on the way in, by product on the way out."""

    def __init__(self, V: int, D: int, dtype: jnp.dtype, draw: Draw):
        self.dtype = dtype
        self.weight = param(draw, (V, D), 0.02)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look the tokens up."""
        return self.weight[...][tokens]

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Score every row against x."""
        return product("btd,vd->btv", x, self.weight[...], self.dtype)


class RMSNorm(nnx.Module):
    """Divide by the root mean square of the last axis, then multiply by a gain (1910.07467)."""

    def __init__(self, shape: tuple[int, ...]):
        self.weight = nnx.Param(jnp.ones(shape, jnp.float32))

    def __call__(self, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        """Normalise."""
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean + 1e-6) * self.weight[...]


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles (2104.09864), shared by all heads."""

    cos: Float[ArrayLike, "#B T 1 half"]
    sin: Float[ArrayLike, "#B T 1 half"]


def rotation(positions: Int[ArrayLike, "#B T"], T: int, K: int, theta: float) -> Rotation:
    """Look positions (below T) up in a table that is a constant of the program.

    Sines of positions known when the program is built (numpy) cost nothing when it runs.
    """
    angles = np.arange(T)[:, None] * theta ** (-np.arange(0, K, 2) / K)
    tables = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    if not isinstance(positions, np.ndarray):
        tables = map(jnp.asarray, tables)
    return Rotation(*(table[positions][:, :, None] for table in tables))


def rotate(x: Float[Array, "B T N K"], by: Rotation) -> Float[Array, "B T N K"]:
    """Rotate channel pairs (k, k + K/2) of every head by the angle of their position."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return jnp.concatenate(turned, axis=-1)
