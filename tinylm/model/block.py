"""One transformer block: attention, then a gated MLP, each on a normalised residual stream."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tinylm.model.attention import Attention, KeyValue, Sight
from tinylm.model.embedding import Draw, RMSNorm, Rotation, param
from tinylm.model.product import Arithmetic, can_call, foreign, product


class MLP(nnx.Module):
    """down(silu(gate x) * up x), the gated unit of 2002.05202."""

    def __init__(self, D: int, F: int, stack: tuple[int, ...], by: Arithmetic, draw: Draw):
        self.by = by
        self.gate_proj = param(draw, (*stack, D, F), D**-0.5)
        self.up_proj = param(draw, (*stack, D, F), D**-0.5)
        self.down_proj = nnx.Param(jnp.zeros((*stack, F, D), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the unit to every position."""
        gate, up = (product("btd,df->btf", x, w[...], self.by)
                    for w in (self.gate_proj, self.up_proj))
        return product("btf,fd->btd", gated(gate, up, self.by), self.down_proj[...], self.by)


def gated(gate: Float[Array, "B T F"], up: Float[Array, "B T F"],
          by: Arithmetic) -> Float[Array, "B T F"]:
    """Give silu(gate) * up."""
    if by.native and can_call(("gate", "gate_back")):
        return _gated(gate, up)
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def _gated(gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    return foreign("gate", gate, gate, up)


_gated.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)),
              lambda kept, dy: tuple(foreign("gate_back", kept, *kept, dy)))


class Block(nnx.Module):
    """Attention and MLP with their norms; parameters of all layers are stacked by `stack`."""

    def __init__(self, D: int, H: int, G: int, K: int, F: int, smear: bool,
                 stack: tuple[int, ...], by: Arithmetic, draw: Draw):
        self.input_layernorm = RMSNorm((*stack, D), by)
        self.self_attn = Attention(D, H, G, K, smear, stack, by, draw)
        self.post_attention_layernorm = RMSNorm((*stack, D), by)
        self.mlp = MLP(D, F, stack, by, draw)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Rotation,
        sight: Sight,
        cache: KeyValue | None = None,
        start: Array | int = 0,
        fused: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValue | None]:
        """Add attention's and the MLP's output to the residual stream."""
        x, kept = self.mix(x, turn, sight, cache, start, fused)
        return self.think(x), kept

    def mix(self, x: Float[Array, "B T D"], *attended: Any, **how: Any
            ) -> tuple[Float[Array, "B T D"], KeyValue | None]:
        """Add attention's output: the part of a block in which positions meet."""
        mixed, kept = self.self_attn(self.input_layernorm(x), *attended, **how)
        return x + mixed, kept

    def think(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Add the MLP's output, position by position."""
        return x + self.mlp(self.post_attention_layernorm(x))
