"""Losses: arrays in, a weighted sum and its metrics out. The step divides by the total weight.

Sums, not means, so that micro-batches and devices of unequal weight add up to the same gradient.
Masks are 1 for what counts: a response's tokens up to and with its end, never its padding.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinylm.machine import PLAIN, Plan
from tinylm.model import heads
from tinylm.model.decoder import Decoder, ModelConfig, Params, rebuild
from tinylm.train.batch import Batch
from tinylm.train.rewards import Scalar, kl_estimate, wide

Sums = dict[str, Array]
Loss = Callable[[Params, Any], tuple[Array, Sums]]


def nll(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Give -log p(target) in nats and the log of the normaliser, each position."""
    logz = jax.nn.logsumexp(logits, axis=-1)
    return logz - chosen(logits, targets), logz


def chosen(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Give the logits of the targets.

    A GPU scatters the gradient of a look-up slowly, and a CPU takes a quarter more time a step to
    compare (D=24, V=2048).
    """
    def look_up(logits: Array, targets: Array) -> Array:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    def compare(logits: Array, targets: Array) -> Array:
        hit = targets[..., None] == jnp.arange(logits.shape[-1])
        return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)

    return jax.lax.platform_dependent(logits, targets, cpu=look_up, default=compare)


def where_counted(of: Callable[..., Any], mask: Float[Array, "B T"], *arrays: Array) -> Any:
    """Give of(*arrays), arrays [B, T] of positions, where the mask is not 0, and 0 elsewhere.

    A response is a third of its row, and the head two fifths of a small model's products: where
    half of the positions count or fewer, a CPU computes at half of them alone. An accelerator
    computes at all: it would wait for the count.
    """
    counts, room = mask.reshape(-1) != 0, mask.size // 2

    def everywhere(*arrays: Array) -> Any:
        return jax.tree.map(lambda a: jnp.where(mask != 0, a, 0), of(*arrays))

    def at_half(*arrays: Array) -> Any:
        here = jnp.argsort(~counts, stable=True)[:room]
        found = of(*(a.reshape(mask.size, *a.shape[2:])[here][None] for a in arrays))
        return jax.tree.map(lambda a: jnp.where(
            counts, jnp.zeros(mask.size, a.dtype).at[here].set(a[0]), 0).reshape(mask.shape), found)

    def by_count(*arrays: Array) -> Any:
        return jax.lax.cond(counts.sum() <= room, at_half, everywhere, *arrays)

    return jax.lax.platform_dependent(*arrays, cpu=by_count, default=everywhere)


def in_two(model: Any, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None
           ) -> tuple[Array, Callable[[Array], Array]]:
    """Give what a model makes of tokens together, and what makes logits of that by position.

    A kind of model that is not cut in two gives its logits at once.
    """
    if isinstance(model, Decoder):
        return model.states(tokens, segments, mixed=True), model.ending()
    return model(tokens, segments), lambda logits: logits


def next_token(config: ModelConfig, z_loss: float = 0.0, plan: Plan = PLAIN) -> Loss:
    """Build the loss of predicting tokens[:, 1:]: weighted nll + z_loss * logz^2 (2204.02311)."""

    def loss(params: Params, batch: Batch) -> tuple[Array, Sums]:
        model, w = rebuild(config, params, plan), batch.weights
        tokens, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        if batch.segments is None:
            if isinstance(model, Decoder) and (
                    found := model.cross_entropy(tokens, targets, w, z_loss)):
                return found[0], {"nats_per_token": found[1], "weight": jnp.sum(w)}
            each, logz = nll(model(tokens), targets)
        else:
            x, logits = in_two(model, tokens, batch.segments[:, :-1])
            each, logz = where_counted(lambda x, t: nll(logits(x), t), w, x, targets)
        sums = {"nats_per_token": jnp.sum(w * each), "weight": jnp.sum(w)}
        return jnp.sum(w * (each + z_loss * logz**2)), sums

    return loss


def ranking(config: ModelConfig, center: float = 0.0, plan: Plan = PLAIN) -> Loss:
    """Build the loss of scoring ranked responses (text/preferences.Ranked) by Bradley and Terry."""

    def loss(params: Params, batch: Any) -> tuple[Array, Sums]:
        return bradley_terry(response_scores(config, params, batch, plan), batch.wins,
                             center=center)

    return loss


def response_scores(config: ModelConfig, params: Params, batch: Any,
                    plan: Plan = PLAIN) -> Float[Array, "B R"]:
    """Give a reward model's score of each response, read at its last token; 0 for none."""
    B, R, T1 = batch.tokens.shape
    real = jnp.pad(batch.mask, ((0, 0), (0, 0), (1, 0))).reshape(B * R, T1)
    tokens = batch.tokens.reshape(B * R, T1)
    return heads.last_scores(config, params, tokens, real, plan).reshape(B, R)


class Pairs(NamedTuple):
    """Two responses to one prompt, the preferred one first."""

    tokens: Int[Array, "B 2 T1"]
    mask: Float[Array, "B 2 T"]
    ref: Float[Array, "B 2"]
    """log-probabilities of the responses under the reference, nats"""
    weights: Float[Array, "B"]


def preference(config: ModelConfig, beta: float, smoothing: float, plan: Plan = PLAIN) -> Loss:
    """Build the loss of direct preference optimisation (`dpo`) on Pairs."""

    def loss(params: Params, batch: Pairs) -> tuple[Array, Sums]:
        said = response_logp(config, params, batch.tokens, batch.mask, plan)
        return dpo(said[:, 0], said[:, 1], batch.ref[:, 0], batch.ref[:, 1], batch.weights,
                   beta=beta, smoothing=smoothing)

    return loss


def response_logp(config: ModelConfig, params: Params, tokens: Int[Array, "B R T1"],
                  mask: Float[Array, "B R T"], plan: Plan = PLAIN) -> Float[Array, "B R"]:
    """Give the log-probability of each response, summed over its tokens and its end, nats."""
    B, R, T1 = tokens.shape
    flat, mask = tokens.reshape(B * R, T1), mask.reshape(B * R, T1 - 1)
    model = rebuild(config, params, plan)
    x, logits = in_two(model, flat[:, :-1], None)
    each = where_counted(lambda x, t: token_logp(logits(x), t), mask, x, flat[:, 1:])
    return jnp.sum(_kept(each, mask), axis=-1).reshape(B, R)


def of_row(config: ModelConfig, params: Params,
           row: tuple[Int[Array, "R T1"], Float[Array, "R T"]]) -> Float[Array, "R"]:
    """Give `response_logp` of the responses to one prompt: their tokens and their mask."""
    return response_logp(config, params, row[0][None], row[1][None])[0]


def token_logp(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"],
    temperature: Scalar = 1.0,
) -> Float[Array, "B T"]:
    """Give log p(target) in nats under softmax(logits / temperature), each position.

    For rollouts the temperature is the sampler's, else old and new differ before any step.
    """
    return -nll(wide(logits) / temperature, targets)[0]


def bradley_terry(
    scores: Float[Array, "B R"], wins: Float[Array, "B R R"],
    margin: Float[Array, "#B #R #R"] | float = 0.0, center: Scalar = 0.0,
) -> tuple[Float[Array, ""], Sums]:
    """Sum over prompts -log sigmoid(score_i - score_j - margin), averaged over a prompt's pairs.

    `wins[b, i, j]` weighs "i beats j": 1 where i < j for a ranking, best first, both ways for noisy
    or soft labels, 0 for a tie or a missing response. All pairs of a prompt share one mean, so a
    prompt counts once (InstructGPT 2203.02155, sec. 3.5). `center` pulls score_i + score_j to 0
    (2312.09244), `margin` is Llama 2's (2307.09288). Nats; accuracy counts equal scores half.
    """
    scores = wide(scores)
    gap = scores[:, :, None] - scores[:, None, :]
    each = -jax.nn.log_sigmoid(gap - margin)
    each = each + center * (scores[:, :, None] + scores[:, None, :]) ** 2
    pairs = jnp.sum(wins, axis=(1, 2))
    share = wins / jnp.where(pairs > 0, pairs, 1.0)[:, None, None]
    total = jnp.sum(_kept(each, share))
    return total, {"nats_per_pair": jnp.sum(_kept(-jax.nn.log_sigmoid(gap), share)),
                   "accuracy": jnp.sum(share * (jnp.sign(gap) + 1) / 2),
                   "score_gap": jnp.sum(_kept(gap, share)),
                   "weight": jnp.sum(pairs > 0).astype(total.dtype)}


def dpo(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], ref_chosen: Float[Array, "B"],
    ref_rejected: Float[Array, "B"], weights: Float[Array, "B"], *, beta: Scalar,
    smoothing: Scalar,
) -> tuple[Float[Array, ""], Sums]:
    """Sum -log sigmoid(beta * ((chosen - its ref) - (rejected - its ref))) over pairs (2305.18290).

    Arguments are log-probabilities *summed* over a response (`response_logp`), in nats.
    `smoothing` is the share of labels taken to be flipped (E. Mitchell's note on cDPO, 2023). At
    the reference the loss is ln 2 a pair. `chosen_logp` is reported since it may fall while the
    loss does.
    """
    reward_chosen = beta * (wide(chosen) - ref_chosen)
    reward_rejected = beta * (wide(rejected) - ref_rejected)
    gap = reward_chosen - reward_rejected
    each = -(1 - smoothing) * jax.nn.log_sigmoid(gap) - smoothing * jax.nn.log_sigmoid(-gap)
    metrics = {"nats_per_pair": each, "accuracy": (jnp.sign(gap) + 1) / 2, "reward_gap": gap,
               "reward_chosen": reward_chosen, "reward_rejected": reward_rejected,
               "chosen_logp": chosen, "rejected_logp": rejected}
    sums = {name: jnp.sum(_kept(value, weights)) for name, value in metrics.items()}
    return sums["nats_per_pair"], sums | {"weight": jnp.sum(weights)}


