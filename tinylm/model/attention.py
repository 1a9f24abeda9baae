"""Causal scaled dot-product attention with grouped heads, query-key norm and a key/value cache.

weights[t, s] = softmax_s(q_t . k_s / sqrt(K)) over the s that t may see; output = weights v. Keys
are smeared (2209.11895): to each a learnt share of the key before it is added, by channel, so that
one layer can look for what followed a token's last occurrence, and a small model learns to copy.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from tinylm.model.embedding import Draw, RMSNorm, Rotation, param, rotate
from tinylm.model.product import FULL, Arithmetic, added, can_call, foreign, named, product

BLOCK, BLOCKS = 64, 4
"""queries are cut into blocks of BLOCK or more, BLOCKS at most"""
ROWS = 8
"""the most sequences whose attention is written out one by one, for bfloat16's fast products"""


class KeyValue(NamedTuple):
    """One layer's keys and values of S positions, heads first: read as they lie by products."""

    k: Float[Array, "B G S K"]
    v: Float[Array, "B G S K"]
    last: Float[Array, "B G 1 K"]
    """the newest key before it was smeared"""


class Sight(NamedTuple):
    """What T positions see of S."""

    visible: Bool[ArrayLike, "#B T S"]
    follows: Bool[ArrayLike, "#B T"]
    """where a token has one before it in its sequence"""
    begin: Int[ArrayLike, "#B T"] | None = None
    """where S = T: the first position each sees, and it sees all from there to itself; from 0 on,
    never falling"""


def sight_from(begin: Int[ArrayLike, "#B T"]) -> Sight:
    """Let each position see what lies between its begin and itself (numpy: known beforehand)."""
    index = np.arange(begin.shape[1])
    causal = index[:, None] >= index
    if isinstance(begin, np.ndarray) and not begin.any():
        return Sight(causal[None], index[None] > 0, begin)
    return Sight(causal & (index >= begin[:, :, None]), index > begin, begin)


def empty(B: int, G: int, S: int, K: int) -> KeyValue:
    """Give a cache of S positions that holds nothing yet."""
    return KeyValue(*(jnp.zeros((B, G, some, K)) for some in (S, S, 1)))


