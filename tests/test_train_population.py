"""Populations: members train as they would alone, end by themselves, and survive together."""

import functools
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_stages_pretrain import bits, config, data  # noqa: F401  (fixtures)

from tinylm import files, leases, machine
from tinylm.config import BadInput
from tinylm.model.decoder import ModelConfig, init
from tinylm.stages.pretrain import pretrain, pretrain_population
from tinylm.train import losses, optim, population, run, step
from tinylm.train.batch import Batch
from tinylm.train.run import Stopped

SMALL = ModelConfig(V=64, D=16, L=1, H=1, T=16)
PLAN = machine.Plan(devices=2, micro=1, chunk=4, checkpoint_every=8, population=4)
OLD = "use_fusion_emitters=false" in os.environ["XLA_FLAGS"]
"""XLA's old emitters (see conftest.py) add up a member's sums otherwise than the same run's alone;
under its own, which the second leg of .ci/run has, and users, a member has the run's bits"""


@functools.cache
def program(way: str):
    """One member's chunk, or a population's one after the other (map) or side by side (vmap)."""
    one = step.make_step(losses.next_token(SMALL, 1e-4), optimiser(), machine.mesh(1), 2)
    return step.make_chunk(one if way == "alone" else population.make_step(one, way == "vmap"))


@functools.cache
def optimiser():
    return optim.optimiser(optim.OptimConfig(), SMALL)


def begun(seed: int, steps: int = 8, lr: float = 1e-2, scale: float = 1.0) -> step.State:
    settings = optim.OptimConfig(lr=lr, weight_decay=lr)
    return step.start(init(SMALL, jax.random.key(seed), scale), optimiser(),
                      optim.hyper(settings, steps))


def batches(seed: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 64, (8, 4, 17)).astype(np.int32)
    return Batch(tokens, np.ones((8, 4, 16), np.float32))


def together(*seeds: int) -> Batch:
    return jax.tree.map(lambda *a: np.stack(a, axis=1), *map(batches, seeds))


def same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("way", "tolerance"), [
    ("map", {"atol": 1e-4} if OLD else {}), ("vmap", {"atol": 1e-3})])
def test_members_train_as_they_would_alone_each_to_its_own_horizon(way, tolerance):
    makers = [functools.partial(begun, 0), functools.partial(begun, 1, steps=3, lr=2e-3),
              functools.partial(begun, 2, steps=6, scale=0.5)]
    states, log = program(way)(population.stack([make() for make in makers], 4),
                               together(0, 1, 2, 2), 8)
    for i, (make, steps) in enumerate(zip(makers, (8, 3, 6), strict=True)):
        alone, alone_log = program("alone")(make(), batches(i), steps)
        same(population.member(states, i), alone, **tolerance)
        for k in log:
            same(log[k][:steps, i], alone_log[k][:steps], **({"rtol": 1e-3} if tolerance else {}))
            assert np.isnan(log[k][steps:, i]).all()
    assert states.step.tolist() == [8, 3, 6, 0] and np.isnan(log["lr"][:, 3]).all()


@pytest.mark.parametrize("way", ["map", "vmap"])
def test_a_member_that_diverges_stays_before_its_last_step_and_the_rest_goes_on(way):
    def hurt(at: int) -> step.State:
        states = population.stack([begun(0), begun(1)], 4)
        norm = states.params["norm"]["weight"]
        return states._replace(params={**states.params, "norm": {
            "weight": norm.at[0].set(jnp.where(at == 0, jnp.nan, norm[0]))}})

    ill, log = program(way)(hurt(0), together(0, 1, 1, 1), 8)
    sound, _ = program(way)(hurt(1), together(0, 1, 1, 1), 8)
    same(population.member(ill, 1), population.member(sound, 1))
    assert ill.step.tolist() == [0, 8, 0, 0] and ill.hyper.steps.tolist() == [0, 8, 0, 0]
    same(population.member(ill, 0).params, population.member(hurt(0), 0).params)
    assert np.isnan(log["nats_per_token"][:, 0]).all()


def test_padding_changes_no_member_beyond_rounding():
    two, _ = program("vmap")(population.stack([begun(0), begun(1)], 2), together(0, 1), 8)
    four, _ = program("vmap")(population.stack([begun(0), begun(1)], 4), together(0, 1, 1, 1), 8)
    for i in range(2):
        same(population.member(four, i), population.member(two, i), atol=1e-3)
    assert four.step.tolist() == [8, 8, 0, 0]


def test_one_program_serves_every_rate_seed_scale_and_length_of_a_population():
    chunk = program("map")
    before = chunk._cache_size()
    for seed, steps, lr, scale in ((5, 8, 1e-2, 1.0), (6, 2, 1e-3, 2.0), (7, 99, 3e-4, 0.1)):
        chunk(population.stack([begun(seed, steps, lr, scale)] * 4, 4), together(*range(4)), 8)
    assert chunk._cache_size() - before <= 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_population_lowers_for_accelerators_from_here(platform):
    half = replace(SMALL, compute="bf16")
    plan = machine.Plan(unroll=False, fused=True, remat=True)
    one = step.make_step(losses.next_token(half, 1e-4, plan), optimiser(), machine.mesh(2), 1)
    states, rows = population.stack([begun(0), begun(1)], 3), together(0, 1, 1)
    first = jax.tree.map(lambda a: a[0], rows)
    exported = jax.export.export(jax.jit(population.make_step(one, vmap=True)),
                                 platforms=[platform])(states, first)
    assert exported.platforms == (platform,) and exported.nr_devices == 2


