"""Policy losses: what the mask hides, what the clip holds, how lengths weigh, what adds up."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_losses import drawn, graded, ragged

from tinylm.train import losses, rewards

POLICY = {"low": 0.2, "high": 0.3}
GROUP = POLICY | {"beta": 0.1, "kl": "k2", "length": "response", "budget": 8}


def policy_cases(mask):
    """Every masked loss as f(garbage in what the mask hides) over B x T arrays."""
    B, T = mask.shape
    old, ref, adv, values, returns = (drawn(s, B, T) for s in range(5))

    def hide(x, junk):
        return jnp.where(mask > 0, x, junk)

    return {
        "ppo": lambda x, j: losses.ppo(
            hide(x, j), hide(values, j), hide(old, -j), hide(values, -j), hide(adv, j),
            hide(returns, j), mask, clip=.2, value_clip=.2, value_weight=.1)[0],
        "grpo": lambda x, j: losses.grpo(hide(x, j), hide(old, -j), hide(ref, -j), adv[:, 0],
                                         mask, **GROUP | {"kl": "k3"})[0],
        "shaped": lambda x, j: jnp.sum(rewards.shaped(adv[:, 0], hide(x, j), hide(ref, -j), mask,
                                                      beta=.1) ** 2),
        "gae": lambda x, j: jnp.sum(rewards.gae(hide(x, j), hide(values, -j), mask, gamma=1.,
                                                lam=.9)[1] ** 2),
        "whitened": lambda x, j: jnp.sum(rewards.whitened(hide(x, j), mask) ** 3),
    }


@pytest.mark.parametrize("name", ["ppo", "grpo", "shaped", "gae", "whitened"])
def test_what_the_mask_hides_changes_nothing_to_the_bit(name):
    mask = ragged(5, 8).at[4].set(0)
    loss = jax.jit(jax.value_and_grad(policy_cases(mask)[name]))
    x = drawn(9, 5, 8) / 3
    value, grad = loss(x, jnp.float32(0.0))
    for junk in (7.0, -3e4, 3e4):
        again, same = loss(x, jnp.float32(junk))
        assert float(again) == float(value) and np.isfinite(value), (junk, value, again)
        np.testing.assert_array_equal(same, grad)
    hidden = np.asarray(mask) == 0
    assert np.isfinite(grad).all() and not np.asarray(grad)[hidden].any()
    assert np.abs(np.asarray(grad)[:4]).sum(1).all()  # each real response teaches


def test_at_ratio_one_the_policy_gradient_is_reinforce():
    logp, adv, mask = drawn(0, 3, 6), drawn(1, 3, 6), ragged(3, 6)
    total, sums, grad = graded(losses.clipped_policy, logp, logp, adv, mask, **POLICY)
    np.testing.assert_allclose(grad, -adv * mask / mask.sum(), rtol=1e-6)
    assert float(sums["clipped"]) == 0 == float(sums["old_kl_nats"])


@pytest.mark.parametrize(("moved", "adv", "held"), [
    (1.5, 1.0, True), (1.5, -1.0, False), (0.5, -1.0, True), (0.5, 1.0, False), (1.25, 1.0, False),
    (1.25, -1.0, False)])
def test_the_clip_holds_only_what_pushes_outward(moved, adv, held):
    one = jnp.ones((1, 1))
    loss, sums, grad = graded(losses.clipped_policy, math.log(moved) * one, 0 * one, adv * one,
                              one, **POLICY)
    bound = {1.5: 1.3, 0.5: 0.8}.get(moved, moved)
    np.testing.assert_allclose(loss, -adv * (bound if held else moved), rtol=1e-6)
    np.testing.assert_allclose(grad[0, 0], 0.0 if held else -adv * moved, rtol=1e-6)
    assert bool(sums["clipped"]) == held


def test_the_value_loss_takes_the_larger_of_free_and_held_errors():
    values, old, returns = (jnp.asarray([v]) for v in ([1.0, 0.1, 1.0], [0.0] * 3, [1., 1., -1.]))
    loss, sums, grad = graded(losses.clipped_value, values, old, returns, jnp.ones((1, 3)),
                              clip=0.2)
    np.testing.assert_allclose(loss, np.mean([0.64, 0.81, 4.0]) / 2, rtol=1e-6)
    np.testing.assert_allclose(grad[0], [0.0, -0.9 / 3, 2.0 / 3], rtol=1e-6)
    assert float(sums["value_clipped"]) == 1


def test_lengths_weigh_as_the_papers_say():
    mask = jnp.asarray([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0.]])
    for name, want in (("response", [[.5] * 1, [1 / 6] * 3]), ("tokens", [[.25], [.25] * 3]),
                       ("budget", [[1 / 16], [1 / 16] * 3])):
        weights, total = losses.length_weights(mask, name, 8)
        got = np.asarray(weights / total)
        np.testing.assert_allclose(got[0, :1], want[0], rtol=1e-6)
        np.testing.assert_allclose(got[1, :3], want[1], rtol=1e-6)
        assert got.sum() == pytest.approx(sum(map(sum, want))) and not got[2].any()


def test_rloo_falls_out_of_grpo():
    logp, mask, scores = drawn(0, 6, 5), ragged(6, 5), drawn(1, 2, 3)
    adv = rewards.group_advantages(scores, jnp.ones((2, 3)), baseline="others", scale="none")
    for b, r in np.ndindex(2, 3):
        others = np.delete(np.asarray(scores[b]), r)
        np.testing.assert_allclose(adv[b, r], scores[b, r] - others.mean(), rtol=1e-4)
    _, _, grad = graded(losses.grpo, logp, logp, logp, adv.ravel(), mask,
                        **GROUP | {"beta": 0.0, "length": "budget", "budget": 1})
    np.testing.assert_allclose(grad, -adv.reshape(6, 1) * mask / 6, rtol=1e-5)


@pytest.mark.parametrize("length", ["response", "tokens", "budget"])
def test_micro_batches_add_up_to_the_same_gradient(length):
    logp, old, ref, mask = drawn(0, 8, 6), drawn(1, 8, 6), drawn(2, 8, 6), ragged(8, 6)
    dials, adv = GROUP | {"length": length}, drawn(3, 8)
    _, sums, want = graded(losses.grpo, logp, old, ref, adv, mask, **dials)
    sum_of = jax.jit(jax.grad(functools.partial(losses.grpo, **dials), has_aux=True))
    parts = [sum_of(*(a[i:i + 2] for a in (logp, old, ref, adv, mask))) for i in range(0, 8, 2)]
    weight = sum(p[1]["weight"] for p in parts)
    np.testing.assert_allclose(weight, sums["weight"], rtol=1e-6)
    np.testing.assert_allclose(jnp.concatenate([p[0] for p in parts]) / weight, want, atol=1e-7)


def test_a_population_of_losses_is_the_losses_one_by_one():
    scores, wins = drawn(0, 3, 4, 5), jnp.triu(jnp.ones((4, 5, 5)), 1)
    args = [drawn(s, 3, 4, 6) for s in range(4)]
    mask = ragged(4, 6)

    def one(s, a, b, c, d):
        return (losses.bradley_terry(s, wins)[0],
                losses.grpo(a, b, c, d[:, 0], mask, **GROUP)[0],
                rewards.gae(a, b, mask, gamma=1.0, lam=0.9)[1])

    many, alone = jax.jit(jax.vmap(one))(scores, *args), jax.jit(one)
    for p in range(3):
        for got, want in zip(many, alone(*(x[p] for x in (scores, *args))), strict=True):
            np.testing.assert_allclose(got[p], want, rtol=1e-5, atol=1e-6)
    betas = jnp.asarray([0.1, 0.5])  # a dial may vary as well
    four = [x[0, :, 0] for x in args]
    each = functools.partial(losses.dpo, *four, jnp.ones(4), smoothing=0.0)
    np.testing.assert_allclose(jax.vmap(lambda b: each(beta=b)[0])(betas),
                               [each(beta=float(b))[0] for b in betas], rtol=1e-6)


def test_half_precision_is_widened_before_anything_is_summed():
    logits = drawn(0, 2, 3, 5).astype(jnp.bfloat16)
    assert losses.token_logp(logits, jnp.zeros((2, 3), int)).dtype == jnp.float32
    assert rewards.exact_kl(logits, logits).dtype == rewards.entropy(logits).dtype == jnp.float32
    wins = jnp.triu(jnp.ones((2, 3, 3)), 1)
    assert losses.bradley_terry(logits[:, :, 0], wins)[0].dtype == jnp.float32
