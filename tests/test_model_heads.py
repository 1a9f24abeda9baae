"""The scalar head: read at the last real token, whatever surrounds the row."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.model import heads
from tinylm.model.decoder import ModelConfig, init
from tinylm.train import losses, optim

CONFIG = ModelConfig(V=32, D=16, L=2, H=2, T=24)


@pytest.fixture(scope="module")
def params():
    fresh = heads.with_head(CONFIG, init(CONFIG, jax.random.key(0)), jax.random.key(1))
    rng = np.random.default_rng(0)  # as if trained: fresh blocks write nothing
    return jax.tree.map(lambda a: a + rng.normal(0, 0.2, a.shape).astype(np.float32), fresh)


@jax.jit
def last(params, tokens, mask):
    return heads.last_scores(CONFIG, params, tokens, mask)


def rows(width: int, lengths: list[int], fill: int):
    tokens = np.random.default_rng(0).integers(6, 32, (len(lengths), 20)).astype(np.int32)
    tokens[:, 3] = fill  # an id that is also the padding's
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.float32)
    padded = np.where(mask > 0, np.pad(tokens, ((0, 0), (0, 4)))[:, :width], fill)
    return jnp.asarray(padded.astype(np.int32)), jnp.asarray(mask)


def test_a_score_is_the_same_whatever_the_padding_and_the_company(params):
    lengths = [4, 9, 16, 1]
    want = last(params, *rows(24, lengths, 5))
    assert len({round(float(x), 4) for x in want}) == 4
    np.testing.assert_allclose(last(params, *rows(17, lengths, 5)), want, rtol=1e-5, atol=1e-6)
    tokens, mask = rows(24, lengths, 5)
    for row in range(4):  # rows alone, unpadded; row 0 ends in the padding's id
        alone = last(params, tokens[row:row + 1, :lengths[row]], jnp.ones((1, lengths[row])))
        np.testing.assert_allclose(alone[0], want[row], rtol=1e-5, atol=1e-6)
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(last(params, tokens[order], mask[order]), want[order], rtol=1e-5,
                               atol=1e-6)
    assert not np.asarray(last(params, tokens, 0 * mask)).any()
    every = jax.jit(lambda p: heads.scores(CONFIG, p, tokens))(params)
    np.testing.assert_allclose(heads.at_last(every, mask), want, rtol=1e-5, atol=1e-6)


def test_a_zero_head_is_ln_2_a_pair_and_a_fresh_one_has_scores_of_deviation_1(params):
    tokens, mask = rows(24, [9, 12, 16, 20], 5)
    flat = heads.normalised(params, 0.0, jnp.inf)
    total, sums = losses.bradley_terry(last(flat, tokens, mask).reshape(2, 2),
                                       jnp.triu(jnp.ones((2, 2, 2)), 1))
    assert float(total / sums["weight"]) == pytest.approx(math.log(2))
    wide = ModelConfig(V=32, D=1024, L=1, H=2, T=8)
    weight = jax.eval_shape(lambda k: heads.with_head(wide, {}, k), jax.random.key(0))
    assert weight["score_head"]["weight"].shape == (1024,)
    drawn = heads.with_head(wide, {}, jax.random.key(0))["score_head"]
    assert float(drawn["weight"].std()) == pytest.approx(1025**-0.5, rel=0.1)
    assert float(drawn["bias"]) == 0


def test_normalised_scores_have_mean_0_and_deviation_1(params):
    tokens, mask = rows(24, [9, 12, 16, 20], 5)
    raw = last(params, tokens, mask)
    got = last(heads.normalised(params, raw.mean(), raw.std()), tokens, mask)
    np.testing.assert_allclose(got, (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-4)


def test_the_head_and_the_trunk_learn_and_later_tokens_do_not_matter(params):
    tokens, mask = rows(24, [9, 12, 16, 20], 5)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(last(p, tokens, mask) ** 2)))(params)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads))
    changed = jnp.where(mask > 0, tokens, 9)
    np.testing.assert_allclose(last(params, changed, mask), last(params, tokens, mask), rtol=1e-6)


def test_the_heads_rate_falls_with_width_as_a_matrix_of_that_fan_in(params):
    moved = {}
    for D in (16, 64):
        config = ModelConfig(V=32, D=D, L=1, H=2, T=8)
        p = heads.with_head(config, init(config, jax.random.key(0)), jax.random.key(1))
        settings = optim.OptimConfig(warmup=0.0)
        tx = optim.optimiser(settings, config)
        updates, _ = jax.jit(lambda p, tx=tx, s=settings: tx.update(
            jax.tree.map(jnp.ones_like, p), tx.init(p), p, hyper=optim.hyper(s, 10),
            step=jnp.int32(1)))(p)
        moved[D] = float(-updates["score_head"]["weight"].max())
    assert moved[16] / moved[64] == pytest.approx(4.0, rel=1e-5)


def test_a_model_without_a_residual_stream_is_refused():
    with pytest.raises(BadInput, match="position_weights model has no residual stream"):
        heads.with_head(ModelConfig(kind="position_weights"), {}, jax.random.key(0))
