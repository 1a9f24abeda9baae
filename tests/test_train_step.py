"""The step: exact accumulation, one compilation a shape, programs for every kind of device."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import machine
from tinylm.laws.accounting import flops_per_token_full
from tinylm.model import attention
from tinylm.model.decoder import ModelConfig, init
from tinylm.model.generate import Decoding, decode, prefill
from tinylm.train import loop, losses, optim, step
from tinylm.train.batch import Batch

SMALL = ModelConfig(V=64, D=16, L=2, H=2, T=16)


def ragged(rows: int, seed: int = 0) -> Batch:
    """Rows whose weights differ, some of them wholly masked."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SMALL.V, (rows, SMALL.T + 1)).astype(np.int32)
    weights = (rng.random((rows, SMALL.T)) < rng.random((rows, 1))).astype(np.float32)
    weights[0] = 0
    return Batch(tokens, weights)


def begun(config: ModelConfig = SMALL, lr: float = 1e-2):
    settings = optim.OptimConfig(lr=lr)
    tx = optim.optimiser(settings, config)
    return step.start(init(config, jax.random.key(0)), tx, optim.hyper(settings, 10)), tx


@pytest.mark.parametrize(("devices", "micro"), [(1, 8), (2, 2), (4, 1)])
def test_micro_batches_and_devices_weigh_tokens_as_one_batch_does(devices, micro):
    state, tx = begun()
    batch = ragged(8)
    loss = losses.next_token(SMALL, 1e-4)
    (total, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params, batch)
    norm = jnp.sqrt(sum(jnp.sum((g / sums["weight"]) ** 2) for g in jax.tree.leaves(grads)))
    one = step.make_step(loss, tx, machine.mesh(devices), micro)
    _, metrics = jax.jit(one)(state, batch)
    np.testing.assert_allclose(metrics["nats_per_token"], sums["nats_per_token"] / sums["weight"],
                               rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_masked_positions_change_nothing_to_the_bit():
    state, tx = begun()
    batch = ragged(4)
    one = jax.jit(step.make_step(losses.next_token(SMALL), tx, machine.mesh(1), 1))
    hidden = np.array(batch.weights[3]) == 0
    tokens = batch.tokens.copy()
    last = int(np.flatnonzero(~hidden)[-1]) + 2 if (~hidden).any() else 0
    tokens[3, last:] = 5  # targets after the last supervised one
    tokens[0] = 7  # a row without weight
    before, after = one(state, batch)[0], one(state, batch._replace(tokens=tokens))[0]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_without_weight_leaves_finite_state():
    state, tx = begun()
    empty = ragged(4)._replace(weights=np.zeros((4, SMALL.T), np.float32))
    one = jax.jit(step.make_step(losses.next_token(SMALL), tx, machine.mesh(1), 1))
    after, metrics = one(state, empty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))


def test_one_program_serves_every_length_rate_and_decay_of_a_shape():
    _, tx = begun()
    chunk = step.make_chunk(step.make_step(losses.next_token(SMALL), tx, machine.mesh(1), 1))
    stacked = jax.tree.map(lambda a: np.stack([a] * 4), ragged(4))
    for n, lr, steps in ((4, 1e-2, 10), (3, 1e-3, 99), (1, 3e-4, 7)):
        settings = optim.OptimConfig(lr=lr, weight_decay=lr)
        state, _ = begun()
        state = state._replace(hyper=optim.hyper(settings, steps))
        state, _ = chunk(state, stacked, n)
        assert int(state.step) == n
    assert chunk._cache_size() == 1


def test_a_program_traces_the_model_once():
    state, tx = begun()
    traced, loss = [], losses.next_token(SMALL)

    def counted(params, batch):
        traced.append(1)
        return loss(params, batch)

    chunk = step.make_chunk(step.make_step(counted, tx, machine.mesh(1), 2))
    chunk.trace(state, jax.tree.map(lambda a: a[None], ragged(4)), 1)
    assert len(traced) == 1


def test_a_chunk_of_steps_equals_steps_one_by_one_to_the_bit():
    state, tx = begun()
    other, _ = begun()
    chunk = step.make_chunk(step.make_step(losses.next_token(SMALL), tx, machine.mesh(1), 1))
    batches = [ragged(4, seed) for seed in range(4)]
    state, _ = chunk(state, jax.tree.map(lambda *a: np.stack(a), *batches), 4)
    for b in batches:
        other, _ = chunk(other, jax.tree.map(lambda a: np.stack([a] * 4), b), 1)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_schedule_rises_stays_and_falls_to_zero():
    h = optim.hyper(optim.OptimConfig(lr=2.0, warmup=0.1, decay=0.2), 100)
    at = [float(optim.rate(h, jnp.int32(t))) for t in (0, 4, 9, 50, 80, 90, 99, 100)]
    np.testing.assert_allclose(at, [0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.1, 0.0], rtol=1e-5)


