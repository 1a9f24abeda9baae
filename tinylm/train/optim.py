"""AdamW or Muon, width-aware, warmup-stable-decay; what may vary in a sweep is an array.

Rates follow muP for Adam (2203.03466): a matrix whose fan-in is the width, the head's tied table
included, learns at lr * 64 / D, gains and an untied table at lr; so `lr` is always the rate of a
model of width 64. From width 8 to 160 the best rate then stays within a factor 2
(experiments/results/lr_by_width.json). Weight decay goes by path.

Muon (optax.contrib) takes the blocks' matrices: its update has all singular values near 1, times
1.6 sqrt(max(1, out / in)), which at width 64 is about AdamW's size and needs no factor of width.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from tinylm.config import require
from tinylm.model.decoder import ModelConfig

WIDTH = 64
"""the width at which every parameter learns at rate lr"""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its schedule and its guards."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest"""
    lr: float = 4e-3
    """peak learning rate of a model of width 64"""
    beta1: float = 0.9
    """decay of the gradient's average"""
    beta2: float = 0.99
    """decay of the squared gradient's average"""
    weight_decay: float = 0.0
    """decoupled decay of the blocks' matrices, a share of lr"""
    clip: float = 1.0
    """largest global norm of the gradient"""
    z_loss: float = 1e-4
    """weight of the squared log-normaliser"""
    warmup: float = 0.1
    """share of the steps over which the rate rises from 0"""
    warmup_steps: int = 0
    """steps over which it rises, in place of a share; 0: the share"""
    decay: float = 0.3
    """share of the steps, at the end, over which the rate falls to 0"""

    nonfinite: Literal["stop", "skip"] = "stop"
    """what a loss or gradient that is not finite does: end the run, or pass its step by"""

    def __post_init__(self):
        require("lr", self.lr, 1e-9, 1e30)
        for name, high in (("beta1", 0.99999), ("beta2", 0.99999), ("warmup", 1), ("decay", 1),
                           ("weight_decay", 1e6), ("z_loss", 1e6)):
            require(name, getattr(self, name), 0, high)
        require("clip", self.clip, 1e-9, 1e30)
        require("warmup_steps", self.warmup_steps, 0, 1e9)

    @property
    def program(self) -> "OptimConfig":
        """What the compiled program depends on: this config without what Hyper holds."""
        return dataclasses.replace(self, lr=1.0, weight_decay=0.0, warmup=0.0, warmup_steps=0,
                                   decay=0.0)


class Hyper(NamedTuple):
    """What a population or a sweep may vary without a new program: float32 scalars."""

    lr: Float[Array, ""]
    weight_decay: Float[Array, ""]
    warmup_steps: Float[Array, ""]
    decay_steps: Float[Array, ""]
    steps: Float[Array, ""]


def hyper(config: OptimConfig, steps: int) -> Hyper:
    """Turn the config's shares into steps, as arrays."""
    up = config.warmup_steps or max(1.0, config.warmup * steps)
    values = (config.lr, config.weight_decay, up, max(1.0, config.decay * steps), steps)
    return Hyper(*(jnp.asarray(v, jnp.float32) for v in values))


def rate(h: Hyper, step: Array) -> Float[Array, ""]:
    """Give the schedule's rate at a step: up over warmup, flat, down to 0 over decay."""
    t = step.astype(jnp.float32)
    up = (t + 1.0) / h.warmup_steps
    down = (h.steps - t) / h.decay_steps
    return h.lr * jnp.clip(jnp.minimum(up, down), 0.0, 1.0)


def optimiser(config: OptimConfig, model: ModelConfig, mesh: jax.sharding.Mesh | None = None
              ) -> optax.GradientTransformationExtraArgs:
    """Build the transformation; `update` takes `hyper` and `step` as extra arguments.

    The devices of a `mesh` share the layers out for Muon, which costs a fifth of a small step.
    """
    direction = optax.scale_by_adam(config.beta1, config.beta2, eps=1e-8)
    if config.kind == "muon":
        muon = optax.contrib.scale_by_muon(weight_dimension_numbers=_axes)
        if mesh is not None and mesh.size > 1 and model.L % mesh.size == 0:
            muon = _shared_out(muon, mesh)
        direction = optax.partition({"adamw": direction, "muon": muon}, _kinds)
    return optax.chain(optax.clip_by_global_norm(config.clip), direction,
                       _decay_and_rate(config.kind, model))


def _shared_out(muon: optax.GradientTransformation, mesh: jax.sharding.Mesh
                ) -> optax.GradientTransformation:
    """Let each device take its part of the layers (the first axis) and tell it to all."""
    def mine(updates: Any, state: Any) -> tuple[Any, Any]:
        def part(a: Array) -> Array:
            size = a.shape[0] // mesh.size
            return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("data") * size, size)

        updates, mu = jax.tree.map(part, (updates, state.mu))
        updates, state = muon.update(updates, state._replace(mu=mu))
        flat, whole = ravel_pytree((updates, state.mu))
        parts = jax.vmap(whole)(jax.lax.all_gather(flat, "data"))
        updates, mu = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)
        return updates, state._replace(mu=mu)

    spec = PartitionSpec()
    everywhere = jax.shard_map(mine, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return optax.GradientTransformation(muon.init, lambda updates, state, _=None:
                                        everywhere(updates, state))


def _decay_and_rate(kind: str, model: ModelConfig) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params, *, hyper: Hyper, step: Array):
        lr = rate(hyper, step)

        def one(path: tuple, u: Array, p: Array) -> Array:
            decay = hyper.weight_decay if _decays(path) else 0.0
            return -lr * _factor(path, p.shape, kind, model) * (u + decay * p)

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _names(path: tuple) -> list[str]:
    names = [str(key.key) for key in path]
    return names[1:] if names[0] == "value" else names  # PPO's second trunk learns as the first


def _decays(path: tuple) -> bool:
    return _names(path)[-1].endswith("_proj")


def _kinds(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _decays(path) else "adamw", params)


def _axes(params: Any) -> Any:
    """Say which axes of a stacked matrix are its inputs and its outputs."""
    def one(path: tuple, p: Array) -> optax.contrib.MuonDimensionNumbers:
        inputs = (1, 2) if _names(path)[-1] == "o_proj" else (1,)
        outputs = tuple(range(1 + len(inputs), p.ndim))
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return jax.tree_util.tree_map_with_path(one, params)


def _factor(path: tuple, shape: tuple[int, ...], kind: str, model: ModelConfig) -> float:
    names: Any = _names(path)
    if kind == "muon" and _decays(path):
        inputs = math.prod(shape[1:-1]) if names[-1] == "o_proj" else shape[1]
        return 1.6 * math.sqrt(max(1.0, math.prod(shape[1:]) / inputs**2))
    hidden = names[-1].endswith("_proj") or names[0] in ("lm_head", "score_head")
    as_head = names[0] == "embed_tokens" and model.kind == "transformer" and model.tied
    return WIDTH / model.D if hidden or as_head else 1.0
