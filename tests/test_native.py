"""Our C and oneDNN: called by XLA where a plan says so, the same values, and XLA without them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import files, machine
from tinylm.config import BadInput
from tinylm.model import attention, block
from tinylm.model.decoder import ModelConfig, init, rebuild
from tinylm.model.embedding import RMSNorm, rotate, rotation
from tinylm.model.entropy import cross_entropy
from tinylm.model.product import Arithmetic, can_call, named, product
from tinylm.native import library
from tinylm.train import losses, optim, population, run, step
from tinylm.train.batch import Batch

CONFIG = ModelConfig(V=64, D=16, L=2, H=2, T=16)
XLAS = machine.Plan(devices=2, micro=2)
OURS = dataclasses.replace(XLAS, onednn=True, native=True)
cpu = jax.default_backend() == "cpu"
here = pytest.mark.skipif(not cpu or not library.compiler(machine.cache()),
                          reason="needs a CPU and a C compiler")
with_onednn = pytest.mark.skipif(not cpu or not library.onednn(machine.cache()),
                                 reason="needs a CPU, oneDNN and a C compiler")


def program(plan: machine.Plan, members: int = 0):
    """One step on two devices, compiled, and what it is called with."""
    settings = optim.OptimConfig(lr=1e-2)
    tx = optim.optimiser(settings, CONFIG)
    one = step.make_step(losses.next_token(CONFIG, plan=plan), tx, machine.mesh(2), plan.micro)
    state = step.start(init(CONFIG, jax.random.key(0)), tx, optim.hyper(settings, 10))
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
    batch = Batch(jnp.asarray(tokens), jnp.ones((8, 16)))
    if members:
        one = population.make_step(one, plan.vmap)
        state = population.stack([state] * members, members)
        batch = jax.tree.map(lambda a: jnp.stack([a] * members), batch)
    return jax.jit(one).lower(state, batch).compile(), (state, batch)


@with_onednn
@pytest.mark.parametrize("members", [0, 2])
def test_a_step_is_the_one_by_xla_on_two_devices_and_of_a_population(members):
    (mine, given), (theirs, _) = program(XLAS, members), program(OURS, members)
    calls = re.findall(r'custom_call_target="tinylm_(\w+)"', theirs.as_text())
    wanted = dict.fromkeys(library.PRODUCTS, 7 * CONFIG.L) | {
        "entropy": 1} | {name: CONFIG.L * times + (times == 2) for name, times in {
            "mix": 1, "mix_back": 1, "gate": 1, "gate_back": 1, "norm": 2, "norm_back": 2}.items()}
    assert {name: calls.count(name) for name in set(calls)} == wanted
    assert "tinylm_" not in mine.as_text()
    (after, told), (wanted, expected) = theirs(*given), mine(*given)
    np.testing.assert_allclose(told["grad_norm"], expected["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(told["nats_per_token"], expected["nats_per_token"], rtol=1e-6)
    for got, true in zip(jax.tree.leaves(after.params), jax.tree.leaves(wanted.params),
                         strict=True):
        np.testing.assert_allclose(got, true, atol=2e-4)  # Adam's first steps divide by |g|


@here
def test_the_same_step_has_the_same_bits_each_time():
    made, given = program(OURS)
    first, second = (jax.tree.leaves(made(*given)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@here
@pytest.mark.parametrize(("B", "T", "H", "G", "K"), [
    (2, 64, 2, 2, 32), (1, 1, 1, 1, 2), (3, 77, 4, 2, 12), (1, 130, 3, 1, 6), (2, 33, 2, 2, 40)])
@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_and_its_gradient_are_those_by_xla(B, T, H, G, K, gain, packed, dtype):
    draw = np.random.default_rng(T)
    q, k, v, dy, q_gain, k_gain, smear = (
        jnp.asarray(draw.normal(size=shape), jnp.float32) * size for shape, size in (
            ((B, T, H, K), 1), ((B, T, G, K), 5), ((B, T, G, K), 1), ((B, T, H, K), 1),
            ((K,), gain), ((K,), gain), ((G, K), 1)))
    begin = np.zeros((1, T), int)
    if packed:
        fresh = draw.random((B, T)) < .05
        begin = jnp.asarray(np.maximum.accumulate(np.where(fresh, np.arange(T), 0), axis=1))
    turn = rotation(np.arange(T)[None] - begin, T, K, 100.0)
    by = Arithmetic(jnp.dtype(dtype))
    assert can_call(named(by, "mix", "mix_back"))

    def ours(*given):
        return attention.by_native(*given, turn, begin, by)

    def by_xla(q, k, v, q_gain, k_gain, smear):
        made = attention.Attention(H * K, H, G, K, True, (), Arithmetic(), jnp.ones)
        made.q_norm.weight[...], made.k_norm.weight[...], made.k_smear[...] = q_gain, k_gain, smear
        sight = attention.sight_from(begin)
        keys = made.smeared(rotate(made.k_norm(k), turn).transpose(0, 2, 1, 3), sight.follows)
        return attention.attend(rotate(made.q_norm(q), turn), keys, v.transpose(0, 2, 1, 3),
                                sight.visible)

    with jax.default_matmul_precision("highest"):
        got, true = (jax.jit(lambda dy, *given, f=f: (lambda y, back: (y, back(dy)))(
            *jax.vjp(f, *given)))(dy, q, k, v, q_gain, k_gain, smear) for f in (ours, by_xla))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        most = max(1, np.abs(other).max()) * gain**2  # of which order the scores are, rounded
        if dtype == "float32":
            np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * most)
        else:
            assert np.sqrt(np.mean((one - other)**2)) < .02 * gain**2 * max(
                .2, np.sqrt(np.mean(other**2)))
    assert T == 1 or (np.abs(got[0] - true[0]).max() > 1e-4) == (dtype == "bfloat16")


@here
@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 3, 7), (3, 1, 1), (2, 2, 130)])
def test_norm_and_gate_and_their_gradients_are_those_by_xla(shape):
    draw = np.random.default_rng(0)
    x, up, dy = (jnp.asarray(draw.normal(size=shape) * 4, jnp.float32) for _ in range(3))
    gain = jnp.asarray(draw.normal(size=shape[-1]), jnp.float32)

    def normed(by, x, gain):
        made = RMSNorm(gain.shape, by)
        made.weight[...] = gain
        return made(x)

    def gated(by, gate, up):
        return block.gated(gate, up, by)

    for f, given in ((normed, (x, gain)), (gated, (x, up)), (gated, (x * 30, up))):
        got, true = (jax.jit(lambda dy, *given, f=f, by=by: (lambda y, back: (y, back(dy)))(
            *jax.vjp(functools.partial(f, by), *given))).lower(dy, *given).compile()
            for by in (Arithmetic(native=True), Arithmetic()))
        assert got.as_text().count("tinylm_") == 2 and "tinylm_" not in true.as_text()
        for one, other in zip(jax.tree.leaves(got(dy, *given)), jax.tree.leaves(true(dy, *given)),
                              strict=True):
            most = max(1, np.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6 * most)


def losses_of(config, packed, **dials):
    """The loss and its gradients by our plan, with other dials, and by XLA's; what ours calls."""
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, 64, (4, 17)), jnp.int32)
    numbers = jnp.asarray(np.sort(draw.integers(0, 3, (4, 17)), axis=1))
    batch = Batch(tokens, jnp.ones((4, 16)), numbers if packed else None)
    params = init(config, jax.random.key(0), 5.0)
    mine, theirs = (jax.jit(jax.value_and_grad(
        losses.next_token(config, plan=plan), has_aux=True)).lower(params, batch).compile()
        for plan in (dataclasses.replace(OURS, **dials), XLAS))
    assert "tinylm_" not in theirs.as_text()
    calls = set(re.findall(r'custom_call_target="tinylm_(\w+)"', mine.as_text()))
    return *(jax.tree.leaves(f(params, batch)) for f in (mine, theirs)), calls


