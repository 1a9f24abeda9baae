"""The decoder-only transformer, its config, and the way between modules and plain arrays.

Outside a loss there are only plain arrays: `init` draws them, `rebuild` makes the module of them.
Parameter names follow the Qwen3 layout (q_proj, k_norm, gate_proj, input_layernorm, ...), with the
layers stacked on a leading axis.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from tinylm.config import BadInput, require
from tinylm.laws.accounting import Shape
from tinylm.machine import PLAIN, Plan
from tinylm.model import entropy
from tinylm.model.attention import KeyValue, Sight, sight_from
from tinylm.model.block import Block
from tinylm.model.embedding import Cut, Draw, Embedding, RMSNorm, rotation
from tinylm.model.position_weights import PositionWeights
from tinylm.model.product import Arithmetic

Params = dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. D is the dial; fields left at 0 follow from it."""

    kind: Literal["transformer", "position_weights"] = "transformer"
    """position_weights: logits are a sum of one table a position over the last L tokens"""
    V: int = 1024
    """rows of the vocabulary"""
    D: int = 64
    """width of the residual stream; for position_weights the rank, dense from V up"""
    L: int = 2
    """layers; for position_weights the positions looked at"""
    H: int = 2
    """query heads"""
    G: int = 0
    """key/value heads; 0 means H"""
    K: int = 0
    """head width; 0 means D / H"""
    F: int = 0
    """mlp width; 0 means 8/3 D rounded up to a multiple of 8"""
    T: int = 128
    """context, tokens"""
    tied: bool = True
    """the output head is the embedding table"""
    compute: Literal["f32", "bf16"] = "f32"
    """what the operands of matrix products are rounded to; all else and all sums are float32"""
    rope_theta: float = 10000.0
    """base of the rotary wavelengths"""
    smear: bool = True
    """a key holds a learnt share of the key before it"""

    def __post_init__(self):
        most = {"V": 65536, "D": 1e6, "L": 1000, "H": 1e6, "T": 1e6}  # V: what a token file holds
        for name, high in most.items():
            require(name, getattr(self, name), 1, high)
        for name in ("K", "F", "G"):
            require(name, getattr(self, name), 0, 1e6)
        require("rope_theta", self.rope_theta, 1.0, 1e30)
        if not self.K and self.D % self.H:
            low = self.D // self.H * self.H
            either = f"D={low} or D={low + self.H}" if low else f"D={self.H}"
            raise BadInput(f"D={self.D} is not a multiple of H={self.H}; choose {either}")
        if self.head_width % 2:
            raise BadInput(f"head width K={self.head_width} is odd and rotation needs an even one; "
                           f"choose D={(self.head_width + 1) * self.H} or another K")
        if self.H % self.groups:
            raise BadInput(f"H={self.H} is not a multiple of G={self.G}; choose a divisor of H")

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.G or self.H

    @property
    def head_width(self) -> int:
        """Channels a head."""
        return self.K or self.D // self.H

    @property
    def mlp_width(self) -> int:
        """Channels inside the MLP."""
        return self.F or -(-8 * self.D // 24) * 8

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the operands of matrix products."""
        return jnp.dtype("bfloat16" if self.compute == "bf16" else "float32")

    @property
    def shape(self) -> Shape:
        """The shape that accounting counts.

        position_weights has no layers, only its head, and a dense one L rows of V that it adds up.
        """
        neural = self.kind == "transformer"
        dense = not neural and self.D >= self.V
        layers, D = self.L if neural else 0, self.L if dense else self.D
        return Shape(V=self.V, D=D, L=layers, H=self.H, G=self.groups, K=self.head_width,
                     F=self.mlp_width, T=self.T, tied=self.tied, smear=self.smear)


class Decoder(nnx.Module):
    """Embedding, L blocks, a norm and a head, executed as a plan says."""

    def __init__(self, c: ModelConfig, draw: Draw, plan: Plan = PLAIN):
        self.config, self.plan, by = c, plan, Arithmetic(
            c.dtype, plan.onednn, plan.native)
        self.embed_tokens = Embedding(c.V, c.D, by, draw)
        self.layers = Block(c.D, c.H, c.groups, c.head_width, c.mlp_width, c.smear, (c.L,),
                            by, draw)
        self.norm = RMSNorm((c.D,), by)
        if not c.tied:
            self.lm_head = Embedding(c.V, c.D, by, draw)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Give the logits of the next token at every position, float32.

        `segments` (conversation numbers) keep packed sequences apart: attention stays inside a
        segment, a run of equal numbers, and positions restart with it.
        """
        return self.head(self.states(tokens, segments))

    def states(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        first: int = 0,
        mixed: bool = False,
    ) -> Float[Array, "B T D"]:
        """Give the residual stream after the last block, before the norm.

        `mixed` stops where positions have met for the last time: what is left is `ending`.
        `first` numbers the layers from there, apart from another model's in one program (see
        attention.by_library).
        """
        plan, index = self.plan, np.arange(tokens.shape[1])[None]
        begin = np.zeros_like(index)
        if segments is not None:
            fresh = jnp.diff(segments, axis=1, prepend=-1) != 0
            begin = jax.lax.cummax(jnp.where(fresh, index, 0), axis=1)
        sight, (turn, x) = sight_from(begin), self._begin(tokens, index - begin)

        def layer(number: int, x: Float[Array, "B T D"], block: Block) -> Float[Array, "B T D"]:
            return block(x, turn, sight, fused=number if plan.fused else None)[0]

        def meet(number: int, x: Float[Array, "B T D"], block: Block) -> Float[Array, "B T D"]:
            return block.mix(x, turn, sight, fused=number if plan.fused else None)[0]

        layer = jax.checkpoint(layer, static_argnums=0) if plan.remat else layer
        if not plan.unroll and not mixed:
            return jax.lax.scan(lambda x, block: (layer(first, x, block), None), x, self.layers)[0]
        *blocks, last = self.blocks()
        for number, block in enumerate(blocks, first):
            x = layer(number, x, block)
        return (meet if mixed else layer)(first + len(blocks), x, last)

    def ending(self) -> Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]]:
        """Give what turns mixed states into logits: the last MLP and the head, by position."""
        last = self.blocks()[-1]
        return lambda x: self.head(last.think(x))

    def blocks(self) -> list[Block]:
        """Give the layers one by one (cut them once, outside a loop that uses them)."""
        return [jax.tree.map(lambda a, l=l: a[l], self.layers) for l in range(self.config.L)]

    def extend(
        self, blocks: Sequence[Block], tokens: Int[Array, "B T"], cache: Sequence[KeyValue],
        start: Array | int, begin: Int[Array, "B"],
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValue, ...]]:
        """Read tokens into slots start..start+T-1 of the layers' caches, seeing slots from `begin`.

        `begin` (rows padded on the left start later) also is where a row's positions count from.
        The S slots are a ring: slot n lies at n % S, over the one S tokens before it. Tokens read
        together must not go over its end. What comes back is for `head`.
        """
        T, S = tokens.shape[1], cache[0].k.shape[2]
        slots = start + jnp.arange(T)
        positions = slots[None, :] - begin[:, None]
        ago = (slots[:, None] - jnp.arange(S)[None, :]) % S
        visible = ago[None] <= positions[:, :, None]
        turn, x = self._begin(tokens, jnp.maximum(positions, 0))
        fresh = []
        for block, old in zip(blocks, cache, strict=True):
            x, new = block(x, turn, Sight(visible, positions > 0), old, start % S)
            fresh.append(new)
        return x, tuple(fresh)

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Turn the residual stream into logits."""
        return self._table().logits(self.norm(x))

    def cross_entropy(
        self, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], weights: Float[Array, "B T"],
        z_loss: float,
    ) -> tuple[Float[Array, ""], Float[Array, ""]] | None:
        """Give `entropy.cross_entropy` of the targets, None where logits are the faster way."""
        table = self._table()
        if not entropy.pays(table.by, self.config.D):
            return None
        return entropy.cross_entropy(table.by, self.norm(self.states(tokens)), table.weight[...],
                                     targets, weights, z_loss)

    def _table(self) -> Embedding:
        return self.embed_tokens if self.config.tied else self.lm_head

    def _begin(self, tokens, positions):
        c = self.config
        return rotation(positions, c.T, c.head_width, c.rope_theta), self.embed_tokens(tokens)


def build(c: ModelConfig, draw: Draw, plan: Plan = PLAIN) -> nnx.Module:
    """Make the module that the config names; a transformer is executed as the plan says."""
    match c.kind:
        case "transformer":
            return Decoder(c, draw, plan)
        case "position_weights":
            return PositionWeights(c.V, c.D, c.L, draw)


@functools.partial(jax.jit, static_argnums=0)
def init(c: ModelConfig, key: Array, scale: ArrayLike = 1.0) -> Params:
    """Draw the parameters, a nested dict of float32 arrays (always compiled: same bits).

    `scale` multiplies what is drawn, that is the standard deviations; norms' gains stay 1.
    """
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(_blueprint(c)[1]))
    drawn = nnx.to_pure_dict(nnx.state(build(c, Cut(key, count)), nnx.Param))
    return jax.tree_util.tree_map_with_path(
        lambda path, a: a if "norm" in jax.tree_util.keystr(path) else scale * a, drawn)


def rebuild(c: ModelConfig, params: Params, plan: Plan = PLAIN) -> Any:
    """Make the module whose parameters are `params`; it is a pytree, free to build."""
    return nnx.merge(_blueprint(c, plan)[0], nnx.State(params))


@functools.cache
def _blueprint(c: ModelConfig, plan: Plan = PLAIN) -> tuple[nnx.GraphDef, Any]:
    return nnx.split(nnx.eval_shape(lambda: build(c, jnp.zeros, plan)))
