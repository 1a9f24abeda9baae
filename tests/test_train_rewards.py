"""Rewards and advantages by closed form, and the optimum that regularised policies must reach."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_losses import drawn, ragged

from tinylm.model.decoder import ModelConfig, init, rebuild
from tinylm.model.generate import decode, prefill
from tinylm.train import losses, rewards


def test_the_score_lies_on_the_last_real_token_and_rows_sum_to_score_minus_kl():
    logp, ref, scores = drawn(0, 4, 6), drawn(1, 4, 6), drawn(2, 4)
    mask = jnp.asarray([[0, 1, 1, 1, 0, 0], [1] * 6, [0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0.]])
    plain = rewards.shaped(scores, logp, ref, mask, beta=0.0)
    for row, last in enumerate((3, 5, 3, 4)):
        assert float(plain[row, last]) == float(scores[row])
    np.testing.assert_allclose(plain.sum(1), scores, rtol=1e-6)
    each = rewards.shaped(scores, logp, ref, mask, beta=0.3)
    np.testing.assert_allclose(each - plain, -0.3 * (logp - ref) * mask, atol=1e-6)
    likelier = rewards.shaped(scores, ref + 1.0, ref, mask, beta=0.3)
    assert (np.asarray(likelier.sum(1)) < np.asarray(scores)).all()  # leaving the reference costs
    assert not np.asarray(rewards.shaped(scores, logp, ref, 0 * mask, beta=0.3)).any()


def test_advantages_are_reward_to_go_at_lam_1_and_td_errors_at_lam_0():
    r, v, mask, gamma = drawn(0, 3, 6), drawn(1, 3, 6), ragged(3, 6), 0.9
    at = {lam: rewards.gae(r, v, mask, gamma=gamma, lam=lam) for lam in (0.0, 0.5, 1.0)}
    for b in range(3):
        real = np.flatnonzero(mask[b])
        rs, vs = np.asarray(r[b])[real], np.append(np.asarray(v[b])[real], 0.0)
        errors = rs + gamma * vs[1:] - vs[:-1]
        for lam, (adv, returns) in at.items():
            want = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(rs)))
                    for t in range(len(rs))]
            np.testing.assert_allclose(adv[b, real], want, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(returns[b, real], want + vs[:-1], rtol=1e-4, atol=1e-6)
        to_go = [sum(gamma ** (k - t) * rs[k] for k in range(t, len(rs))) for t in range(len(rs))]
        np.testing.assert_allclose(at[1.0][1][b, real], to_go, rtol=1e-4, atol=1e-6)
    assert not np.asarray(at[0.5][0] * (1 - mask)).any()


def test_holes_in_a_response_are_stepped_over():
    r, v = drawn(0, 1, 4), drawn(1, 1, 4)
    whole = rewards.gae(r, v, jnp.ones((1, 4)), gamma=0.9, lam=0.8)
    spread = jnp.asarray([0, 2, 3, 6])
    wide = [jnp.full((1, 8), 9.0).at[:, spread].set(x) for x in (r, v)]
    mask = jnp.zeros((1, 8)).at[:, spread].set(1)
    for a, b in zip(rewards.gae(*wide, mask, gamma=0.9, lam=0.8), whole, strict=True):
        np.testing.assert_allclose(a[:, spread], b, rtol=1e-5)


def test_whitening_sees_real_tokens_only_and_uses_bessels_count():
    x, mask = drawn(0, 4, 6) * 3 + 2, ragged(4, 6)
    real = np.asarray(x)[np.asarray(mask) > 0]
    got = np.asarray(rewards.whitened(x, mask))[np.asarray(mask) > 0]
    np.testing.assert_allclose(got, (real - real.mean()) / real.std(ddof=1), rtol=1e-4, atol=1e-5)


def test_group_advantages_sum_to_nothing_and_scale_as_published():
    scores = drawn(0, 4, 5) * jnp.asarray([[1.0], [3.0], [1.0], [0.0]]) + 2
    mask = jnp.ones((4, 5)).at[2, 3:].set(0)
    rows = [np.asarray(s)[np.asarray(m) > 0] for s, m in zip(scores, mask, strict=True)]
    every = np.concatenate(rows)
    for scale, spread in (("none", lambda r: 1.0), ("group", lambda r: r.std(ddof=1) + 1e-4),
                          ("batch", lambda r: every.std(ddof=1) + 1e-4)):
        for baseline in ("mean", "others"):
            got = rewards.group_advantages(scores, mask, baseline=baseline, scale=scale)
            np.testing.assert_allclose(got.sum(1), 0, atol=1e-5)
            assert not np.asarray(got * (1 - mask)).any() and not np.asarray(got[3]).any()
            for b in range(3):
                n = len(rows[b])
                want = (rows[b] - rows[b].mean()) / spread(rows[b])
                want *= n / (n - 1) if baseline == "others" else 1
                np.testing.assert_allclose(got[b, :n], want, rtol=1e-3, atol=1e-5)


def test_the_samplers_tokens_have_the_likelihood_that_the_full_forward_gives_them():
    # E[-log p(x)] over samples is the entropy, if and only if what is drawn is what is scored:
    # top-k, a temperature or a masked id in the sampler alone moves it by many standard errors.
    # Hot embeddings, so that a temperature shows.
    config = ModelConfig(V=24, D=16, L=1, H=2, T=32)
    params = init(config, jax.random.key(0))
    params["embed_tokens"]["weight"] *= 6.0
    prompts, N = [np.array([7, 8, 9], np.int32)] * 512, 6
    state = prefill(config, params, prompts)
    _, out = decode(config, params, state, N, jax.random.key(1), jnp.float32(1.0), ends=0)
    tokens = jnp.concatenate([jnp.asarray(np.stack(prompts)), out], axis=1)

    @jax.jit
    def score(params, tokens):
        logits = rebuild(config, params)(tokens[:, :-1])[:, 2:]
        return losses.token_logp(logits, tokens[:, 3:]), rewards.entropy(logits)

    logp, entropy = (np.asarray(x) for x in score(params, tokens))
    apart = (logp + entropy).sum(1)  # a martingale's end: mean 0
    assert abs(apart.mean()) < 4 * apart.std() / math.sqrt(len(apart)), apart.mean()
    assert entropy.mean() < 0.97 * math.log(24)


# One token, eight actions: the regularised optimum is ref * exp(reward / b) / Z.

V, B, STEPS, B_KL = 8, 256, 300, 0.5


def bandit(seed):
    """Draw rewards of deviation about 1 and a reference; give them and the closed form."""
    r, ref = jax.random.normal(jax.random.fold_in(jax.random.key(5), seed), (2, V))
    ref = jax.nn.log_softmax(ref)
    return r, ref, jax.nn.softmax(ref + r / B_KL)


def learn(objective, seed, steps=STEPS):
    """Adam from the reference on objective(params, actions' key); give the final policy."""
    _, ref, _ = bandit(seed)
    tx = optax.adam(optax.cosine_decay_schedule(0.1, steps))
    params = {"logits": ref, "value": jnp.zeros(())}

    def one(carry, key):
        params, opt = carry
        old = params
        for _ in range(2):  # two passes over each rollout: the second is off policy
            grads = jax.grad(objective)(params, old, key)
            updates, opt = tx.update(grads, opt)
            params = optax.apply_updates(params, updates)
        return (params, opt), None

    keys = jax.random.split(jax.random.fold_in(jax.random.key(6), seed), steps)
    (params, _), _ = jax.lax.scan(one, (params, tx.init(params)), keys)
    return jax.nn.softmax(params["logits"])


def distance(p, q):
    return jnp.sum(jnp.abs(p - q), -1) / 2


def finals(build):
    """Give the final policies of three seeds, in one program (optimised: it runs for long)."""
    one = jax.jit(jax.vmap(lambda seed: learn(build(seed), seed)),
                  compiler_options={"xla_backend_optimization_level": 2})
    return one(jnp.arange(3))


def apart(policies, closed_form=lambda seed: bandit(seed)[2]):
    """Give each seed's total variation from the closed form."""
    return np.asarray(distance(policies, jax.vmap(closed_form)(jnp.arange(3))))


def acts(params, old, key, count):
    """Sample actions of the old policy: ids [count, 1], new and old log-probabilities."""
    drawn = jax.random.categorical(key, old["logits"], shape=(count, 1))
    logits, before = (jnp.broadcast_to(p["logits"], (count, 1, V)) for p in (params, old))
    return drawn, losses.token_logp(logits, drawn), losses.token_logp(before, drawn)


def by_ppo(seed):
    r, ref, _ = bandit(seed)

    def objective(params, old, key):
        drawn, logp, before = acts(params, old, key, B)
        mask, values = jnp.ones((B, 1)), jnp.broadcast_to(old["value"], (B, 1))
        paid = rewards.shaped(r[drawn[:, 0]], before, ref[drawn], mask, beta=B_KL)
        adv, returns = rewards.gae(paid, values, mask, gamma=1.0, lam=0.95)
        total, sums = losses.ppo(logp, jnp.broadcast_to(params["value"], (B, 1)), before, values,
                                 adv, returns, mask, clip=.2, value_clip=.2, value_weight=.5)
        return total / sums["weight"]

    return objective


def by_grpo(seed, kl, inside, baseline, R=8, scale="none"):
    """KL in the loss as `kl`, or (inside) in the reward."""
    r, ref, _ = bandit(seed)

    def objective(params, old, key):
        drawn, logp, before = acts(params, old, key, B * 8)
        mask, scores = jnp.ones((B * 8, 1)), r[drawn[:, 0]]
        if inside:
            scores = rewards.shaped(scores, before, ref[drawn], mask, beta=B_KL).sum(-1)
        adv = rewards.group_advantages(scores.reshape(-1, R), jnp.ones((B * 8 // R, R)),
                                       baseline=baseline, scale=scale).ravel()
        total, sums = losses.grpo(logp, before, ref[drawn], adv, mask, low=.2, high=.2,
                                  beta=0.0 if inside else B_KL, kl=kl, length="tokens", budget=1)
        return total / sums["weight"]

    return objective


def by_dpo(seed):
    """Every pair, weighed by how often the reference draws it and the rewards' coin prefers it."""
    r, ref, _ = bandit(seed)
    won, lost = (jnp.ravel(x) for x in jnp.meshgrid(jnp.arange(V), jnp.arange(V), indexing="ij"))
    weights = jnp.exp(ref[won] + ref[lost]) * jax.nn.sigmoid(r[won] - r[lost])

    def objective(params, old, key):
        def logp(ids):
            wide = jnp.broadcast_to(params["logits"], (V * V, 1, V))
            return losses.token_logp(wide, ids[:, None])[:, 0]

        total, sums = losses.dpo(logp(won), logp(lost), ref[won], ref[lost], weights, beta=B_KL,
                                 smoothing=0.0)
        return total / sums["weight"]

    return objective


@pytest.mark.parametrize(("name", "build"), [
    ("ppo", by_ppo), ("dpo", by_dpo),
    ("grpo, KL in the reward", functools.partial(by_grpo, kl="k2", inside=True, baseline="mean")),
    ("grpo, k2", functools.partial(by_grpo, kl="k2", inside=False, baseline="others")),
    ("grpo, k2, 64 a group", functools.partial(by_grpo, kl="k2", inside=False, baseline="mean",
                                               R=64))])
def test_the_policy_reaches_the_reference_tilted_by_its_reward(name, build):
    assert (found := apart(finals(build))).max() < 0.02, found


def test_a_mean_over_few_responses_weighs_the_kl_of_the_loss_more():
    # The response's own score is in its baseline: E[gradient of the reward] shrinks by 1 - 1/R,
    # so beta acts as beta R / (R - 1).
    def tilted(seed):
        r, ref, _ = bandit(seed)
        return jax.nn.softmax(ref + r / (B_KL * 4 / 3))

    build = functools.partial(by_grpo, kl="k2", inside=False, baseline="mean", R=4)
    reached = finals(build)
    assert (apart(reached, tilted) < 0.02).all()
    assert (apart(reached) > 0.02).all()


def test_k3_as_a_loss_goes_where_the_algebra_says_and_not_to_the_optimum():
    # Its gradient is that of KL(ref || pi): p - ref. So r_i + b ref_i / p_i is one number, lam.
    def other(seed):
        r, ref, _ = bandit(seed)
        low, high = jnp.max(r), jnp.max(r) + V

        def halve(_, ends):
            middle = (ends[0] + ends[1]) / 2
            over = jnp.sum(B_KL * jnp.exp(ref) / (middle - r)) > 1
            return jnp.where(over, middle, ends[0]), jnp.where(over, ends[1], middle)

        lam = jax.lax.fori_loop(0, 60, halve, (low, high))[1]
        return B_KL * jnp.exp(ref) / (lam - r)

    build = functools.partial(by_grpo, kl="k3", inside=False, baseline="others")
    reached = finals(build)
    assert (apart(reached, other) < 0.02).all(), apart(reached, other)
    missed = apart(jax.vmap(other)(jnp.arange(3)))
    assert (apart(reached) > missed - 0.02).all() and (missed > 0.04).all(), missed