@here
@pytest.mark.parametrize(("packed", "dials", "shape"), [
    (True, {}, {}), (False, {"remat": True, "unroll": False}, {}), (True, {"remat": True}, {}),
    (False, {}, {"smear": False, "G": 1})])
def test_a_loss_calls_it_and_is_the_one_by_xla(packed, dials, shape):
    mine, theirs, calls = losses_of(dataclasses.replace(CONFIG, **shape), packed, **dials)
    assert {"mix", "mix_back", "norm_back", "gate_back"} <= calls
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6 * np.abs(other).max())


@here
def test_attention_that_is_given_a_cache_fills_it():
    params, x = init(CONFIG, jax.random.key(0), 5.0), jnp.ones((1, 4, 16)).at[0, 1].set(-2.0)
    index = np.arange(4)[None]
    cache = attention.KeyValue(*(jnp.zeros((1, 2, 4, 8)),) * 2, jnp.zeros((1, 2, 1, 8)))

    def f(x, cache, plan):
        layer = rebuild(CONFIG, params, plan).blocks()[0].self_attn
        return layer(x, rotation(index, 16, 8, 100.0), attention.sight_from(index * 0), cache)[1]

    mine, theirs = f(x, cache, OURS), f(x, cache, XLAS)
    assert f(x, None, OURS) is None and np.abs(theirs.k).min() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mine, theirs)