class Attention(nnx.Module):
    """Project, normalise, rotate, attend, project back. `stack` adds leading layer axes."""

    def __init__(self, D: int, H: int, G: int, K: int, smear: bool, stack: tuple[int, ...],
                 by: Arithmetic, draw: Draw):
        self.by = by
        self.q_proj = param(draw, (*stack, D, H, K), D**-0.5)
        self.k_proj = param(draw, (*stack, D, G, K), D**-0.5)
        self.v_proj = param(draw, (*stack, D, G, K), D**-0.5)
        self.o_proj = nnx.Param(jnp.zeros((*stack, H, K, D), jnp.float32))
        self.q_norm = RMSNorm((*stack, K), by)
        self.k_norm = RMSNorm((*stack, K), by)
        self.k_smear = nnx.Param(jnp.zeros((*stack, G, K), jnp.float32)) if smear else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Rotation,
        sight: Sight,
        cache: KeyValue | None = None,
        start: Array | int = 0,
        fused: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValue | None]:
        """Attend from x to itself, or to the cache with x's keys written at `start`.

        `fused`, the layer's number, takes the library's attention (see `by_library`) instead of
        ours. Our C keeps no keys, so a plan that wants it gives None for them.
        """
        if (self.by.native and sight.begin is not None
                and cache is None and fused is None
                and can_call(named(self.by, "mix", "mix_back"))):
            smear = jnp.zeros(self.k_proj[...].shape[-2:]) if self.k_smear is None else (
                self.k_smear[...])
            mixed = by_native(*self.heads(x), self.q_norm.weight[...], self.k_norm.weight[...],
                              smear, turn, sight.begin, self.by)
            return self.out(mixed), None
        q, k, v = self.project(x, turn)
        last = k[:, :, -1:]
        k = self.smeared(k, sight.follows, None if cache is None else cache.last)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.k, k, start, 2)
            v = jax.lax.dynamic_update_slice_in_dim(cache.v, v, start, 2)
        if fused is not None:
            mixed = by_library(q, k, v, sight.visible, self.by.dtype, fused)
        else:
            mixed = attend(q, k, v, sight.visible, self.by.dtype)
        return self.out(mixed), KeyValue(k, v, last)

    def heads(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Give x's queries, keys and values as they are projected."""
        q, k, v = (product("btd,dnk->btnk", x, w[...], self.by)
                   for w in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def out(self, mixed: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """Project mixed values back."""
        return product("bthk,hkd->btd", mixed, self.o_proj[...], self.by)

    def project(
        self, x: Float[Array, "B T D"], turn: Rotation
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B G T K"], Float[Array, "B G T K"]]:
        """Give x's queries and keys, normalised and rotated, and its values."""
        q, k, v_BTGK = self.heads(x)
        k_BTGK = rotate(self.k_norm(k), turn)
        return (rotate(self.q_norm(q), turn), k_BTGK.transpose(0, 2, 1, 3),
                v_BTGK.transpose(0, 2, 1, 3))

    def smeared(
        self, k: Float[Array, "B G T K"], follows: Bool[ArrayLike, "#B T"],
        last: Float[Array, "B G 1 K"] | None = None,
    ) -> Float[Array, "B G T K"]:
        """Add to each key its share of the key before it; `last` is the one before the first."""
        if self.k_smear is None:
            return k
        last = jnp.zeros_like(k[:, :, :1]) if last is None else last
        before = jnp.concatenate([last, k[:, :, :-1]], axis=2)
        return k + self.k_smear[...][:, None] * jnp.where(follows[:, None, :, None], before, 0.0)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S K"],
    visible: Bool[ArrayLike, "#B T S"],
    dtype: jnp.dtype = FULL,
) -> Float[Array, "B T H K"]:
    """Mix values by softmax_s(q k / sqrt(K)); query head h reads key head h // (H / G).

    Where it is known beforehand what is visible, many queries are taken in blocks, each with the
    keys that any of its queries may see: what is masked for all is not computed. A bfloat16
    `dtype` rounds the operands of all products and adds up in float32.
    """
    B, T = q.shape[:2]
    blocks = min(BLOCKS, max(1, T // BLOCK)) if isinstance(visible, np.ndarray) else 1
    half = dtype != FULL and blocks > 1 and B <= ROWS
    if half and B > 1:  # XLA's CPU multiplies bfloat16 fast with one batch axis only
        rows = ((a[n:n + 1] for a in (q, k, v)) for n in range(B))
        each = [visible[n:n + 1] if len(visible) > 1 else visible for n in range(B)]
        return jnp.concatenate([attend(*row, seen, dtype)
                                for row, seen in zip(rows, each, strict=True)])
    operands = "float32" if dtype == FULL else "bfloat16" if half else "rounded"
    parts = [visible]
    if blocks > 1:
        parts = [part[..., :1 + int(np.flatnonzero(part.any(axis=(0, 1))).max())]
                 for part in np.array_split(visible, blocks, axis=1)]
    mixed_BGJTK = _mix(operands, _grouped(q, k), k, v, parts)
    return mixed_BGJTK.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def by_library(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S K"],
    visible: Bool[ArrayLike, "#B T S"],
    dtype: jnp.dtype,
    number: int = 0,
) -> Float[Array, "B T H K"]:
    """Mix as `attend` does, by JAX's attention on operands rounded to `dtype`.

    That is cuDNN's flash attention where it has one for them (what is visible must then be the
    causal half), else XLA's. The choice is taken when the program is built. JAX 0.11 cannot run a
    program with two equal calls of cuDNN's gradient (IndexError, "raw_hash_map::at"), so each
    layer's `number` makes its scale another one, by less than float32 can tell.
    """
    causal = _causal(visible)
    q, k_BSGK, v_BSGK = (a.astype(dtype) for a in (
        q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))
    mixed = jax.nn.dot_product_attention(
        q, k_BSGK, v_BSGK, is_causal=causal, mask=None if causal else visible[:, None],
        scale=q.shape[-1]**-0.5 * (1 + 1e-12 * number),
        implementation="cudnn" if causal and _cudnn(dtype, q.shape[-1]) else "xla")
    return mixed.astype(jnp.float32)


def by_native(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G K"],
    q_gain: Float[Array, "K"], k_gain: Float[Array, "K"], smear: Float[Array, "G K"],
    turn: Rotation, begin: Int[ArrayLike, "#B T"], by: Arithmetic,
) -> Float[Array, "B T H K"]:
    """Mix projected heads by our C on a CPU: norms, rotation and smear are part of it.

    `begin` is as in `Sight`, K even; bfloat16 as in `attend`. No weights are kept
    (tinylm/native/attention.c).
    """
    cos, sin = (jnp.asarray(a)[:, :, 0] for a in turn)
    return _by_native(named(by, "mix", "mix_back"), q, k, v, q_gain, k_gain, smear, cos, sin,
                      jnp.asarray(begin, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_native(names, *given):
    return _native_forward(names, *given)[0]


def _native_forward(names, *given):
    q = given[0]
    B, T, H, _ = q.shape
    mixed, logz = foreign(names[0], (q, jax.ShapeDtypeStruct((B, H, T), FULL)), *given)
    return mixed, (*given, mixed, logz)


def _native_backward(names, kept, dy):
    return *foreign(names[1], kept[:6], *kept, dy), None, None, None


_by_native.defvjp(_native_forward, _native_backward)


def weigh(
    q: Float[Array, "B T H K"], k: Float[Array, "B G S K"], visible: Bool[ArrayLike, "#B T S"]
) -> Float[Array, "B G J T S"]:
    """Give the weights by which `attend` mixes, float32; J = H / G query heads share a key head."""
    return jax.nn.softmax(_scores(_grouped(q, k), k, visible), axis=-1)


def _causal(visible: Bool[ArrayLike, "#B T S"]) -> bool:
    """Tell whether it is known beforehand that all sees what came before it, and itself."""
    return isinstance(visible, np.ndarray) and bool((visible == np.tri(*visible.shape[1:])).all())


def _cudnn(dtype: jnp.dtype, K: int) -> bool:
    """Tell whether the default device has a flash attention for heads of this type and width."""
    device = jax.devices()[0]
    return (jax.default_backend() == "gpu" and "cuda" in device.client.platform_version.lower()
            and float(device.compute_capability) >= 8.0
            and dtype == jnp.bfloat16 and K % 8 == 0 and K <= 128)


def _grouped(q: Float[Array, "B T H K"], k: Float[Array, "B G S K"]) -> Float[Array, "B G J T K"]:
    """Scale the queries by K^-.5 and bring heads in front of time.

    A CPU multiplies batches of plain matrices fastest.
    """
    B, T, H, K = q.shape
    G = k.shape[1]
    return (q * K**-0.5).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)


def _scores(q_BGJTK, k, visible):
    return jnp.where(visible[:, None, None], added("bgjtk,bgsk->bgjts", q_BGJTK, k), -1e30)


def _low(a: Array, operands: str) -> Array:
    """Round to bfloat16 what that asks for; "rounded" stays float32, of the same values."""
    match operands:
        case "bfloat16":
            return a.astype(jnp.bfloat16)
        case "rounded":
            return jax.lax.reduce_precision(a, 8, 7)
    return a


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(operands, q_BGJTK, k, v, visible):
    """Attend block by block of queries; `visible` has for each [B, its queries, the keys it sees].

    Those are the first of all keys.
    """
    return _mix_forward(operands, q_BGJTK, k, v, visible)[0]


def _mix_forward(operands, q, k, v, visible):
    """Divide by the sum of the weights after the product with v, where it is K wide and not S."""
    q, k, v = (_low(a, operands) for a in (q, k, v))
    kept, totals, parts = [], [], []
    for q_n, seen in zip(_blocks(q, visible), visible, strict=True):
        S = seen.shape[2]
        scores = _scores(q_n, k[:, :, :S], seen)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        totals.append(weights.sum(axis=-1, keepdims=True))
        kept.append(_low(weights, operands))
        parts.append(added("bgjts,bgsk->bgjtk", kept[-1], v[:, :, :S]))
    total = jnp.concatenate(totals, axis=3)
    mixed = jnp.concatenate(parts, axis=3) / total
    return mixed, (q, k, v, kept, total, mixed)


def _mix_backward(operands, kept, dy):
    """Read the weights in one pass and turn no array of T x S, as the derived gradient does.

    d scores = weights (dy v - sum_k(dy mixed)) with dy divided by the total; masked weights are 0.
    """
    q, k, v, weights, total, mixed = kept
    dy = dy / total
    shift, dy = _row_sum(dy * mixed), _low(dy, operands)
    dq, dk_BGKS, dv_BGKS = [], [], []
    for q_n, dy_n, shift_n, w in zip(*(_blocks(a, weights) for a in (q, dy, shift)), weights,
                                     strict=True):
        S = w.shape[-1]
        dscores = _low(w * (added("bgjtk,bgsk->bgjts", dy_n, v[:, :, :S]) - shift_n), operands)
        dq.append(added("bgjts,bgsk->bgjtk", dscores, k[:, :, :S]))
        dk_BGKS.append(added("bgjkt,bgjts->bgks", q_n.swapaxes(3, 4), dscores))
        dv_BGKS.append(added("bgjkt,bgjts->bgks", dy_n.swapaxes(3, 4), w))
    dk, dv = (_by_key(parts, k.shape[2]).swapaxes(2, 3) for parts in (dk_BGKS, dv_BGKS))
    return jnp.concatenate(dq, axis=3), dk, dv, None


_mix.defvjp(_mix_forward, _mix_backward)


def _blocks(a, like):
    """Cut [B, G, J, T, ...] as the queries of the blocks `like` [..., queries, keys] are cut."""
    return jnp.split(a, np.cumsum([block.shape[-2] for block in like])[:-1], axis=3)


def _row_sum(a):
    """Add up the last axis, kept, by halves, which XLA's CPU compiles itself.

    Its own sum it gives to YNNPACK, on JAX 0.10 a tenth of attention's time (by hand:
    experiments/LOG.md).
    """
    while a.shape[-1] > 1 and a.shape[-1] % 2 == 0:
        half = a.shape[-1] // 2
        a = a[..., :half] + a[..., half:]
    return a.sum(axis=-1, keepdims=True)


def _by_key(parts, S):
    """Add up the blocks' [B, G, K, keys seen], S keys in all: no block is filled up with zeros."""
    edges, sums = sorted({0, S, *(part.shape[-1] for part in parts)}), []
    for first, end in itertools.pairwise(edges):
        here = [part[..., first:end] for part in parts if part.shape[-1] >= end]
        sums.append(functools.reduce(jnp.add, here) if here else
                    jnp.zeros((*parts[0].shape[:3], end - first), parts[0].dtype))
    return jnp.concatenate(sums, axis=3)