def clipped_policy(
    logp: Float[Array, "B T"], old: Float[Array, "B T"], advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"], *, low: Scalar, high: Scalar,
) -> tuple[Float[Array, ""], Sums]:
    """Sum -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), ratio = p / p_old (1707.06347).

    `weights` is the mask, or `length_weights`. old_kl_nats is the k1 estimate of KL(old || new).
    """
    moved = jnp.where(weights > 0, wide(logp) - old, 0.0)
    ratio = jnp.exp(moved)
    free, held = ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages
    total = -jnp.sum(_kept(jnp.minimum(free, held), weights))
    return total, {"policy_loss": total, "clipped": jnp.sum(weights * (held < free)),
                   "old_kl_nats": -jnp.sum(weights * moved), "weight": jnp.sum(weights)}


def clipped_value(
    values: Float[Array, "B T"], old: Float[Array, "B T"], returns: Float[Array, "B T"],
    mask: Float[Array, "B T"], *, clip: Scalar,
) -> tuple[Float[Array, ""], Sums]:
    """Sum the larger of half the squared errors of `values` and of them held within old +- clip."""
    values = wide(values)
    near = jnp.clip(values, old - clip, old + clip)
    free, held = (values - returns) ** 2 / 2, (near - returns) ** 2 / 2
    total = jnp.sum(_kept(jnp.maximum(free, held), mask))
    return total, {"value_loss": total, "value_clipped": jnp.sum(mask * (held > free)),
                   "weight": jnp.sum(mask)}


