"""Sampling with a key/value cache: one prefill, then one compiled loop that stops when all have.

Prompts are padded on the left, so all rows write the same cache slot; the slots are a ring, so that
a row has its whole context wherever it begins. The key of a token depends on the seed and its slot
only: decoding in chunks (to stream) gives the same tokens as at once.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from tinylm.config import BadInput, require
from tinylm.model.attention import KeyValue, empty
from tinylm.model.decoder import ModelConfig, Params, rebuild

CONTROL = 6
"""ids below this are control ids (text/tokenizer): sampling one ends the row"""
GROUP = 32
"""tokens that are searched together when one is drawn"""
BUCKET = 16
"""prompts are padded to a multiple of this, so that few lengths are compiled"""


class Decoding(NamedTuple):
    """Where a batch of rows is: the cache, the logits of the next token, and who has stopped."""

    cache: tuple[KeyValue, ...]
    logits: Float[Array, "B V"]
    slot: Int[Array, ""]
    begin: Int[Array, "B"]
    stopped: Bool[Array, "B"]


def prefill(config: ModelConfig, params: Params, prompts: Sequence[np.ndarray],
            width: int = 0, slots: int = 0, place: Callable = jnp.asarray) -> Decoding:
    """Read the prompts (ids, at least one each) into a cache with room for T tokens in each row.

    All prompts padded to one `width`, with room for `slots` tokens, share one program; `place`
    puts the rows on their devices.
    """
    if config.kind != "transformer":
        raise BadInput(f"a {config.kind} model keeps no cache; sample from a transformer")
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if shortest < 1 or longest >= config.T:
        raise BadInput(f"prompts of 1 to {config.T - 1} tokens fit the context T={config.T}, one "
                       f"has {longest}; shorten it")
    width = width or min(-(-longest // BUCKET) * BUCKET, config.T)
    rows = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[width - len(prompt):] = prompt
    begin = np.array([width - len(p) for p in prompts], np.int32)
    return _prefill(config, params, place(rows), place(begin), slots or config.T)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(config: ModelConfig, params: Params, rows: Array, begin: Array,
             slots: int) -> Decoding:
    B = rows.shape[0]
    cache = [empty(B, config.groups, slots, config.head_width) for _ in range(config.L)]
    model = rebuild(config, params)
    x, cache = model.extend(model.blocks(), rows, cache, jnp.int32(0), begin)
    return Decoding(cache, model.head(x[:, -1:])[:, 0], jnp.int32(rows.shape[1]), begin,
                    jnp.zeros(B, bool))


def decode(
    config: ModelConfig, params: Params, state: Decoding, count: int, key: Array,
    temperature: Float[Array, ""], ends: int = CONTROL,
) -> tuple[Decoding, Int[Array, "B N"]]:
    """Sample up to `count` tokens a row, 0 after its end; temperature 0 takes the likeliest.

    A row stops at an id below `ends` and where its context is full; all stopped ends it early.
    Each of the devices over which `prefill` put the rows decodes its own and waits for no other.
    """
    return _decode(config, params, state, count, key, temperature, ends, _spread(state.begin))


def _spread(rows: Array) -> NamedSharding | None:
    """Give how the rows lie on several devices; None for one, or where that is not known yet."""
    given = getattr(rows, "sharding", None)
    several = (isinstance(given, NamedSharding) and isinstance(given.mesh, Mesh)
               and given.num_devices > 1 and any(given.spec))
    return given if several else None


@functools.partial(jax.jit, static_argnums=(0, 3, 6, 7))
def _decode(config: ModelConfig, params: Params, state: Decoding, count: int, key: Array,
            temperature: Array, ends: int, spread: NamedSharding | None
            ) -> tuple[Decoding, Array]:
    B = len(state.begin)
    shares_NRB = jax.vmap(lambda slot: jax.random.uniform(jax.random.fold_in(key, slot), (2, B)))(
        state.slot + jnp.arange(count))

    def mine(params: Params, state: Decoding, shares_NRB: Array, temperature: Array
             ) -> tuple[Decoding, Array]:
        def said(state: Decoding, n: Array) -> tuple[Array]:
            token = jax.lax.cond(
                temperature > 0,
                lambda logits: draw(logits / temperature, shares_NRB[n]),
                lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32), state.logits)
            return (jnp.where(state.stopped, 0, token),)

        out = (jnp.zeros((len(state.begin), count), jnp.int32),)
        after, (tokens,) = _spoken(config, params, state, out, said, config.T, ends)
        return after._replace(slot=state.slot + count), tokens  # where all stopped it is not read

    if spread is None:
        return mine(params, state, shares_NRB, temperature)
    every, rows = PartitionSpec(), spread.spec
    states = Decoding(cache=rows, logits=rows, slot=every, begin=rows, stopped=rows)
    by_device = jax.shard_map(
        mine, mesh=spread.mesh, in_specs=(every, states, PartitionSpec(None, None, *rows), every),
        out_specs=(states, rows), check_vma=False)
    return by_device(params, state, shares_NRB, temperature)


def _spoken(config: ModelConfig, params: Params, state: Decoding, out: tuple[Array, ...],
            said: Callable[[Decoding, Array], tuple[Array, ...]], limit: int | Int[Array, "B"],
            ends: int) -> tuple[Decoding, tuple[Array, ...]]:
    """Fill `out` [B, N, ...] with what is said of token n of each row, the token first.

    A row stops at an id below `ends` and at `limit` tokens; all stopped ends it early.
    """
    model = rebuild(config, params)
    blocks, count = model.blocks(), out[0].shape[1]

    def going(carry):
        state, _, n = carry
        return (n < count) & ~jnp.all(state.stopped)

    def one(carry):
        state, out, n = carry
        token, *_ = found = said(state, n)
        x, cache = model.extend(blocks, token[:, None], state.cache, state.slot, state.begin)
        stopped = state.stopped | (token < ends) | (state.slot + 1 - state.begin >= limit)
        fresh = Decoding(cache, model.head(x)[:, 0], state.slot + 1, state.begin, stopped)
        return fresh, tuple(a.at[:, n].set(b) for a, b in zip(out, found, strict=True)), n + 1

    state, out, _ = jax.lax.while_loop(going, one, (state, out, jnp.int32(0)))
    return state, out


def draw(logits: Float[Array, "B V"], shares: Float[Array, "2 B"]) -> Int[Array, "B"]:
    """Sample a token a row by inverting the cumulative distribution, in two levels of GROUP.

    `shares` are uniform from 0 to 1. At V=1024 and 64 rows on a CPU it takes a twelfth of the time
    of Gumbel noise.
    """
    return _inverted(jax.nn.softmax(logits, axis=-1), shares)


class Said(NamedTuple):
    """Tokens that `advance` drew, with log-probabilities at temperature 1, nats."""

    tokens: Int[Array, "B N"]
    logp: Float[Array, "B N"]
    top: Int[Array, "B N k"]
    """the likeliest tokens there, best first"""
    top_logp: Float[Array, "B N k"]


@functools.partial(jax.jit, static_argnums=(0, 3), static_argnames="k", donate_argnums=2)
def advance(
    config: ModelConfig, params: Params, state: Decoding, count: int, keys: Key[Array, "B"],
    temperature: Float[Array, "B"], top_p: Float[Array, "B"], limit: Int[Array, "B"], k: int = 5,
) -> tuple[Decoding, Said]:
    """Sample up to `count` tokens a row as `decode` does, each row by its own key and dials.

    What a row draws depends on its key and its own text, not on the rows beside it. `top_p` keeps
    the likeliest tokens that make up this share (1904.09751), 1 all. A row stops when it has
    `limit` tokens (T at most), its prompt included. The state given is used up.
    """
    B, k = state.stopped.shape[0], min(k, config.V)
    out = Said(jnp.zeros((B, count), jnp.int32), jnp.zeros((B, count)),
               jnp.zeros((B, count, k), jnp.int32), jnp.zeros((B, count, k)))
    lengths = (state.slot - state.begin)[:, None] + jnp.arange(count)
    own = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, lengths)
    shares = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(own).T  # [2, N, B]
    cool, plain = jnp.maximum(temperature, 1e-6)[:, None], jnp.all(temperature == 1)

    def said(state: Decoding, n: Array) -> tuple[Array, ...]:
        logits = state.logits - state.logits.max(axis=-1, keepdims=True)
        whole = jnp.exp(logits)
        p = jax.lax.cond(plain, lambda: whole, lambda: jnp.exp(logits / cool))
        p = jax.lax.cond(jnp.any(top_p < 1), lambda p: _nucleus(
            p / p.sum(axis=-1, keepdims=True), top_p), lambda p: p, p)
        token = _inverted(p, shares[:, n])
        token = jax.lax.cond(jnp.all(temperature > 0), lambda: token, lambda: jnp.where(
            temperature > 0, token, jnp.argmax(logits, axis=-1).astype(jnp.int32)))
        token = jnp.where(state.stopped, 0, token)
        total = jnp.log(whole.sum(axis=-1, keepdims=True))
        best_logp, best = jax.lax.top_k(logits, k)
        return (token, (jnp.take_along_axis(logits, token[:, None], axis=1) - total)[:, 0], best,
                best_logp - total)

    state, found = _spoken(config, params, state, tuple(out), said, limit, CONTROL)
    return state, Said(*found)


def _nucleus(p: Float[Array, "B V"], share: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Keep what is at least as likely as the least likely of the nucleus.

    That one is the least p that still has less than the share above it. It is found by halving the
    numbers between 0 and 1 as they lie in memory, where they are in order: 31 sums of V, which
    on a CPU take a tenth of the time of sorting.
    """
    def halve(_, ends):
        low, high = ends
        middle = jnp.maximum((low + high) // 2, 0)
        above = jnp.where(p > jax.lax.bitcast_convert_type(middle, jnp.float32), p, 0.0).sum(-1)
        enough = (above >= share)[:, None]
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    one = jnp.full((len(p), 1), np.float32(1).view(np.int32))
    _, least = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(one, -1), one))
    return jnp.where(p >= jax.lax.bitcast_convert_type(least, jnp.float32), p, 0.0)


