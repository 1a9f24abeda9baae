"""What an accelerator computes another way: the same function, with no scatter and no equal call.

Its branches are taken here by hand; that they are taken there, and how fast, is for
experiments/device_checks.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import machine
from tinylm.model import embedding, heads
from tinylm.model.decoder import ModelConfig, init, rebuild
from tinylm.train import losses
from tinylm.train.batch import Batch


@pytest.fixture
def elsewhere(monkeypatch):
    """Take the branches of an accelerator, but for a layout that a CPU (JAX 0.12) must have."""
    def enter():
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, cpu, default: (
            cpu if getattr(cpu, "__name__", "") == "in_memory" else default)(*given))
    return enter


def graded(config: ModelConfig):
    """Give the loss of a batch and its gradients."""
    numbers = np.random.default_rng(0).integers(0, config.V, (3, config.T + 1))
    batch = Batch(jnp.asarray(numbers, jnp.int32), jnp.ones((3, config.T)))
    params = jax.tree.map(lambda a: a + 0.05 * jnp.sin(jnp.arange(a.size).reshape(a.shape) ** 2.0),
                          init(config, jax.random.key(0)))
    loss = losses.next_token(config, 1e-4)
    value, grads = jax.jit(lambda p: jax.value_and_grad(lambda p: loss(p, batch)[0])(p))(params)
    return jax.tree.leaves((value, grads))


@pytest.mark.parametrize(("compute", "tolerance"), [("f32", 1e-5), ("bf16", 0.04)])
def test_losses_and_gradients_are_those_of_a_cpu(elsewhere, compute, tolerance):
    config = ModelConfig(V=40, D=16, L=2, H=2, T=32, compute=compute)
    here = graded(config)
    elsewhere()
    there, differ = graded(config), 0
    for a, b in zip(here, there, strict=True):
        assert jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(a)
        differ += not np.array_equal(a, b)
    assert differ  # another way, not the same one


def test_sums_of_a_token_s_rows_are_exact_and_0_where_it_never_stands():
    draw = np.random.default_rng(1)
    for V, count in ((7, 50), (50, 7), (5, 1)):
        numbers = jnp.asarray(draw.integers(0, V, count))
        rows = jnp.asarray(draw.integers(-99, 99, (count, 3)), jnp.float32)
        got = jax.jit(embedding.by_order, static_argnums=0)(V, numbers, rows)
        assert (got == embedding.by_number(V, numbers, rows)).all()
    large = jnp.asarray([[1e8], [1.0], [1e8]])  # a running sum over all numbers would lose the 1
    assert (embedding.by_order(3, jnp.asarray([0, 1, 2]), large) == large).all()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_program_of_an_accelerator_scatters_nothing(platform):
    config = ModelConfig(V=64, D=32, L=2, H=2, T=16, compute="bf16")
    loss = losses.next_token(config, 1e-4)
    batch = Batch(jnp.zeros((2, 17), jnp.int32), jnp.ones((2, 16)))
    grad = jax.jit(jax.grad(lambda p: loss(p, batch)[0]))
    text = str(jax.export.export(grad, platforms=[platform])(
        init(config, jax.random.key(0))).mlir_module())
    assert "stablehlo.dot_general" in text and "stablehlo.scatter" not in text


def test_no_two_layers_make_an_equal_call_of_the_librarys_attention(monkeypatch):
    config = ModelConfig(V=64, D=32, L=3, H=2, T=16)
    scales, whole = [], jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *given, scale, **more: (
        scales.append(scale), whole(*given, scale=scale, **more))[1])
    params = init(config, jax.random.key(0))
    tokens = jnp.zeros((1, 16), jnp.int32)
    scored = heads.with_head(config, params, jax.random.key(1))  # PPO's loss reads two models

    def both(plan, p, v):
        return rebuild(config, p, plan)(tokens), heads.scores(config, v, tokens, plan=plan)

    for changed in ({}, {"remat": True}, {"unroll": False}):
        scales.clear()
        jax.eval_shape(functools.partial(both, machine.Plan(fused=True, **changed)), params, scored)
        assert len(scales) == len(set(scales)) == 2 * (1 if "unroll" in changed else config.L)
        assert {np.float32(s) for s in scales} == {np.float32(16**-0.5)}
