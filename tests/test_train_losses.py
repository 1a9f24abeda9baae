"""Post-training losses: the shared fixtures where they are, closed forms of our own always."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.model.decoder import ModelConfig, init, rebuild
from tinylm.train import losses, rewards
from tinylm.train.batch import Batch

BOTH = pytest.mark.parametrize("x64", [False, True])


def close(got, want, x64: bool, what: str = "loss") -> None:
    limit = 1e-9 if x64 else {"loss": 2e-5, "grad": 1e-5}[what]
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=limit, atol=limit)


def arrays(x64: bool, *values):
    out = [jnp.asarray(np.asarray(v, np.float64 if x64 else np.float32)) for v in values]
    return out[0] if len(out) == 1 else out


def mean(loss, *args, **kwargs):
    """Turn (sum, sums) into what the step minimises."""
    total, sums = loss(*args, **kwargs)
    return total / jnp.maximum(sums["weight"], 1.0), sums


def graded(loss, *args, which=0, **kwargs):
    """Give loss, sums and gradients, compiled."""
    f = functools.partial(mean, loss, **kwargs)
    (value, sums), grads = jax.jit(jax.value_and_grad(f, which, has_aux=True))(*args)
    return value, sums, grads


@pytest.fixture(scope="session")
def numbers(shared):
    return {p.stem: json.loads(p.read_text()) for p in (shared / "fixtures").glob("*.json")}


def supervised(logits, targets, mask):
    total = jnp.sum(losses.sequence_logp(logits, targets, mask))
    return -total, {"weight": jnp.sum(mask)}


@BOTH
def test_masked_cross_entropy_equals_the_fixture(numbers, x64):
    want = numbers["sft"]
    with jax.enable_x64(x64):
        logits, mask, empty = arrays(x64, want["logits"], want["mask"], want["all_masked"]["mask"])
        targets = jnp.asarray(want["targets"])
        loss, sums, grad = graded(supervised, logits, targets, mask)
        close(losses.token_logp(logits, targets), want["token_logps"], x64)
        close(loss, want["loss"], x64)
        close(grad, want["grad_logits"], x64, "grad")
        halves = [supervised(logits[h], targets[h], mask[h]) for h in (slice(2), slice(2, 4))]
        close(sum(h[0] for h in halves) / sum(h[1]["weight"] for h in halves), want["loss"], x64)
        loss, _, grad = graded(supervised, logits, targets, empty)
        assert float(loss) == 0 and not np.asarray(grad).any()


def bradley_terry_pairs(chosen, rejected, margin, center):
    scores = jnp.stack([chosen, rejected], axis=1)
    wins = losses.best_first(jnp.ones_like(scores))
    return losses.bradley_terry(scores, wins, jnp.reshape(margin, (-1, 1, 1)), center)


@BOTH
def test_the_reward_models_losses_equal_the_fixture(numbers, x64):
    want = numbers["reward_model"]
    with jax.enable_x64(x64):
        pair = arrays(x64, want["chosen"], want["rejected"])
        for case in want["cases"]:
            loss, sums, grads = graded(bradley_terry_pairs, *pair, arrays(x64, case["margin"]),
                                       case["center"], which=(0, 1))
            close(loss, case["loss"], x64)
            close(grads[0], case["grad_chosen"], x64, "grad")
            close(grads[1], case["grad_rejected"], x64, "grad")
            close(sums["accuracy"] / sums["weight"], want["accuracy"], x64)
        ranking = want["ranking"]
        scores = arrays(x64, [ranking["scores_best_first"]])
        wins = losses.best_first(jnp.ones_like(scores))
        close(mean(losses.bradley_terry, scores, wins)[0], ranking["instructgpt"], x64)
        close(mean(losses.plackett_luce, scores, jnp.ones_like(scores))[0],
              ranking["plackett_luce"], x64)
        huge = arrays(x64, want["huge"]["chosen"], want["huge"]["rejected"])
        close(mean(bradley_terry_pairs, *huge, 0.0, 0.0)[0], want["huge"]["loss"], x64)


def preferences(logits, ref, targets, mask, **kwargs):
    own, other = (losses.sequence_logp(x, targets, mask) for x in (logits, ref))
    n = len(own) // 2
    return losses.dpo(own[:n], own[n:], other[:n], other[n:], jnp.ones_like(own[:n]), **kwargs)


@BOTH
def test_dpo_equals_the_fixture(numbers, x64):
    want = numbers["dpo"]
    with jax.enable_x64(x64):
        logits, ref, mask = arrays(x64, want["policy_logits"], want["ref_logits"], want["mask"])
        targets, n = jnp.asarray(want["targets"]), want["N"]
        own, other = arrays(x64, want["policy_sum_logp"], want["ref_sum_logp"])
        close(losses.sequence_logp(logits, targets, mask), own, x64)
        for case in want["cases"]:
            dials = {"beta": case["beta"], "smoothing": case["label_smoothing"]}
            loss, sums, grad = graded(preferences, logits, ref, targets, mask, **dials)
            close(loss, case["loss"], x64)
            if case.get("grad_policy_logits") is not None:
                close(grad, case["grad_policy_logits"], x64, "grad")
            loss, sums, grads = graded(losses.dpo, own[:n], own[n:], other[:n], other[n:],
                                       jnp.ones_like(own[:n]), which=(0, 1), **dials)
            close(grads[0], case["grad_chosen_logp"], x64, "grad")
            close(grads[1], case["grad_rejected_logp"], x64, "grad")
            for name in ("reward_chosen", "reward_rejected"):
                close(sums[name] / n, np.mean(case[name]), x64)
            close(sums["accuracy"] / n, case["accuracy"], x64)
            close(sums["reward_gap"] / n, case["margin"], x64)
        close(mean(preferences, ref, ref, targets, mask, beta=.1, smoothing=0.)[0],
              want["policy_equals_ref"]["loss"], x64)


def expected_gradient(logits, ref, kind: str):
    """Sum p(token) * d estimate(token) / d logits over the whole vocabulary."""
    p = jax.lax.stop_gradient(jax.nn.softmax(logits))
    apart = jax.nn.log_softmax(logits) - jax.nn.log_softmax(ref)
    return jnp.sum(p * rewards.kl_estimate(apart, kind))


@BOTH
def test_kl_estimates_their_means_and_gradients_equal_the_fixture(numbers, x64):
    want = numbers["kl"]
    with jax.enable_x64(x64):
        logits, ref = arrays(x64, want["policy_logits"], want["ref_logits"])
        close(rewards.exact_kl(logits[None], ref[None])[0], want["exact_reverse_kl"], x64)
        close(rewards.exact_kl(ref[None], logits[None])[0], want["exact_forward_kl"], x64)
        p, apart = jax.nn.softmax(logits), jax.nn.log_softmax(logits) - jax.nn.log_softmax(ref)
        for kind in ("k1", "k2", "k3"):
            each = rewards.kl_estimate(apart, kind)
            close(each, want[kind], x64)
            close(jnp.sum(p * each, axis=-1), want[f"E_{kind}"], x64)
            grad = jax.jit(jax.grad(expected_gradient), static_argnums=2)(logits, ref, kind)
            close(grad, want[f"expected_grad_{kind}_as_loss"], x64, "grad")


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def ragged(B: int, T: int) -> jax.Array:
    """A prompt of 0 to 2 slots, a response of 1 to T / 2, then padding of one or more."""
    row, at = np.arange(B)[:, None], np.arange(T)
    start = row % 3
    end = start + 1 + (2 - row) % (T // 2)
    return jnp.asarray(((at >= start) & (at < end)).astype(np.float32))


def test_kl_as_a_loss_has_the_gradient_that_its_name_says():
    logits, ref = drawn(0, 3, 7), drawn(1, 3, 7)
    p, q = jax.nn.softmax(logits), jax.nn.softmax(ref)
    kl = jnp.sum(p * jnp.log(p / q), axis=-1, keepdims=True)
    want = {"k1": 0 * p, "k2": p * (jnp.log(p / q) - kl), "k3": p - q}
    for kind, gradient in want.items():
        got = jax.jit(jax.grad(expected_gradient), static_argnums=2)(logits, ref, kind)
        np.testing.assert_allclose(got, gradient, atol=1e-6)
    np.testing.assert_allclose(rewards.exact_kl(logits[None], ref[None])[0], kl[:, 0], rtol=1e-5)
    flat = rewards.entropy(jnp.zeros((1, 1, 7)))
    np.testing.assert_allclose(flat, math.log(7), rtol=1e-6)
    barred = jnp.asarray([[[0.0, -jnp.inf, 1.0, 0.5, 0.2]]])  # an id that may not be sampled

    def both(x):
        return jnp.sum(rewards.entropy(x) + rewards.exact_kl(x, 2 * barred))

    without = barred[..., jnp.asarray([0, 2, 3, 4])]
    want = rewards.entropy(without) + rewards.exact_kl(without, 2 * without)
    value, grad = jax.value_and_grad(both)(barred)
    np.testing.assert_allclose(value, want[0, 0], rtol=1e-6)
    assert np.isfinite(grad).all()


def test_a_temperature_divides_the_logits_before_the_softmax():
    logits, targets = drawn(0, 2, 3, 5), jnp.asarray([[0, 1, 2], [3, 4, 0]])
    power = jax.nn.softmax(logits) ** (1 / 0.7)
    want = jnp.log(jnp.take_along_axis(power / power.sum(-1, keepdims=True),
                                       targets[..., None], -1))[..., 0]
    np.testing.assert_allclose(losses.token_logp(logits, targets, 0.7), want, atol=1e-5)


def test_all_pairs_of_a_prompt_count_once_together():
    scores, mask = drawn(3, 3, 4), jnp.asarray([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0.]])
    each = []
    for row, real in zip(np.asarray(scores), np.asarray(mask), strict=True):
        pairs = [math.log1p(math.exp(row[j] - row[i])) for i in range(4) for j in range(i + 1, 4)
                 if real[i] and real[j]]
        each += [np.mean(pairs)] if pairs else []
    total, sums = losses.bradley_terry(scores, losses.best_first(mask))
    assert float(sums["weight"]) == 2  # one answer alone teaches nothing
    np.testing.assert_allclose(total, sum(each), rtol=1e-5)
    moved, _ = losses.bradley_terry(scores + 5.0, losses.best_first(mask))
    np.testing.assert_allclose(moved, total, rtol=1e-4)
    equal, sums = losses.bradley_terry(0 * scores, losses.best_first(mask))
    np.testing.assert_allclose([equal / 2, sums["accuracy"] / 2], [math.log(2), 0.5], rtol=1e-6)


def test_pairs_of_two_are_plackett_and_luces_ranking():
    scores, mask = drawn(4, 5, 2), jnp.ones((5, 2))
    np.testing.assert_allclose(losses.bradley_terry(scores, losses.best_first(mask))[0],
                               losses.plackett_luce(scores, mask)[0], rtol=1e-6)
    padded = jnp.concatenate([scores, jnp.full((5, 2), 9.0)], axis=1)
    both = jnp.concatenate([mask, 0 * mask], axis=1)
    value, grad = jax.jit(jax.value_and_grad(lambda s: losses.plackett_luce(s, both)[0]))(padded)
    np.testing.assert_allclose(value, losses.plackett_luce(scores, mask)[0], rtol=1e-6)
    assert np.isfinite(grad).all() and not np.asarray(grad)[:, 2:].any()


def test_dpo_sums_a_response_and_is_ln_2_at_the_reference():
    logits, targets, mask = jnp.zeros((4, 6, 9)), jnp.zeros((4, 6), int), jnp.ones((4, 6))
    mask = mask.at[2:, 2:].set(0)  # chosen responses of 6 tokens, rejected of 2
    dials = {"beta": 0.1, "smoothing": 0.0}
    assert float(losses.sequence_logp(logits, targets, mask)[0]) == pytest.approx(-6 * math.log(9))
    loss, sums, grad = graded(preferences, logits, logits, targets, mask, **dials)
    assert float(loss) == pytest.approx(math.log(2)) and float(sums["reward_gap"]) == 0
    # d loss / d logp of a chosen token is -beta / 2N whatever the length; 1 - 1/9 by the softmax
    np.testing.assert_allclose(grad[0, :, 0], -0.1 / 4 * 8 / 9, rtol=1e-5)
    np.testing.assert_allclose(grad[2, :2, 0], 0.1 / 4 * 8 / 9, rtol=1e-5)
    lifted = logits.at[:2, :, 0].set(1.0)
    assert float(mean(preferences, lifted, logits, targets, mask, **dials)[0]) < math.log(2)


def test_smoothing_is_the_mean_over_flipped_labels():
    own, ref, one = drawn(0, 4, 2), drawn(1, 4, 2), jnp.ones(4)
    right = losses.dpo(own[:, 0], own[:, 1], ref[:, 0], ref[:, 1], one, beta=.3, smoothing=0.)[0]
    wrong = losses.dpo(own[:, 1], own[:, 0], ref[:, 1], ref[:, 0], one, beta=.3, smoothing=0.)[0]
    both = losses.dpo(own[:, 0], own[:, 1], ref[:, 0], ref[:, 1], one, beta=.3, smoothing=.2)[0]
    np.testing.assert_allclose(both, 0.8 * right + 0.2 * wrong, rtol=1e-6)


def test_every_position_predicts_the_token_after_it_and_only_what_is_supervised():
    config = ModelConfig(V=20, D=8, L=1, H=2, T=9)
    params = init(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 20, (2, 10)).astype(np.int32)
    mask = np.asarray(ragged(2, 9))
    total, sums = jax.jit(losses.next_token(config))(params, Batch(tokens, mask))
    logits = np.asarray(jax.jit(lambda p, x: rebuild(config, p)(x))(params, tokens[:, :-1]))
    want = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        want += np.log(np.exp(logits[b, t]).sum()) - logits[b, t, tokens[b, t + 1]]
    np.testing.assert_allclose([total, sums["nats_per_token"]], [want, want], rtol=1e-5)
    assert float(sums["weight"]) == mask.sum()


POLICY = {"low": 0.2, "high": 0.3}
GROUP = POLICY | {"beta": 0.1, "kl": "k2", "length": "response", "budget": 8}


def policy_cases(mask):
    """Every masked loss as f(garbage in what the mask hides) over B x T arrays."""
    B, T = mask.shape
    old, ref, adv, values, returns = (drawn(s, B, T) for s in range(5))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 5, (B, T)))

    def hide(x, junk):
        return jnp.where(mask > 0, x, junk)

    return {
        "sequence_logp": lambda x, j: -jnp.sum(losses.sequence_logp(
            jnp.where(mask[..., None] > 0, x[..., None] * jnp.arange(5.0), j * jnp.arange(5.0)),
            jnp.where(mask > 0, ids, 3), mask)),
        "ppo": lambda x, j: losses.ppo(
            hide(x, j), hide(values, j), hide(old, -j), hide(values, -j), hide(adv, j),
            hide(returns, j), mask, clip=.2, value_clip=.2, value_weight=.1)[0],
        "grpo": lambda x, j: losses.grpo(hide(x, j), hide(old, -j), hide(ref, -j), adv[:, 0],
                                         mask, **GROUP | {"kl": "k3"})[0],
        "shaped": lambda x, j: jnp.sum(rewards.shaped(adv[:, 0], hide(x, j), hide(ref, -j), mask,
                                                      beta=.1) ** 2),
        "gae": lambda x, j: jnp.sum(rewards.gae(hide(x, j), hide(values, -j), mask, gamma=1.,
                                                lam=.9)[1] ** 2),
        "whitened": lambda x, j: jnp.sum(rewards.whitened(hide(x, j), mask, False) ** 3),
    }


@pytest.mark.parametrize("name", ["sequence_logp", "ppo", "grpo", "shaped", "gae", "whitened"])
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
    scores, wins = drawn(0, 3, 4, 5), losses.best_first(jnp.ones((4, 5)))
    args = [drawn(s, 3, 4, 6) for s in range(4)]
    mask, f = ragged(4, 6), functools.partial(losses.grpo, **GROUP)
    many = jax.jit(jax.vmap(lambda s, a, b, c, d: (
        losses.bradley_terry(s, wins)[0], f(a, b, c, d[:, 0], mask)[0],
        rewards.gae(a, b, mask, gamma=1., lam=.9)[1])))(scores, *args)
    for p in range(3):
        a, b, c, d = (x[p] for x in args)
        np.testing.assert_allclose(many[0][p], losses.bradley_terry(scores[p], wins)[0], rtol=1e-6)
        np.testing.assert_allclose(many[1][p], f(a, b, c, d[:, 0], mask)[0], rtol=1e-6)
        np.testing.assert_allclose(many[2][p], rewards.gae(a, b, mask, gamma=1., lam=.9)[1],
                                   rtol=1e-5, atol=1e-6)
    betas = jnp.asarray([0.1, 0.5])  # a dial may vary as well
    four = [x[0, :, 0] for x in args]
    each = functools.partial(losses.dpo, *four, jnp.ones(4), smoothing=0.0)
    np.testing.assert_allclose(jax.vmap(lambda b: each(beta=b)[0])(betas),
                               [each(beta=float(b))[0] for b in betas], rtol=1e-6)


def test_half_precision_is_widened_before_anything_is_summed():
    logits = drawn(0, 2, 3, 5).astype(jnp.bfloat16)
    assert losses.token_logp(logits, jnp.zeros((2, 3), int)).dtype == jnp.float32
    assert rewards.exact_kl(logits, logits).dtype == rewards.entropy(logits).dtype == jnp.float32
    wins = losses.best_first(jnp.ones((2, 3)))
    assert losses.bradley_terry(logits[:, :, 0], wins)[0].dtype == jnp.float32