@pytest.mark.parametrize(("tied", "inverse", "same"), [
    (True, ("q_proj", "o_proj", "down_proj", "embed_tokens"), ("norm", "k_norm")),
    (False, ("up_proj", "lm_head"), ("embed_tokens", "input_layernorm"))])
def test_what_reads_the_width_learns_in_inverse_proportion_to_it(tied, inverse, same):
    moved = {}
    for width in (16, 64):
        config = ModelConfig(V=64, D=width, L=1, H=1, T=16, tied=tied)
        settings = optim.OptimConfig(lr=1e-2, warmup=0.0)
        tx = optim.optimiser(settings, config)
        params = init(config, jax.random.key(0))
        updates, _ = jax.jit(lambda p, tx=tx, settings=settings: tx.update(
            jax.tree.map(jnp.ones_like, p), tx.init(p), p, hyper=optim.hyper(settings, 10),
            step=jnp.int32(1)))(params)
        moved[width] = {key.key: float(-update.max())
                        for path, update in jax.tree_util.tree_leaves_with_path(updates)
                        for key in path}
    for names, factor in ((inverse, 4.0), (same, 1.0)):
        for name in names:
            np.testing.assert_allclose(moved[16][name] / moved[64][name], factor, rtol=1e-5)


def test_muon_turns_every_layers_matrix_into_one_with_equal_singular_values():
    config = ModelConfig(V=64, D=16, L=2, H=2, T=16)
    settings = optim.OptimConfig(kind="muon", lr=1e-2, warmup=0.0)
    tx, params = optim.optimiser(settings, config), init(config, jax.random.key(0))
    slopes = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    moved = jax.jit(lambda g, p: tx.update(g, tx.init(p), p, hyper=optim.hyper(settings, 10),
                                           step=jnp.int32(1))[0])(slopes, params)
    layers = moved["layers"]
    for update, inputs in ((layers["self_attn"]["q_proj"], 16), (layers["mlp"]["down_proj"], 48),
                           (layers["self_attn"]["o_proj"], 16)):
        for one in np.asarray(update).reshape(2, inputs, -1):
            size = np.linalg.svd(one, compute_uv=False) / (1.6e-2)
            assert size.min() > 0.5 and size.max() < 1.3
    adamw = optim.optimiser(optim.OptimConfig(lr=1e-2, warmup=0.0), config)
    plain = jax.jit(lambda g, p: adamw.update(g, adamw.init(p), p, hyper=optim.hyper(settings, 10),
                                              step=jnp.int32(1))[0])(slopes, params)
    np.testing.assert_allclose(moved["embed_tokens"]["weight"], plain["embed_tokens"]["weight"])


@pytest.mark.parametrize("L", [1, 4])
def test_muon_shared_out_over_devices_takes_the_steps_of_one(L):
    config = ModelConfig(V=64, D=16, L=L, H=2, T=16)
    settings = optim.OptimConfig(kind="muon", lr=1e-2, warmup=0.0)
    params, dials = init(config, jax.random.key(0)), optim.hyper(settings, 10)
    found = {}
    for devices in (1, 2):
        tx = optim.optimiser(settings, config, machine.mesh(devices))

        def moved(params, state, seed, tx=tx):
            key = jax.random.key(seed)
            slopes = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
            return tx.update(slopes, state, params, hyper=dials, step=jnp.int32(1))

        lowered = jax.jit(moved, static_argnums=2).lower(params, tx.init(params), 0).as_text()
        assert ("all_gather" in lowered) == (devices == 2 and L == 4)
        state = step.replicate(machine.mesh(devices), tx.init(params))
        for seed in (0, 1):
            found[devices], state = jax.jit(moved, static_argnums=2)(params, state, seed)
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(near, found[1], found[2])


def test_weight_decay_goes_to_matrices_by_path():
    config = ModelConfig(V=64, D=16, L=1, H=1, T=16)
    settings = optim.OptimConfig(lr=1e-2, weight_decay=0.5)
    tx, params = optim.optimiser(settings, config), init(config, jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda p: tx.update(zeros, tx.init(p), p, step=jnp.int32(1),
                                             hyper=optim.hyper(settings, 10)))(params)
    changed = {jax.tree_util.keystr(path): bool(jnp.any(u != 0))
               for path, u in jax.tree_util.tree_leaves_with_path(updates)}
    for path, moved in changed.items():
        decays = "_proj" in path and not ("o_proj" in path or "down_proj" in path)  # start at zero
        assert moved == decays, path


