"""A scalar head on a decoder: one number a position, a reward or a value.

    score = norm(x) . w + b,  w ~ N(0, 1 / (D + 1)), b = 0   (2403.17031)

The parameters are the decoder's and `score_head`, side by side: a tuned checkpoint starts one.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinylm.config import BadInput
from tinylm.machine import PLAIN, Plan
from tinylm.model.decoder import Decoder, ModelConfig, Params, rebuild


def with_head(config: ModelConfig, params: Params, key: Array) -> Params:
    """Add a fresh scalar head to a decoder's parameters; BadInput for another kind of model."""
    if config.kind != "transformer":
        raise BadInput(f"a {config.kind} model has no residual stream to score; "
                       "choose a transformer")
    weight = jax.random.normal(key, (config.D,)) / math.sqrt(config.D + 1)
    return {**params, "score_head": {"weight": weight, "bias": jnp.zeros(())}}


def scores(config: ModelConfig, params: Params, tokens: Int[Array, "B T"],
           plan: Plan = PLAIN) -> Float[Array, "B T"]:
    """Give the score at every position, having read the tokens up to and with it, float32."""
    model = _trunk(config, params, plan)
    return _read(params, model.norm(model.states(tokens, None, config.L)))


def last_scores(config: ModelConfig, params: Params, tokens: Int[Array, "B T"],
                mask: Float[Array, "B T"], plan: Plan = PLAIN) -> Float[Array, "B"]:
    """Give each row's score at its last real token, 0 for a row of padding.

    The last MLP is computed there alone. The mask is of the tokens scored (not of what they
    predict), so no id needs a meaning.
    """
    model = _trunk(config, params, plan)
    x = at_last(model.states(tokens, None, config.L, mixed=True), mask)[:, None]
    found = _read(params, model.norm(model.blocks()[-1].think(x)))[:, 0]
    return jnp.where(jnp.any(mask > 0, axis=1), found, 0.0)


def at_last(x: Float[Array, "B T *W"], mask: Float[Array, "B T"]) -> Float[Array, "B *W"]:
    """Give what each row has at its last real token, 0 for a row of padding."""
    real = mask > 0
    last = real & (jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] == 1)
    return jnp.sum(jnp.where(last.reshape(last.shape + (1,) * (x.ndim - 2)), x, 0.0), axis=1)


def _trunk(config: ModelConfig, params: Params, plan: Plan) -> Decoder:
    return rebuild(config, {k: v for k, v in params.items() if k != "score_head"}, plan)


def _read(params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    head = params["score_head"]
    return jnp.einsum("btd,d->bt", x.astype(jnp.float32), head["weight"]) + head["bias"]


def normalised(
    params: Params, mean: Float[Array, ""] | float, deviation: Float[Array, ""] | float
) -> Params:
    """Shift and scale the head so that scores of this mean and deviation become 0 and 1."""
    head = params["score_head"]
    return {**params, "score_head": {"weight": head["weight"] / deviation,
                                     "bias": (head["bias"] - mean) / deviation}}
