"""The decoder: what may see what, and that every way of running it is the same function."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import machine
from tinylm.config import BadInput
from tinylm.laws.accounting import flops_per_token, parameters
from tinylm.model import attention
from tinylm.model.attention import empty
from tinylm.model.decoder import ModelConfig, init, rebuild

SMALL = ModelConfig(V=50, D=16, L=2, H=2, T=24)


def drawn(config: ModelConfig, seed: int = 0):
    """Parameters with every leaf away from its initial zeros and ones."""
    rng = np.random.default_rng(seed)
    noise = lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, init(config, jax.random.key(seed)))


def test_initial_parameters_have_their_deviations_and_share_no_numbers():
    config = ModelConfig(V=300, D=64, L=2, H=4, G=2, T=24, tied=False)
    wanted = {"weight": 0.02, "q_proj": 1 / 8, "k_proj": 1 / 8, "v_proj": 1 / 8, "gate_proj": 1 / 8,
              "up_proj": 1 / 8}
    drawn = []
    for path, a in jax.tree_util.tree_leaves_with_path(init(config, jax.random.key(0))):
        name = path[-1].key
        if name in ("o_proj", "down_proj", "k_smear"):
            assert not a.any()
        elif "norm" in jax.tree_util.keystr(path):
            assert (a == 1).all()
        else:
            drawn.append(np.ravel(a) / wanted[name])
            off = 4 / np.sqrt(a.size)
            assert abs(drawn[-1].mean()) < off and abs(drawn[-1].std() - 1) < off
    assert len(drawn) == 7
    every = np.concatenate(drawn)
    assert len(np.unique(every)) > 0.98 * len(every)
    other = init(config, jax.random.key(1))["embed_tokens"]["weight"]
    assert np.mean(other == drawn[0].reshape(300, 64) * 0.02) < 0.01


@pytest.mark.parametrize("smear", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_are_as_many_as_accounting_counts(smear, tied):
    config = ModelConfig(V=50, D=16, L=3, H=4, G=2, T=24, tied=tied, smear=smear)
    made = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(made)) == parameters(config.shape).total


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(config, params, x, plan=machine.PLAIN, segments=None):
    """The model, compiled."""
    return rebuild(config, params, plan)(x, segments=segments)


@functools.partial(jax.jit, static_argnums=0)
def extend(config, params, *rest):
    """One cached step, compiled."""
    model = rebuild(config, params)
    x, cache = model.extend(model.blocks(), *rest)
    return model.head(x), cache


def tokens(config: ModelConfig, B: int = 2, seed: int = 3):
    return jax.random.randint(jax.random.key(seed), (B, config.T), 6, config.V)


@pytest.mark.parametrize("kind", ["transformer", "position_weights"])
def test_future_tokens_do_not_change_past_logits_by_gradient(kind):
    config = ModelConfig(kind=kind, V=50, D=16, T=24, L=24 if kind != "transformer" else 2)
    params, t = drawn(config), 11
    name = "weight" if kind == "transformer" else None

    def logits_at_t(table):
        """Give each position its own row of the table, so that a gradient names positions."""
        own = {**params, "embed_tokens": {name: table} if name else table[None].repeat(24, 0)}
        wide = replace(config, V=config.T)
        return rebuild(wide, own)(jnp.arange(config.T)[None])[0, t, :t].sum()

    if kind == "position_weights":
        params = {**params, "lm_head": params["lm_head"][:, : config.T]}
    table = jax.random.normal(jax.random.key(9), (config.T, 16))
    moved = np.abs(np.asarray(jax.jit(jax.grad(logits_at_t))(table))).sum(axis=1)
    assert (moved[: t + 1] > 0).all(), "position t must see itself and its past"
    assert (moved[t + 1 :] == 0).all(), "position t sees the future"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_scanned_layers_equal_unrolled_ones(groups, tied):
    config = ModelConfig(V=50, D=16, L=3, H=2, G=groups, T=24, tied=tied)
    params, x = drawn(config), tokens(config)
    one, other = forward(config, params, x), forward(config, params, x, machine.Plan(unroll=False))
    np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize(("groups", "start", "widths"), [
    (1, 0, (9, 1, 1, 5, 8)), (2, 0, (9, 1, 1, 5, 8)), (1, 13, (1,) * 24), (2, 100, (1,) * 24)])
def test_cached_decode_equals_the_full_forward_pass_wherever_the_ring_begins(
        groups, start, widths):
    config = ModelConfig(V=50, D=16, L=2, H=2, G=groups, T=24)
    params, x = drawn(config), tokens(config)
    cache = (empty(2, groups, config.T, config.head_width),) * 2
    begin = jnp.full(2, start)
    parts, read = [], 0
    for width in widths:
        logits, cache = extend(config, params, x[:, read : read + width], cache, start + read,
                               begin)
        parts.append(logits)
        read += width
    np.testing.assert_allclose(jnp.concatenate(parts, 1), forward(config, params, x), atol=5e-6)


def test_packed_segments_equal_each_sequence_alone():
    params, x = drawn(SMALL), tokens(SMALL, 1)
    segments = jnp.array([[1] * 10 + [2] * 14])
    packed = forward(SMALL, params, x, machine.PLAIN, segments)
    for part in (slice(0, 10), slice(10, 24)):
        np.testing.assert_allclose(packed[:, part], forward(SMALL, params, x[:, part]), atol=5e-6)


def test_bf16_compute_stays_near_f32_and_keeps_f32_parameters():
    params, x = drawn(SMALL), tokens(SMALL)
    full = forward(SMALL, params, x)
    half = forward(ModelConfig(V=50, D=16, L=2, H=2, T=24, compute="bf16"), params, x)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(full - half).max()) < 0.1 * float(jnp.abs(full).max())


@pytest.mark.parametrize(("changes", "words"), [
    ({"D": 100, "H": 8}, "D=100 is not a multiple of H=8; choose D=96 or D=104"),
    ({"D": 6, "H": 2}, "head width K=3 is odd"),
    ({"H": 4, "G": 3}, "not a multiple of G=3"),
    ({"V": 70000}, "65536"),
    ({"L": 3_000_000}, "L=3000000 is not within 1 to 1000"),
    ({"T": 0}, "T=0 is not within 1 to"),
])
def test_impossible_shapes_are_refused_in_a_line_with_a_remedy(changes, words):
    with pytest.raises(BadInput, match=words.replace("(", r"\(")):
        ModelConfig(**changes)


@pytest.mark.parametrize("D", [4, 12])
def test_position_weights_sum_one_row_a_distance_dense_or_factored(D):
    config = ModelConfig(kind="position_weights", V=12, D=D, L=3, T=8)
    params = drawn(config)
    x = np.array([[7, 8, 9, 10, 11]], np.int32)
    tables = np.asarray(params["embed_tokens"])
    rows = tables[0][10] + tables[1][9] + tables[2][8]
    want = rows if D == 12 else rows @ np.asarray(params["lm_head"])
    assert ("lm_head" in params) == (D < 12)
    np.testing.assert_allclose(forward(config, params, x)[0, 3], want, atol=1e-5)
    assert flops_per_token(config.shape) == 6 * config.V * (config.L if D >= config.V else D)


@pytest.mark.parametrize("packed", [False, True])
def test_the_librarys_attention_and_recomputed_layers_are_the_same_function(
        monkeypatch, packed):
    config = ModelConfig(V=50, D=16, L=2, H=2, G=1, T=24)
    params, x = drawn(config), tokens(config)
    segments = jnp.array([[1] * 10 + [2] * 14] * 2) if packed else None

    calls, whole = [], attention.by_library
    monkeypatch.setattr(attention, "by_library", lambda *given: calls.append(1) or whole(*given))

    def slopes(**changed):
        plan = machine.Plan(**changed)
        return jax.jit(jax.grad(lambda p: jnp.mean(jnp.sin(
            rebuild(config, p, plan)(x, segments=segments)))))(params)

    plain = slopes()
    for changed in ({"fused": True}, {"remat": True, "unroll": False}):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(slopes(**changed)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert len(calls) == config.L  # each layer's, and of the fused plan alone


def test_mixed_states_and_their_ending_are_the_model():
    config = ModelConfig(V=30, D=8, L=2, H=2, T=9)
    params = drawn(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 9)))

    def ended(params, unroll):
        model = rebuild(config, params, machine.Plan(unroll=unroll, remat=True))
        x = model.states(tokens, mixed=True)
        return model.ending()(x.reshape(1, 18, 8)).reshape(2, 9, 30)  # positions do not meet there

    want = jax.jit(lambda p: rebuild(config, p)(tokens))(params)
    for unroll in (True, False):
        got = jax.jit(ended, static_argnums=1)(params, unroll)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_recomputed_layers_keep_less_for_the_way_back():
    config = ModelConfig(V=50, D=32, L=4, H=2, T=256)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    x = jax.ShapeDtypeStruct((4, config.T), jnp.int32)

    def temporary(plan):
        loss = lambda p, x: jnp.sum(rebuild(config, p, plan)(x) ** 2)  # noqa: E731
        program = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    plain, less = (temporary(machine.Plan(remat=r, unroll=False)) for r in (False, True))
    assert less < 0.7 * plain


@pytest.mark.parametrize("wrong", [{"K": -2}, {"F": -8}, {"G": -1}, {"rope_theta": float("nan")},
                                   {"rope_theta": 0.0}])
def test_impossible_shapes_are_refused_by_name(wrong):
    with pytest.raises(BadInput, match=f"{next(iter(wrong))}=.* is not within"):
        ModelConfig(**wrong)