@pytest.mark.parametrize("shape", [
    {"V": 1024, "D": 64}, {"V": 784, "D": 96, "L": 3, "T": 64, "tied": False},
    {"V": 512, "D": 64, "H": 4, "G": 1, "F": 96, "K": 24, "T": 256},
    {"V": 512, "D": 64, "H": 4, "G": 2, "T": 32, "compute": "bf16"},
    {"V": 300, "D": 16, "L": 4, "kind": "position_weights"}], ids=str)
def test_counted_flops_are_those_of_the_compiled_gradients_products(monkeypatch, shape):
    """Attention is in one piece here: nothing that is masked is skipped.

    The compiler's own total adds elementwise work, a few percent at these sizes.
    """
    monkeypatch.setattr(attention, "BLOCKS", 1)
    config = ModelConfig(**shape)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    one = jax.eval_shape(lambda: Batch(jnp.zeros((1, config.T + 1), jnp.int32),
                                       jnp.zeros((1, config.T))))
    slope = jax.jit(jax.grad(lambda p, b: losses.next_token(config)(p, b)[0]))
    compiled, counted = slope.lower(params, one).compile(), flops_per_token_full(config.shape)
    assert abs(products(compiled.as_text()) / (counted * config.T) - 1) < 0.001
    assert 1 < compiled.cost_analysis()["flops"] / (counted * config.T) < 1.07


def products(program: str) -> float:
    """Add up the FLOPs of a compiled program's dots: twice its results times what is summed."""
    total, shapes = 0.0, {}
    for name, sizes, rest in re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\](.*)", program):
        shapes[name] = [int(size) for size in sizes.split(",") if size]
        if " dot(" in rest:
            left = shapes[re.search(r" dot\([^%]*%([\w.-]+)", rest)[1]]
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1].split(",")
            total += 2.0 * math.prod(shapes[name]) * math.prod(left[int(axis)] for axis in summed)
    return total


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(("compute", "fused"), [("f32", False), ("bf16", False), ("bf16", True)])
def test_train_and_decode_steps_lower_for_every_platform_from_here(platform, compute, fused):
    config = ModelConfig(V=64, D=32, L=2, H=2, T=16, compute=compute)
    state, tx = begun(config)
    plan = machine.Plan(unroll=False, fused=fused, remat=fused)
    one = step.make_step(losses.next_token(config, 1e-4, plan), tx, machine.mesh(2), 2)
    unsafe = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    exported = jax.export.export(jax.jit(one), platforms=[platform], disabled_checks=(
        unsafe if platform == "cpu" else ()))(state, ragged(8))
    assert exported.platforms == (platform,)
    begun_row = prefill(config, state.params, [np.array([1, 7, 8], np.int32)])
    run = jax.jit(lambda p, s, k, t: decode(config, p, Decoding(*s), 4, k, t))
    args = (state.params, tuple(begun_row), jax.random.key(0), jnp.float32(1.0))
    assert jax.export.export(run, platforms=[platform])(*args).platforms == (platform,)


def test_a_step_that_is_not_finite_is_passed_by_where_that_is_asked_for():
    state, tx = begun()
    loss = losses.next_token(SMALL)

    def broken(params, batch):
        value, sums = loss(params, batch)
        return jnp.where(batch.tokens[0, 0] == 3, jnp.nan, 1.0) * value, sums

    def at(first: int, seed: int) -> Batch:
        batch = ragged(4, seed)
        tokens = np.array(batch.tokens)
        tokens[:, 0] = first
        return batch._replace(tokens=tokens)

    chunk = step.make_chunk(step.make_step(broken, tx, machine.mesh(1), 4, skip=True))
    seen = [at(1, 0), at(3, 1), at(1, 2)]
    after, metrics = chunk(state, jax.tree.map(lambda *a: np.stack(a), *seen), 3)
    assert list(metrics["skipped"]) == [0, 1, 0] and int(after.step) == 3
    row = loop._row({k: np.asarray(v) for k, v in metrics.items()}, 0, 3, 8)
    assert row["train/skipped"] == pytest.approx(1 / 3) and row["train/nats_per_token"] > 0
    row = loop._row({k: np.asarray(v)[1:] for k, v in metrics.items()}, 0, 1, 8)
    assert row["train/skipped"] == 1 and row["train/nats_per_token"] is None
    plain = jax.jit(step.make_step(loss, tx, machine.mesh(1), 4))
    other, _ = begun()
    other, _ = plain(other, seen[0])
    other, _ = plain(other._replace(step=other.step + 1), seen[2])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)  # Adam's first steps blow rounding up