def ppo(
    logp: Float[Array, "B T"], values: Float[Array, "B T"], old: Float[Array, "B T"],
    old_values: Float[Array, "B T"], advantages: Float[Array, "B T"],
    returns: Float[Array, "B T"], mask: Float[Array, "B T"], *, clip: Scalar, value_clip: Scalar,
    value_weight: Scalar,
) -> tuple[Float[Array, ""], Sums]:
    """Sum the clipped policy loss + value_weight * the clipped value loss, over tokens.

    The KL to the reference is in the rewards (rewards.shaped), as in InstructGPT (2203.02155);
    advantages and returns come from rewards.gae, once a rollout, before the batch is cut.
    """
    policy, sums = clipped_policy(logp, old, advantages, mask, low=clip, high=clip)
    value, others = clipped_value(values, old_values, returns, mask, clip=value_clip)
    return policy + value_weight * value, others | sums


def length_weights(
    mask: Float[Array, "B T"], length: Literal["response", "tokens", "budget"], budget: int
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """Weigh tokens as the paper does; give the weights and the total that divides the sum.

    response: each response's mean, each response once (GRPO, 2402.03300); tokens: each token
    once (DAPO, 2503.14476); budget: the sum over `budget` tokens, each response once (Dr. GRPO,
    2503.20783). A budget of 1 with rewards.group_advantages(baseline="others") is RLOO.
    """
    mask = wide(mask)
    tokens = jnp.sum(mask, axis=-1, keepdims=True)
    responses = jnp.sum(tokens > 0).astype(mask.dtype)
    match length:
        case "response":
            return mask / jnp.maximum(tokens, 1.0), responses
        case "tokens":
            return mask, jnp.sum(mask)
        case "budget":
            return mask / budget, responses


def grpo(
    logp: Float[Array, "B T"], old: Float[Array, "B T"], ref: Float[Array, "B T"],
    advantages: Float[Array, "B"], mask: Float[Array, "B T"], *, low: Scalar, high: Scalar,
    beta: Scalar, kl: Literal["k1", "k2", "k3"], length: Literal["response", "tokens", "budget"],
    budget: int,
) -> tuple[Float[Array, ""], Sums]:
    """Sum the clipped policy loss of a response's one advantage + beta * its KL estimate as a loss.

    On policy the expected gradient of k2 is that of KL(pi || ref), that of k3 is that of
    KL(ref || pi), that of k1 is none (2510.01555); for the KL in the reward set beta=0 here and
    take advantages of rewards.shaped(...).sum(-1). Every metric is weighed as the loss is.
    """
    weights, total = length_weights(mask, length, budget)
    each = jnp.broadcast_to(advantages[:, None], mask.shape)
    policy, sums = clipped_policy(logp, old, each, weights, low=low, high=high)
    apart = jnp.where(mask > 0, wide(logp) - ref, 0.0)
    penalty = jnp.sum(weights * kl_estimate(apart, kl))
    return policy + beta * penalty, sums | {f"kl_{kl}_nats": penalty, "weight": total}


def _kept(x: Array, weights: Array) -> Array:
    """Weigh, with nothing (not 0 * inf) where the weight is 0."""
    return jnp.where(weights > 0, weights * x, 0.0)
