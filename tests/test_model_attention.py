"""Attention against its definition: values and gradients, whatever is masked and however cut."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.model import attention
from tinylm.model.product import Arithmetic


def defined(q, k, v, visible):
    """softmax_s(q_t . k_s / sqrt(K)) v_s, the key heads repeated for their query heads."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[1], axis=1) for a in (k, v))
    scores = jnp.einsum("bthk,bhsk->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bhsk->bthk", weights, v)


def drawn(T, H, G, K=8, B=2):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, H, K), (B, G, T, K), (B, G, T, K), (B, T, H, K))
    return [2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(("T", "H", "G"), [(16, 2, 2), (130, 4, 2), (300, 2, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_those_of_the_definition(T, H, G, packed):
    *qkv, slope = drawn(T, H, G)
    visible = np.tril(np.ones((1, T, T), bool))
    if packed:  # two conversations a row: known only when the program runs
        number = jnp.asarray(np.arange(T)[None] >= np.array([[T // 3], [T // 2]]))
        visible = visible & (number[:, :, None] == number[:, None, :])
    ours, exact = (jax.jit(jax.value_and_grad(
        lambda q, k, v, f=f: jnp.sum(slope * f(q, k, v, visible)), argnums=(0, 1, 2)))(*qkv)
        for f in (attention.attend, defined))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, exact)


def test_blocks_may_see_fewer_keys_than_the_one_before_and_keys_may_be_seen_by_none():
    """Four blocks of 64 queries see 250, 100, 180 and 64 of 256 keys, all but a few of them."""
    *qkv, slope = drawn(256, 2, 1, K=6)
    visible = np.random.default_rng(0).random((2, 256, 256)) < 0.9
    for block, end in enumerate((250, 100, 180, 64)):
        visible[:, 64 * block:64 * (block + 1), end:] = False
    ours, exact = (jax.jit(jax.value_and_grad(
        lambda q, k, v, f=f: jnp.sum(slope * f(q, k, v, visible)), argnums=(0, 1, 2)))(*qkv)
        for f in (attention.attend, defined))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, exact)
    assert all(not grad[:, :, 250:].any() and grad[:, :, 249].any() for grad in ours[1][1:])


@pytest.mark.parametrize(("T", "H", "G"), [(16, 2, 2), (130, 4, 2), (300, 2, 1)])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_bfloat16_operands_round_values_and_gradients_and_no_more(T, H, G, rows):
    *qkv, slope = (jnp.tile(a[:1], (rows, *[1] * (a.ndim - 1))) for a in drawn(T, H, G))
    visible, half = np.tril(np.ones((1, T, T), bool)), jnp.dtype("bfloat16")
    rounded = [a.astype(half).astype(jnp.float32) for a in qkv]  # so that only the rest differs

    def both(q, k, v, dtype):
        return jax.jit(jax.value_and_grad(
            lambda *a: jnp.sum(slope * attention.attend(*a, visible, dtype)),
            argnums=(0, 1, 2)))(q, k, v)[1]

    for ours, exact in zip(both(*rounded, half), both(*rounded, attention.FULL), strict=True):
        assert 1e-5 < float(jnp.abs(ours - exact).max() / jnp.abs(exact).max()) < 0.02
        np.testing.assert_allclose(ours, jnp.broadcast_to(ours[:1], ours.shape), atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu" or jax.__version_info__ < (0, 12),
                    reason="the form is a CPU's; jax before 0.12 has some in float32")
def test_no_bfloat16_product_of_a_block_falls_back_to_float32():
    *qkv, _ = (a[:1] for a in drawn(256, 4, 4))
    visible = np.tril(np.ones((1, 256, 256), bool))
    text = jax.jit(jax.grad(lambda *a: attention.attend(
        *a, visible, jnp.dtype("bfloat16")).sum(), argnums=(0, 1, 2))).lower(*qkv).compile(
        ).as_text()
    kinds = []
    for one in text.split("\n}\n"):  # a name is of its computation
        for pair in re.findall(r" dot\(%?(\S+), %?(\S+)\)", one):
            kinds.append([re.search(rf"{re.escape(name)} = (\w+)\[", one)[1] for name in pair])
    assert len(kinds) == 24 and all(pair == ["bf16"] * 2 for pair in kinds)


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, _ = drawn(64, 2, 2)
    visible = np.tril(np.ones((1, 64, 64), bool))
    for scale in (30.0, -30.0):
        mixed = attention.attend(scale * q, 30.0 * k, v, visible)
        np.testing.assert_allclose(mixed, defined(scale * q, 30.0 * k, v, visible), rtol=1e-3,
                                   atol=1e-3)


def test_what_no_query_of_a_block_sees_is_not_computed():
    q, k, v, _ = drawn(256, 2, 2)
    visible = np.tril(np.ones((1, 256, 256), bool))
    programs = [jax.make_jaxpr(lambda *a, seen=seen: attention.attend(*a, seen))(q, k, v)
                for seen in (visible, np.ones_like(visible))]
    scores = [str(p).count("f32[2,2,1,64,256]") for p in programs]
    assert 0 < scores[0] < scores[1]


def test_a_smeared_key_holds_its_share_of_the_one_before_it_where_that_is_its_sequence():
    made = attention.Attention(8, 2, 1, 4, True, (), Arithmetic(), jnp.ones)
    share = np.array([[0.5, 0.0, -1.0, 2.0]], np.float32)
    made.k_smear[...] = jnp.asarray(share)
    k = np.random.default_rng(0).standard_normal((2, 1, 5, 4)).astype(np.float32)
    follows = np.array([[False, True, True, False, True]])
    found = made.smeared(jnp.asarray(k), follows)
    wanted = k.copy()
    for t in (1, 2, 4):
        wanted[:, :, t] += share * k[:, :, t - 1]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    later = made.smeared(jnp.asarray(k[:, :, 2:]), follows[:, 2:], jnp.asarray(k[:, :, 1:2]))
    np.testing.assert_allclose(later, wanted[:, :, 2:], rtol=1e-6)