def _inverted(p: Float[Array, "B V"], shares: Float[Array, "2 B"]) -> Int[Array, "B"]:
    """Give the token at which the running sum of p passes a share of its whole, in two levels."""
    B, V = p.shape
    p = jnp.pad(p, ((0, 0), (0, -V % GROUP))).reshape(B, -1, GROUP)
    outer, inner = shares
    group = _invert(p.sum(axis=-1), outer)
    inside = _invert(jnp.take_along_axis(p, group[:, None, None], axis=1)[:, 0], inner)
    return (group * GROUP + inside).astype(jnp.int32)


def _invert(p: Float[Array, "B N"], share: Float[Array, "B"]) -> Int[Array, "B"]:
    """Give the bin in which that share (0 to 1) of p's sum is reached; never an empty one."""
    total = jnp.cumsum(p, axis=-1)
    return jnp.sum(total <= jnp.minimum(share, 1 - 1e-6)[:, None] * total[:, -1:], axis=-1)


def sample(config: ModelConfig, params: Params, prompts: Sequence[np.ndarray], count: int,
           seed: int = 0, temperature: float = 1.0) -> list[np.ndarray]:
    """Give up to `count` new ids for each prompt, up to and with the control id that ended it."""
    _check(count, seed, temperature)
    state = prefill(config, params, prompts)
    _, out = decode(config, params, state, count, jax.random.key(seed), jnp.float32(temperature))
    return [_cut(row[: config.T - len(prompt)])
            for row, prompt in zip(np.asarray(out), prompts, strict=True)]


def stream(config: ModelConfig, params: Params, prompt: np.ndarray, count: int, seed: int = 0,
           temperature: float = 1.0, every: int = 8) -> Iterator[np.ndarray]:
    """Yield the same ids as `sample` gives for one prompt, `every` at a time."""
    _check(count, seed, temperature)
    state, key = prefill(config, params, [prompt]), jax.random.key(seed)
    left = min(count, config.T - len(prompt))
    while left > 0 and not bool(state.stopped[0]):
        state, out = decode(config, params, state, every, key, jnp.float32(temperature))
        yield _cut(np.asarray(out)[0, :min(every, left)])
        left -= every


def _cut(row: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(row < CONTROL)
    return row[: ends[0] + 1] if len(ends) else row


def _check(count: int, seed: int, temperature: float) -> None:
    require("count", count, 1, 1e9)
    require("seed", seed, 0, 2**32 - 1)
    require("temperature", temperature, 0, 1e6)
