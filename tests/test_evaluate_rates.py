"""Intervals that cover, and best-of-n against every subset."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.evaluate import rates


def test_the_interval_covers_a_known_share_about_95_times_in_100():
    rng = np.random.default_rng(0)
    for p, n in ((0.5, 30), (0.9, 60), (0.95, 200)):
        cases = (rng.random((2000, n)) < p).astype(np.float32)
        got = jax.jit(jax.vmap(rates.share, (0, None)))(cases, jnp.ones(n))
        inside = np.mean((np.asarray(got.low) <= p) & (p <= np.asarray(got.high)))
        assert 0.93 < inside < 0.98, (p, n, inside)


def test_wilsons_interval_of_7_in_10_is_the_textbooks():
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96
    got = rates.share(jnp.asarray([1.0] * 7 + [0.0] * 3 + [9.0]), jnp.asarray([1.0] * 10 + [0.0]))
    np.testing.assert_allclose(got, [0.7, 0.396775, 0.892211, 10], rtol=1e-4)
    none = rates.share(jnp.ones(3), jnp.zeros(3))
    np.testing.assert_allclose(none, [0, 0, 1, 0], atol=1e-6)


def test_a_win_rate_counts_ties_half_and_masked_prompts_not():
    ours, theirs = jnp.asarray([3., 1., 2., 0.]), jnp.asarray([1., 1., 5., 9.])
    got = rates.win_rate(ours, theirs, jnp.asarray([1., 1., 1., 0.]))
    assert float(got.rate) == pytest.approx(0.5) and float(got.count) == 3
    back = rates.win_rate(theirs, ours, jnp.asarray([1., 1., 0., 0.]))
    assert float(back.rate) == pytest.approx(0.25)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_every_subset(n):
    rng = np.random.default_rng(n)
    proxy = rng.normal(size=(3, 6)).astype(np.float32)
    proxy[1, :3] = proxy[1, 0]  # ties share
    proxy[2] = 1.0
    gold = rng.normal(size=(3, 6)).astype(np.float32)
    want = []
    for p, g in zip(proxy, gold, strict=True):
        best = [g[list(s)][p[list(s)] == p[list(s)].max()].mean()
                for s in itertools.combinations(range(6), n)]
        want.append(np.mean(best))
    got = jax.jit(rates.best_of_n, static_argnums=2)(proxy, gold, n)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    with jax.enable_x64(True):
        wide = rates.best_of_n(*(jnp.asarray(x, jnp.float64) for x in (proxy, gold)), n)
        np.testing.assert_allclose(wide, want, rtol=1e-6)


def test_best_of_n_of_whole_numbers_is_a_share():
    proxy = jnp.array([[0.1, 0.2, 0.3]])
    for gold in (jnp.array([[0, 1, 0]]), jnp.array([[False, True, False]])):
        np.testing.assert_allclose(rates.best_of_n(proxy, gold, 2), [1 / 3], rtol=1e-6)


def test_best_of_n_of_a_perfect_proxy_rises_to_the_maximum_and_1_is_the_mean():
    gold = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1024)).astype(np.float32))
    at = {n: np.asarray(rates.best_of_n(gold, gold, n)) for n in (1, 4, 64, 512, 1024)}
    np.testing.assert_allclose(at[1], gold.mean(1), atol=1e-6)
    np.testing.assert_allclose(at[1024], gold.max(1), rtol=1e-6)
    assert (np.diff([a.mean() for a in at.values()]) > 0).all()
    np.testing.assert_allclose(at[4].mean(), 1.029, atol=0.1)  # the normal's: 1.029


@pytest.mark.parametrize("n", [0, 7])
def test_more_than_the_samples_is_refused(n):
    with pytest.raises(BadInput, match=f"n={n} is not within 1..6"):
        rates.best_of_n(jnp.zeros((1, 6)), jnp.zeros((1, 6)), n)
