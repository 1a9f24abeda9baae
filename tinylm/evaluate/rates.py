"""Rates with intervals: a share, a win rate over paired prompts, and best-of-n from one pool."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from tinylm.config import BadInput


class Rate(NamedTuple):
    """A share of `count` cases and its 95% interval."""

    rate: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    count: Float[Array, ""]


def share(cases: Float[Array, "N"], mask: Float[Array, "N"], z: float = 1.959964) -> Rate:
    """Give the mean of cases within 0..1 and Wilson's interval (JASA 22, 1927); 0..1 for none.

    With halves among the cases the interval is wider than it need be, never narrower.
    """
    count = jnp.sum(mask)
    n = jnp.maximum(count, 1e-9)
    p = jnp.sum(jnp.where(mask > 0, mask * cases, 0.0)) / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * jnp.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return Rate(p, jnp.maximum(middle - half, 0.0), jnp.minimum(middle + half, 1.0), count)


def win_rate(ours: Float[Array, "N"], theirs: Float[Array, "N"], mask: Float[Array, "N"]) -> Rate:
    """Give how often ours outscores theirs on the same prompts, ties half."""
    return share((jnp.sign(ours - theirs) + 1) / 2, mask)


def best_of_n(
    proxy: Shaped[Array, "B N"], gold: Shaped[Array, "B N"], n: int
) -> Float[Array, "B"]:
    """Give the expected gold score of the best by proxy among n of each prompt's N samples.

    The mean over all subsets of n, without drawing any: of the k lowest by proxy hold the best
    with probability C(k, n) / C(N, n) (unbiased; 2112.09332, app. I). Samples of equal proxy
    share their weight. BadInput unless 1 <= n <= N.
    """
    N = proxy.shape[1]
    if not 1 <= n <= N:
        raise BadInput(f"n={n} is not within 1..{N}, the samples a prompt; draw more or lower n")
    k = np.arange(N + 1)[:, None] - np.arange(n)
    below = np.prod(np.maximum(k, 0) / (N - np.arange(n)), axis=1)

    def one(proxy: Array, gold: Array) -> Array:
        order = jnp.sort(proxy)
        low = jnp.searchsorted(order, proxy, side="left")
        high = jnp.searchsorted(order, proxy, side="right")
        table = jnp.asarray(below, jnp.result_type(gold, jnp.float32))
        return jnp.sum(gold * (table[high] - table[low]) / (high - low))

    return jax.vmap(one)(proxy, gold)