def test_the_initial_scale_multiplies_deviations_and_not_gains():
    one, three = init(SMALL, jax.random.key(0)), init(SMALL, jax.random.key(0), 3.0)
    np.testing.assert_array_equal(three["norm"]["weight"], one["norm"]["weight"])
    np.testing.assert_array_equal(three["layers"]["self_attn"]["q_norm"]["weight"],
                                  one["layers"]["self_attn"]["q_norm"]["weight"])
    for name in ("q_proj", "k_proj", "v_proj"):
        np.testing.assert_allclose(three["layers"]["self_attn"][name],
                                   3 * one["layers"]["self_attn"][name], rtol=1e-6)


@pytest.fixture(scope="module")
def members(config):  # noqa: F811
    return {f"run-{n}": replace(config, steps=s, seed=n, optim=replace(config.optim, lr=lr))
            for n, (s, lr) in enumerate(((30, 4e-3), (9, 1e-3), (18, 8e-3)))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, members, data):  # noqa: F811
    folder = tmp_path_factory.mktemp("population")
    return folder, pretrain_population(folder, members, data, PLAN)


def test_every_member_has_the_folder_it_would_have_alone(
        whole, tmp_path, members, data):  # noqa: F811
    folder, records = whole
    for (name, one), record in zip(members.items(), records, strict=True):
        alone = pretrain(tmp_path / name, one, data, replace(PLAN, population=1))
        assert record == run.record(folder / name) and record["plan"]["population"] == 4
        if OLD:
            near = pytest.approx(alone["loss"]["nats_per_token"], abs=1e-4)
            assert record["loss"]["nats_per_token"] == near
            continue
        assert {**record, "plan": 0, "files": 0} == {**alone, "plan": 0, "files": 0}
        assert bits(folder / name, one) == bits(tmp_path / name, one)
    assert not list(folder.glob("population-*/checkpoints/*"))


def test_a_population_stopped_anywhere_ends_in_the_same_records_logs_and_parameters(
        whole, tmp_path, members, data):  # noqa: F811
    for at in (4, 8, 20, 30):
        def stop(name: str, step: int, loss: float, at: int = at) -> None:
            if step >= at:
                raise Stopped("pulled the plug")

        with pytest.raises(Stopped):
            pretrain_population(tmp_path, members, data, PLAN, stop)
    assert all(run.record(tmp_path / name) is None for name in members)
    assert pretrain_population(tmp_path, members, data, PLAN) == whole[1]
    for name, one in members.items():
        assert bits(tmp_path / name, one) == bits(whole[0] / name, one)

    def never(*told) -> None:
        raise AssertionError("trained again")

    assert pretrain_population(tmp_path, members, data, PLAN, never) == whole[1]


def test_a_population_killed_while_records_are_written_writes_the_rest(
        whole, tmp_path, monkeypatch, members, data):  # noqa: F811
    written = run.finish

    def once(folder, *rest, **facts):
        if list(tmp_path.glob("*/record.json")):
            raise Stopped("pulled the plug")
        return written(folder, *rest, **facts)

    monkeypatch.setattr(run, "finish", once)
    with pytest.raises(Stopped):
        pretrain_population(tmp_path, members, data, PLAN)
    late = []
    monkeypatch.setattr(run, "finish", lambda folder, *rest, **facts: (
        late.append(folder.name), written(folder, *rest, **facts))[1])
    assert pretrain_population(tmp_path, members, data, PLAN) == whole[1]
    assert late == ["run-1", "run-2"]


def test_a_diverged_member_is_a_record_and_the_rest_have_their_bits(
        whole, tmp_path, members, data):  # noqa: F811
    hot = replace(members["run-1"], optim=replace(members["run-1"].optim, lr=1e30))
    found = pretrain_population(tmp_path, {**members, "run-1": hot}, data, PLAN)
    assert [r["status"] for r in found] == ["ok", "diverged", "ok"]
    assert found[1]["loss"] is None
    last = files.read_lines(tmp_path / "run-1/metrics.jsonl")[-1]
    assert last["train/nats_per_token"] is None and last["step"] <= 9
    for name in ("run-0", "run-2"):
        assert bits(tmp_path / name, members[name]) == bits(whole[0] / name, members[name])


def test_what_cannot_be_a_population_is_refused_in_words(
        whole, tmp_path, members, data, config):  # noqa: F811
    one = {"a": config}
    with pytest.raises(BadInput, match="do not fit a population of 1"):
        pretrain_population(tmp_path, one, data, replace(PLAN, population=1))
    other = {**one, "b": replace(config, model=replace(config.model, D=32))}
    with pytest.raises(BadInput, match="b has another model, optimiser or batch than a"):
        pretrain_population(tmp_path, other, data, PLAN)
    pretrain(tmp_path / "a", replace(config, steps=2), data, replace(PLAN, population=1))
    with pytest.raises(BadInput, match="was begun with"):
        pretrain_population(tmp_path, {"a": replace(config, steps=2)}, data, PLAN)
    (whole[0] / "run-0/record.json").rename(tmp_path / "record.json")
    with pytest.raises(BadInput, match="begun as one of a population of 4"):
        pretrain(whole[0] / "run-0", members["run-0"], data, PLAN)
    (tmp_path / "record.json").rename(whole[0] / "run-0/record.json")
    with leases.hold(whole[0] / "run-1"), pytest.raises(leases.Owned):
        pretrain_population(whole[0], members, data, PLAN)
