"""The tuned lens (2303.08112): what each depth already knows, read in the last one's language.

Of every depth an affine map of the stream is fitted, so that the head reads it as nearly as it can
like the whole model's prediction (least KL of that from it). It starts as the logit lens, where the
map adds nothing, and is fitted on training text; how much nearer it comes is told on held-out text.
"""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from tinylm import files
from tinylm.config import BadInput, require
from tinylm.model.capture import lens, streams
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.shards import Dataset
from tinylm.train.batch import batch

ROWS = 4
"""windows of T tokens a step"""
LR = 1e-3
"""Adam's, decayed to 0 in a line"""
HELDOUT = 16
"""windows on which it is scored"""


class Maps(NamedTuple):
    """An affine map of the stream at each depth but the last."""

    weight: Float[Array, "L D D"]
    bias: Float[Array, "L D"]

    def __call__(self, stream: Float[Array, "L1 ... D"]) -> Float[Array, "L1 ... D"]:
        """Add each depth's map of its stream; the last depth stays."""
        moved = jnp.einsum("l...d,lde->l...e", stream[:-1], self.weight)
        bias = self.bias.reshape(len(self.bias), *[1] * (stream.ndim - 2), -1)
        return jnp.concatenate([stream[:-1] + moved + bias, stream[-1:]])


class Fitted(NamedTuple):
    """What `fit` came to: held-out KL of the whole model's prediction from each depth's, nats."""

    maps: Maps
    before: Float[np.ndarray, "L"]
    after: Float[np.ndarray, "L"]


def fit(config: ModelConfig, params: Params, data: Dataset, steps: int, seed: int = 0,
        told: Callable[[int, float], None] = lambda step, nats: None) -> Fitted:
    """Fit the maps by Adam over `steps` batches of ROWS windows of training text."""
    require("steps", steps, 1, 1e6)
    require("seed", seed, 0, 2**32 - 1)
    maps = Maps(jnp.zeros((config.L, config.D, config.D)), jnp.zeros((config.L, config.D)))
    tx = optax.adam(optax.linear_schedule(LR, 0.0, steps))
    state = tx.init(maps)
    fresh = batch(data.heldout, 0, 0, HELDOUT, config.T).tokens[:, :-1]
    before = np.asarray(apart(config, params, maps, fresh))
    for t in range(steps):
        tokens = batch(data.train, seed, t, ROWS, config.T).tokens[:, :-1]
        maps, state, nats = _step(config, tx.update, params, maps, state, tokens)
        told(t + 1, nats)
    return Fitted(maps, before, np.asarray(apart(config, params, maps, fresh)))


@functools.partial(jax.jit, static_argnums=0)
def apart(config: ModelConfig, params: Params, maps: Maps,
          tokens: Int[Array, "B T"]) -> Float[Array, "L"]:
    """Give the KL of the whole model's prediction from each depth's, mean over tokens, nats."""
    read = jax.vmap(functools.partial(lens, config, params))

    def one(row: Int[Array, "T"]) -> Float[Array, "L"]:
        stream = jax.lax.stop_gradient(streams(config, params, row))
        said = jax.nn.log_softmax(read(maps(stream)), axis=-1)
        whole = jax.lax.stop_gradient(said[-1])
        return (jnp.exp(whole) * (whole - said[:-1])).sum(-1).mean(-1)

    return jax.lax.map(one, tokens).mean(axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(config, update, params, maps, state, tokens) -> tuple[Maps, Any, Array]:
    nats, slope = jax.value_and_grad(
        lambda maps: apart(config, params, maps, tokens).mean())(maps)
    moves, state = update(slope, state)
    return optax.apply_updates(maps, moves), state, nats


def save(folder: Path, maps: Maps, **facts: Any) -> None:
    """Write the maps and what they belong to into a folder with a manifest."""
    data = io.BytesIO()
    np.savez(data, **{k: np.asarray(v) for k, v in maps._asdict().items()})
    with files.staged(folder, **facts) as place:
        files.write_bytes(place / "maps.npz", data.getvalue())


def facts(folder: Path) -> dict[str, Any]:
    """Read what is known of a lens, checked by its manifest; BadInput where there is none."""
    if not (folder / files.MANIFEST).exists():
        raise BadInput(f"{folder} holds no tuned lens; tinylm lens makes one in a new folder")
    return files.verified(folder)


def load(folder: Path, of: str) -> Maps:
    """Read the maps that were fitted to the run whose id is `of`."""
    known = facts(folder)
    if known.get("kind") != "tuned lens" or known.get("of") != of:
        raise BadInput(f"{folder} is no tuned lens of run {of}; make one with tinylm lens")
    with np.load(folder / "maps.npz", allow_pickle=False) as stored:
        return Maps(*(jnp.asarray(stored[name]) for name in Maps._fields))
