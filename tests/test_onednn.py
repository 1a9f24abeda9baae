"""oneDNN: called by XLA where a plan says so, the same steps, and XLA's products without it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import machine, onednn
from tinylm.config import BadInput
from tinylm.model.decoder import ModelConfig, init
from tinylm.model.product import Arithmetic, product
from tinylm.train import losses, optim, population, run, step
from tinylm.train.batch import Batch

CONFIG = ModelConfig(V=64, D=16, L=2, H=2, T=16)
OURS, THEIRS = machine.Plan(devices=2, micro=2), machine.Plan(devices=2, micro=2, onednn=True)
here = pytest.mark.skipif(not onednn.version(machine.cache()) or jax.default_backend() != "cpu",
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


@here
@pytest.mark.parametrize("members", [0, 2])
def test_a_step_is_the_one_by_xla_on_two_devices_and_of_a_population(members):
    (mine, given), (theirs, _) = program(OURS, members), program(THEIRS, members)
    calls = re.findall(r'custom_call_target="tinylm_(\w+)"', theirs.as_text())
    each = 7 * CONFIG.L + 1
    assert {way: calls.count(way) for way in onednn.WAYS} == dict.fromkeys(onednn.WAYS, each)
    assert "tinylm_" not in mine.as_text()
    (after, told), (wanted, expected) = theirs(*given), mine(*given)
    np.testing.assert_allclose(told["grad_norm"], expected["grad_norm"], rtol=1e-5)
    for got, true in zip(jax.tree.leaves(after.params), jax.tree.leaves(wanted.params),
                         strict=True):
        np.testing.assert_allclose(got, true, atol=2e-4)  # Adam's first steps divide by |g|


@here
def test_the_same_step_has_the_same_bits_each_time():
    made, given = program(THEIRS)
    first, second = (jax.tree.leaves(made(*given)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("lacking", ["package", "compiler", "room"])
def test_without_it_a_plan_leaves_products_to_xla(lacking, tmp_path, monkeypatch):
    kept = tmp_path / "cache"
    match lacking:
        case "package":
            monkeypatch.setattr(onednn, "PACKAGE", "no-such-package")
        case "compiler":
            monkeypatch.setenv("CC", "no-such-compiler")
        case "room":
            kept.write_text("a file where a folder is to be")
    monkeypatch.setattr(machine, "cache", lambda: kept)
    assert onednn.version(kept) == "" == machine.environment()["onednn"]
    assert not machine.plan_for(8, 16, 16, "cpu", 2).onednn
    x, w = jnp.ones((1, 4, 16)), jnp.ones((16, 8))
    text = str(jax.make_jaxpr(lambda x, w: product("btd,df->btf", x, w, Arithmetic(onednn=True)))(
        x, w))
    assert "tinylm_" not in text and "dot_general" in text


@here
def test_a_plan_takes_it_on_a_cpu_only_and_a_caller_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cache", lambda: tmp_path)
    assert machine.plan_for(8, 16, 16, "cpu", 2).onednn
    built, = (tmp_path / "onednn").iterdir()
    before = built.stat().st_mtime_ns
    onednn._built(tmp_path)
    assert [(p, p.stat().st_mtime_ns) for p in (tmp_path / "onednn").iterdir()] == [
        (built, before)]
    whole = built.read_bytes()
    built.unlink()  # it is loaded: its bytes stay
    built.write_bytes(whole[:3000])  # as a machine that lost its power may leave it
    assert onednn._built(tmp_path).read_bytes()[:4] == b"\x7fELF"
    assert len(onednn._built(tmp_path).read_bytes()) == len(whole)
    assert not machine.plan_for(8, 16, 16, "gpu", 2).onednn


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_that_uses_it_is_bound_to_its_version(asked, tmp_path, monkeypatch):
    plan = dataclasses.replace(machine.PLAIN, onednn=asked)

    def settle():
        return run.settle(tmp_path / "run", optim.OptimConfig(), "pretrain", plan, tmp_path)

    settle()
    true = machine.environment()
    monkeypatch.setattr(machine, "environment", lambda: {**true, "onednn": "9.9"})
    if not asked:
        assert settle() == plan
        return
    with pytest.raises(BadInput, match=r"onednn=.* this is onednn='9.9'.*tinylm adopt"):
        settle()
    run.adopt(tmp_path / "run")
    assert settle() == plan