@here
@pytest.mark.parametrize("packed", [False, True])
def test_a_bfloat16_model_rounds_in_what_it_calls(packed):
    mine, theirs, calls = losses_of(dataclasses.replace(CONFIG, compute="bf16"), packed)
    wanted = {"norm", "norm_back", "gate", "gate_back", "bf16_mix", "bf16_mix_back"}
    assert calls == wanted | (set() if packed else {"bf16_entropy"})
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-3)
    for one, other in zip(mine[1:], theirs[1:], strict=True):
        assert np.linalg.norm(one - other) <= .02 * np.linalg.norm(other)


@here
@pytest.mark.parametrize(("B", "T", "D", "V"), [(2, 64, 16, 256), (1, 5, 12, 77), (3, 33, 70, 300),
                                                (1, 1, 2, 1), (1, 40, 7, 257)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_and_its_gradient_are_those_of_logits(B, T, D, V, z_loss, dtype):
    draw = np.random.default_rng(D)
    x, table = (jnp.asarray(draw.normal(size=shape), dtype).astype(jnp.float32)
                for shape in ((B, T, D), (V, D)))  # bfloat16's are given as it rounds them
    by = Arithmetic(jnp.dtype(dtype))
    targets = jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(draw.random((B, T)) * draw.integers(0, 2, (B, T)), jnp.float32)
    assert can_call(named(by, "entropy"))

    def by_logits(x, table):
        each, logz = losses.nll(jnp.einsum("btd,vd->btv", x, table), targets)
        return jnp.sum(weights * (each + z_loss * logz**2)), jnp.sum(weights * each)

    def ours(x, table):
        return cross_entropy(by, x, table, targets, weights, z_loss)

    got, true = (jax.jit(jax.value_and_grad(lambda x, table, f=f: (3 * f(x, table)[0], f(
        x, table)[1]), argnums=(0, 1), has_aux=True))(x, table) for f in (ours, by_logits))
    np.testing.assert_allclose(got[0], true[0], rtol=2e-6, atol=1e-6)
    for one, other in zip(got[1], true[1], strict=True):
        if dtype == "float32":
            np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * max(1, np.abs(other).max()))
        else:
            assert np.linalg.norm(one - other) <= .005 * np.linalg.norm(other) + 1e-6


@here
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_no_number_stays_none(broken, dtype):
    x = jnp.ones((1, 40, 1, 16)).at[0, 3, 0, 5].set(broken)
    assert all(library.register(machine.cache(), name) for name in library.OURS)
    gain, by = jnp.ones(16), Arithmetic(jnp.dtype(dtype), native=True)
    index = np.arange(40)[None]
    mixed = attention.by_native(x, jnp.ones_like(x), jnp.ones_like(x), gain, gain, gain[None],
                                rotation(index, 40, 16, 100.0), np.zeros_like(index), by)
    assert np.isnan(mixed[0, 3]).all() and np.isfinite(mixed[0, 4]).all()
    for f, dx in ((lambda x: RMSNorm((16,), by)(x), 3), (lambda x: block.gated(x, x, by), 3)):
        y, back = jax.vjp(f, x[:, :, 0])
        for each in (y, *back(jnp.ones_like(y))):
            assert not np.isfinite(each[0, dx, 5]) and np.isfinite(each[0, dx + 1]).all()
    targets = jnp.zeros((1, 40), jnp.int32)
    for states, asked in ((x[:, :, 0], targets), (jnp.ones((1, 40, 16)), targets.at[0, 7].set(9))):
        total = cross_entropy(by, states, jnp.ones((9, 16)), asked, jnp.ones((1, 40)))
        assert np.isnan(total).all()


@pytest.mark.parametrize("lacking", [pytest.param("package", marks=here), "compiler", "room"])
def test_without_it_a_plan_leaves_products_to_xla(lacking, tmp_path, monkeypatch):
    kept = tmp_path / "cache"
    match lacking:
        case "package":
            monkeypatch.setattr(library, "PACKAGE", "no-such-package")
        case "compiler":
            monkeypatch.setenv("CC", "no-such-compiler")
        case "room":
            kept.write_text("a file where a folder is to be")
    monkeypatch.setattr(machine, "cache", lambda: kept)
    assert library.onednn(kept) == "" == machine.environment()["onednn"]
    assert (library.compiler(kept) == "") == (lacking != "package")
    plan = machine.plan_for(8, 16, 16, "f32", "cpu", 2)
    assert (plan.onednn, plan.native) == (False, bool(library.compiler(kept)))
    x, w, by = jnp.ones((1, 4, 16)), jnp.ones((16, 8)), Arithmetic(onednn=True)
    text = str(jax.make_jaxpr(lambda x, w: product("btd,df->btf", x, w, by))(x, w))
    assert "tinylm_" not in text and "dot_general" in text
    if not plan.native:
        given = init(CONFIG, jax.random.key(0)), Batch(jnp.zeros((2, 17), jnp.int32),
                                                       jnp.ones((2, 16)))
        assert "tinylm_" not in str(jax.make_jaxpr(losses.next_token(CONFIG, plan=OURS))(*given))


@here
def test_a_plan_takes_it_on_a_cpu_only_and_it_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cache", lambda: tmp_path)
    assert machine.plan_for(8, 16, 16, "f32", "cpu", 2).native
    built, = (tmp_path / "native").iterdir()
    before = built.stat().st_mtime_ns
    library._built(tmp_path)
    assert [(p, p.stat().st_mtime_ns) for p in (tmp_path / "native").iterdir()] == [
        (built, before)]
    whole = built.read_bytes()
    built.unlink()  # it is loaded: its bytes stay
    built.write_bytes(whole[:3000])  # as a machine that lost its power may leave it
    assert library._built(tmp_path).read_bytes()[:4] == b"\x7fELF"
    assert len(library._built(tmp_path).read_bytes()) == len(whole)
    gpu = machine.plan_for(8, 16, 16, "f32", "gpu", 2)
    assert not gpu.onednn and not gpu.native


@here
def test_another_processor_compiles_anew(tmp_path, monkeypatch):
    library._built(tmp_path)
    monkeypatch.setattr(library, "instructions", lambda: "another")
    library._built(tmp_path)
    assert len(list((tmp_path / "native").iterdir())) == 2


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("part", ["onednn", "native"])
def test_a_run_that_uses_it_is_bound_to_its_version(part, asked, tmp_path, monkeypatch):
    plan = dataclasses.replace(machine.PLAIN, **{part: asked})

    def settle():
        return run.settle(tmp_path / "run", optim.OptimConfig(), "pretrain", plan, tmp_path)

    settle()
    true = machine.environment()
    monkeypatch.setattr(machine, "environment", lambda: {**true, part: "9.9"})
    if not asked:
        assert settle() == plan
        return
    with pytest.raises(BadInput, match=rf"{part}=.* this is {part}='9.9'.*tinylm adopt"):
        settle()
    run.adopt(tmp_path / "run")
    assert settle() == plan
    kept = tmp_path / "run/environment.json"
    files.write_json(kept, files.read_json(kept) | {"threads": "one"})
    assert not run.adopt(tmp_path / "run")  # a sweep's worker goes on with one, an adopter has more
    monkeypatch.setattr(machine, "environment", lambda: {**true, part: "9.8"})
    assert run.adopt(tmp_path / "run") and files.read_json(kept)["threads"] == "one"
    monkeypatch.setattr(machine, "environment", lambda: {**true, "backend": "tpu"})
    with pytest.raises(BadInput, match="backend=.*, this is backend='tpu'; go on as it was begun, "
                       "or choose"):
        run.adopt(tmp_path / "run")
