"""Post-training losses: the shared fixtures where they are, closed forms of our own always."""

import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model_decoder import drawn as weights_of

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


def sequence_logp(logits, targets, mask):
    return jnp.sum(jnp.where(mask > 0, losses.token_logp(logits, targets), 0.0), axis=-1)


def best_first(mask):
    return jnp.triu(mask[:, :, None] * mask[:, None, :], 1)


def supervised(logits, targets, mask):
    total = jnp.sum(sequence_logp(logits, targets, mask))
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
    wins = best_first(jnp.ones_like(scores))
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
        wins = best_first(jnp.ones_like(scores))
        close(mean(losses.bradley_terry, scores, wins)[0], ranking["instructgpt"], x64)
        huge = arrays(x64, want["huge"]["chosen"], want["huge"]["rejected"])
        close(mean(bradley_terry_pairs, *huge, 0.0, 0.0)[0], want["huge"]["loss"], x64)


def preferences(logits, ref, targets, mask, **kwargs):
    own, other = (sequence_logp(x, targets, mask) for x in (logits, ref))
    n = len(own) // 2
    return losses.dpo(own[:n], own[n:], other[:n], other[n:], jnp.ones_like(own[:n]), **kwargs)


@BOTH
def test_dpo_equals_the_fixture(numbers, x64):
    want = numbers["dpo"]
    with jax.enable_x64(x64):
        logits, ref, mask = arrays(x64, want["policy_logits"], want["ref_logits"], want["mask"])
        targets, n = jnp.asarray(want["targets"]), want["N"]
        own, other = arrays(x64, want["policy_sum_logp"], want["ref_sum_logp"])
        close(sequence_logp(logits, targets, mask), own, x64)
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


def test_a_response_s_score_is_read_at_its_last_token(monkeypatch):
    """One slot earlier it is the score of a response without its end, one later of padding."""
    monkeypatch.setattr(losses.heads, "last_scores", lambda config, params, tokens, mask, plan:
                        losses.heads.at_last(jnp.broadcast_to(jnp.arange(
                            tokens.shape[1], dtype=jnp.float32), tokens.shape), mask))
    tokens = np.zeros((1, 3, 7), np.int32)
    mask = np.zeros((1, 3, 6), np.float32)  # of the tokens after the first
    mask[0, 0, 2:5] = mask[0, 1, 5:] = 1
    got = losses.response_scores(ModelConfig(), {}, SimpleNamespace(tokens=tokens, mask=mask))
    np.testing.assert_array_equal(got, [[5, 6, 0]])


def test_all_pairs_of_a_prompt_count_once_together():
    scores, mask = drawn(3, 3, 4), jnp.asarray([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0.]])
    each = []
    for row, real in zip(np.asarray(scores), np.asarray(mask), strict=True):
        pairs = [math.log1p(math.exp(row[j] - row[i])) for i in range(4) for j in range(i + 1, 4)
                 if real[i] and real[j]]
        each += [np.mean(pairs)] if pairs else []
    total, sums = losses.bradley_terry(scores, best_first(mask))
    assert float(sums["weight"]) == 2  # one answer alone teaches nothing
    np.testing.assert_allclose(total, sum(each), rtol=1e-5)
    moved, _ = losses.bradley_terry(scores + 5.0, best_first(mask))
    np.testing.assert_allclose(moved, total, rtol=1e-4)
    equal, sums = losses.bradley_terry(0 * scores, best_first(mask))
    np.testing.assert_allclose([equal / 2, sums["accuracy"] / 2], [math.log(2), 0.5], rtol=1e-6)


def test_dpo_sums_a_response_and_is_ln_2_at_the_reference():
    logits, targets, mask = jnp.zeros((4, 6, 9)), jnp.zeros((4, 6), int), jnp.ones((4, 6))
    mask = mask.at[2:, 2:].set(0)  # chosen responses of 6 tokens, rejected of 2
    dials = {"beta": 0.1, "smoothing": 0.0}
    assert float(sequence_logp(logits, targets, mask)[0]) == pytest.approx(-6 * math.log(9))
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


