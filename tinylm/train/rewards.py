"""From scores to advantages: KL to the reference, reward on the end token, GAE, group baselines.

What becomes a reward or an advantage is computed once a rollout, over the whole batch, and is
constant to the loss.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""] | float
"""a dial that a population may vary without a new program"""


def kl_estimate(apart: Float[Array, "..."], kind: Literal["k1", "k2", "k3"]) -> Float[Array, "..."]:
    """Estimate KL(pi || ref) from log pi - log ref of tokens drawn from pi, nats a token.

    With d that difference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. The means of k1 and k3 are
    the KL; what each does as a loss is another matter (losses.grpo).
    """
    match kind:
        case "k1":
            return apart
        case "k2":
            return apart**2 / 2
        case "k3":
            return jnp.expm1(-apart) + apart


def exact_kl(
    logits: Float[Array, "B T V"], ref: Float[Array, "B T V"]
) -> Float[Array, "B T"]:
    """Give KL(softmax(logits) || softmax(ref)) over the whole vocabulary, nats each position."""
    logp, logq = jax.nn.log_softmax(wide(logits)), jax.nn.log_softmax(wide(ref))
    p = jnp.exp(logp)  # 0 for an id whose logit is -inf, which then counts for nothing
    return jnp.sum(p * jnp.where(p > 0, logp - logq, 0.0), axis=-1)


def entropy(logits: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """Give the entropy of softmax(logits), nats each position; ln V where it is uniform."""
    logp = jax.nn.log_softmax(wide(logits))
    p = jnp.exp(logp)
    return -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)


def shaped(
    scores: Float[Array, "B"], logp: Float[Array, "B T"], ref: Float[Array, "B T"],
    mask: Float[Array, "B T"], *, beta: Scalar,
) -> Float[Array, "B T"]:
    """Give each token's reward: -beta * (logp - ref), and the score on the last real token.

    That token is the end of the turn where there is one; the caller lowers the score of a
    truncated response. A row sums to score - beta * the k1 estimate of its KL (2203.02155).
    """
    real = mask > 0
    last = real & (jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] == 1)
    return jnp.where(last, scores[:, None], 0.0) - beta * jnp.where(real, logp - ref, 0.0)


def gae(
    rewards: Float[Array, "B T"], values: Float[Array, "B T"], mask: Float[Array, "B T"], *,
    gamma: Scalar, lam: Scalar,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Give generalised advantages (1506.02438) and the returns, advantage + value.

    Nothing follows the last real token; slots masked out are stepped over and hold 0.
    """
    def back(carry, now):
        following, value = carry
        r, v, real = now
        a = r + gamma * value - v + gamma * lam * following
        return (jnp.where(real, a, following), jnp.where(real, v, value)), jnp.where(real, a, 0.0)

    zero = jnp.zeros_like(values[:, 0])
    steps = (rewards.T, values.T, mask.T > 0)
    _, advantages = jax.lax.scan(back, (zero, zero), steps, reverse=True)
    return advantages.T, jnp.where(mask > 0, advantages.T + values, 0.0)


def whitened(x: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Scale advantages to mean 0 and variance 1 (Bessel's) over the real tokens."""
    real = mask > 0
    count = jnp.sum(real)
    mean = jnp.sum(jnp.where(real, x, 0.0)) / jnp.maximum(count, 1)
    apart = jnp.where(real, x - mean, 0.0)
    return apart * jax.lax.rsqrt(jnp.sum(apart**2) / jnp.maximum(count - 1, 1) + 1e-8)


def group_advantages(
    rewards: Float[Array, "B R"], mask: Float[Array, "B R"], *,
    baseline: Literal["mean", "others"], scale: Literal["none", "group", "batch"],
) -> Float[Array, "B R"]:
    """Give reward - baseline among the responses to one prompt.

    mean: of all R, itself included, which shrinks the expected gradient by 1 - 1/R, so a KL kept
    in the loss weighs R/(R-1) times more; others: of the other R - 1 (RLOO, 2402.14740), R/(R-1)
    times the former, unbiased. scale: over (deviation + 1e-4), Bessel's, of the group
    (GRPO, 2402.03300) or of the batch's rewards; none is Dr. GRPO's (2503.20783) and keeps beta.
    """
    real = mask > 0
    count = jnp.sum(real, axis=1, keepdims=True)
    apart = jnp.where(real, rewards - _mean(rewards, real, 1), 0.0)
    match scale:
        case "group":
            spread = jnp.sum(apart**2, axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
            apart = apart / (jnp.sqrt(spread) + 1e-4)
        case "batch":
            whole = jnp.where(real, rewards - _mean(rewards, real, None), 0.0)
            spread = jnp.sum(whole**2) / jnp.maximum(jnp.sum(real) - 1, 1)
            apart = apart / (jnp.sqrt(spread) + 1e-4)
    return apart * count / jnp.maximum(count - 1, 1) if baseline == "others" else apart


def wide(x: Array) -> Array:
    """Give x in float32, or wider if it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean(x: Array, real: Array, axis: int | None) -> Array:
    total = jnp.sum(jnp.where(real, x, 0.0), axis=axis, keepdims=True)
    return total / jnp.maximum(jnp.sum(real, axis=axis, keepdims=True), 1)
