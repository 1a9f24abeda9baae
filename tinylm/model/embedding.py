"""Token embedding, root-mean-square norm and rotary positions: what attention stands on."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from tinylm.model.product import Arithmetic, can_call, foreign, product

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

    def __init__(self, V: int, D: int, by: Arithmetic, draw: Draw):
        self.by = by
        self.weight = param(draw, (V, D), 0.02)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look the tokens up."""
        return looked_up(self.weight[...], tokens)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Score every row against x."""
        return product("btd,vd->btv", x, self.weight[...], self.by, logits=True)


@jax.custom_vjp
def looked_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Give the rows of a table by number.

    The gradient adds a token's rows up in the order of their positions, so that it has the same
    bits each time. On a GPU XLA's scatter takes 8 ms for that at V=50304, D=768 and 16k tokens, and
    15 for 64 tables of 1024 x 64: too long, so `by_order` does it there (experiments/LOG.md).
    """
    return table[tokens]


def _look_up(table, tokens):
    return table[tokens], (tokens, table.shape[0])


def _add_up(kept, dy):
    tokens, V = kept
    rows, numbers = dy.reshape(-1, dy.shape[-1]), tokens.reshape(-1)
    return jax.lax.platform_dependent(numbers, rows, cpu=functools.partial(by_number, V),
                                      default=functools.partial(by_order, V)), None


looked_up.defvjp(_look_up, _add_up)


def by_number(V: int, numbers: Int[Array, "N"], rows: Float[Array, "N D"]) -> Float[Array, "V D"]:
    """Add to each of V sums the rows of its number, one after the other."""
    return jnp.zeros((V, rows.shape[1]), rows.dtype).at[numbers].add(rows)


def by_order(V: int, numbers: Int[Array, "N"], rows: Float[Array, "N D"]) -> Float[Array, "V D"]:
    """Give what `by_number` gives, by sorting and one running sum that starts anew at a number."""
    order = jnp.argsort(numbers)
    numbers = numbers[order]
    first = jnp.diff(numbers, prepend=-1) != 0
    _, sums = jax.lax.associative_scan(
        lambda a, b: (a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])),
        (first[:, None], rows[order]))
    end = jnp.searchsorted(numbers, jnp.arange(V), side="right")
    found = (end > 0) & (numbers[end - 1] == jnp.arange(V))
    return jnp.where(found[:, None], sums[end - 1], 0.0)


class RMSNorm(nnx.Module):
    """Divide by the root mean square of the last axis, then multiply by a gain (1910.07467)."""

    def __init__(self, shape: tuple[int, ...], by: Arithmetic):
        self.by = by
        self.weight = nnx.Param(jnp.ones(shape, jnp.float32))

    def __call__(self, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        """Normalise."""
        if self.by.native and can_call(("norm", "norm_back")):
            return _normalised(x, self.weight[...])
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean + 1e-6) * self.weight[...]


@jax.custom_vjp
def _normalised(x: Float[Array, "*batch W"], gain: Float[Array, "W"]) -> Float[Array, "*batch W"]:
    return foreign("norm", x, x, gain)


_normalised.defvjp(lambda x, gain: (_normalised(x, gain), (x, gain)),
                   lambda kept, dy: tuple(foreign("norm_back", kept, *kept, dy)))


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