@pytest.mark.parametrize("count", [0, 3, 9, 10, 18])
def test_a_head_at_half_of_the_positions_has_the_loss_and_gradient_of_one_at_all(count):
    config = ModelConfig(V=20, D=8, L=1, H=2, T=9)
    draw = np.random.default_rng(count)
    tokens = draw.integers(0, 20, (2, 10)).astype(np.int32)
    mask = np.zeros(18, np.float32)
    mask[draw.permutation(18)[:count]] = draw.uniform(0.5, 2, count)
    mask, one = mask.reshape(2, 9), np.ones((2, 10), np.int32)
    loss = jax.jit(jax.value_and_grad(losses.next_token(config, 0.1), has_aux=True))
    want, got = (loss(weights_of(config), Batch(tokens, mask, packed)) for packed in (None, one))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("count", [9, 10])
def test_what_is_computed_follows_what_counts(count):
    mask = jnp.float32(np.arange(18) < count).reshape(2, 9)[:, ::-1]
    sizes = jax.jit(lambda x: losses.where_counted(lambda x: x + x.size, mask, x))(jnp.ones((2, 9)))
    half = count == 9 and jax.default_backend() == "cpu"
    np.testing.assert_array_equal(sizes, np.where(mask, 10 if half else 19, 0))


def test_a_response_s_log_probability_is_the_sum_over_its_tokens_read_off_the_model():
    config = ModelConfig(V=20, D=8, L=1, H=2, T=9)
    params, mask = weights_of(config), np.zeros((2, 2, 9), np.float32)
    tokens = np.random.default_rng(0).integers(0, 20, (2, 2, 10)).astype(np.int32)
    mask[0, :, 4:] = mask[1, 0, 7:] = mask[1, 1, 2:3] = 1
    got = jax.jit(functools.partial(losses.response_logp, config))(params, tokens, mask)
    for b in range(2):
        logits = rebuild(config, params)(jnp.asarray(tokens[b, :, :-1]))
        want = sequence_logp(logits, *map(jnp.asarray, (tokens[b, :, 1:], mask[b])))
        np.testing.assert_allclose(got[b], want, rtol=1e-5)


def test_a_kind_of_model_that_is_not_cut_in_two_has_log_probabilities_too():
    config = ModelConfig(kind="position_weights", V=20, D=8, L=3, T=9)
    params = init(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 20, (2, 10)).astype(np.int32)
    mask = np.float32(np.arange(18) % 9 > 5).reshape(2, 9)
    want = jax.jit(losses.next_token(config))(params, Batch(tokens, mask))[0]
    said = losses.response_logp(config, params, jnp.asarray(tokens[None]), jnp.asarray(mask[None]))
    np.testing.assert_allclose(-said.sum(), want, rtol=1e-5)


def test_a_packed_row_loses_what_its_conversations_lose_alone():
    config = ModelConfig(V=20, D=8, L=2, H=2, T=15)
    params = weights_of(config)
    loss = jax.jit(losses.next_token(config))
    draw = np.random.default_rng(0)
    one, two = (draw.integers(0, 20, n).astype(np.int32) for n in (7, 9))
    row = np.concatenate([one, two])[None]
    segments = np.repeat([1, 2], [7, 9])[None].astype(np.int32)
    inside = (segments[:, 1:] == segments[:, :-1]).astype(np.float32)
    packed = float(loss(params, Batch(row, inside, segments))[0])
    alone = 0.0
    for talk in (one, two):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, :len(talk)] = talk
        real = np.float32(np.arange(15) < len(talk) - 1)[None]
        alone += float(loss(params, Batch(tokens, real))[0])
    assert packed == pytest.approx(alone, rel=1e-5)
    assert abs(loss(params, Batch(row, inside))[0] - packed) > 1e-3  # where each reads the other
