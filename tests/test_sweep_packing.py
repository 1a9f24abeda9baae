"""Packs: every run once, one program each, no more than fits; and sweeps that train them."""

import itertools
from dataclasses import replace

import pytest
from test_stages_pretrain import bits, config, data  # noqa: F401  (fixtures)

from tinylm import files, machine
from tinylm.sweep import cells, packing, runner
from tinylm.train import run


@pytest.fixture(scope="module")
def runs(config):  # noqa: F811
    """Seven lengths and rates of one program, three of another width, one of another optimiser."""
    wide = replace(config, model=replace(config.model, D=32))
    list_ = [replace(config, steps=s, optim=replace(config.optim, lr=s * 1e-4))
             for s in (30, 200, 10, 90, 40, 70, 60)]
    list_ += [replace(wide, steps=s) for s in (5, 500, 50)]
    list_ += [replace(config, optim=replace(config.optim, beta2=0.95))]
    return {cells.name(c): c for c in list_}


def planned(runs, vmap=False):
    return {n: machine.Plan(micro=4, vmap=vmap) for n in runs}


@pytest.mark.parametrize("most", [1, 2, 3, 4, 64])
def test_every_run_is_in_one_pack_of_its_program_within_the_size(runs, most):
    packs, plans = packing.pack(runs, planned(runs), most, 1e12)
    assert sorted(itertools.chain(*packs)) == sorted(runs)
    for names in packs:
        assert len({runs[n].program for n in names}) == 1
        assert len(names) <= plans[names[0]].population <= most
        assert len({plans[n] for n in names}) == 1
    again = packing.pack(dict(reversed(runs.items())), planned(runs), most, 1e12)
    assert again == (packs, plans)


def test_the_longest_are_together_and_packs_are_as_equal_as_can_be(runs):
    packs, plans = packing.pack(runs, planned(runs), 4, 1e12)
    steps = [[runs[n].steps for n in names] for names in packs]
    assert sorted(steps) == [[30], [40, 30, 10], [200, 90, 70, 60], [500, 50, 5]]
    assert [plans[p[0]].population for p in packs if len(p) > 1] == [3, 4, 4]
    alone = next(p[0] for p in packs if len(p) == 1)
    assert plans[alone] == planned(runs)[alone]


def test_idle_lanes_are_padding_and_runs_that_end_early(runs):
    chosen = {n: c for n, c in runs.items() if c.optim.beta2 == 0.99 and c.model.D == 16}
    packs, plans = packing.pack(chosen, planned(chosen), 4, 1e12)
    used, held = 200 + 90 + 70 + 60 + 40 + 30 + 10, 4 * 200 + 4 * 40
    assert packing.idle(packs, chosen, plans) == pytest.approx(1 - used / held)
    assert packing.idle(*packing.pack(chosen, planned(chosen), 1, 1e12)[:1], chosen,
                        planned(chosen)) == pytest.approx(0)


@pytest.mark.parametrize("vmap", [False, True])
def test_a_population_is_no_larger_than_memory_holds(runs, vmap):
    plans = planned(runs, vmap)
    for memory in (1e5, 1e6, 3e6, 1e7, 1e9):
        packs, sized = packing.pack(runs, plans, 64, memory)
        for names in packs:
            plan = sized[names[0]]
            assert plan.population == 1 or packing.held_bytes(runs[names[0]], plan) <= memory
            assert runs[names[0]].rows % plan.micro == 0
    assert {p.population for p in sized.values()} == {1, 3, 7}
    assert {p.population for p in packing.pack(runs, plans, 64, 1.0)[1].values()} == {1}
    name = next(iter(runs))
    one, two = (packing.held_bytes(runs[name], replace(plans[name], population=p)) for p in (1, 2))
    assert (two == 2 * one) == vmap


@pytest.mark.slow
def test_a_sweep_trained_as_populations_has_the_bits_of_one_trained_alone(
        tmp_path, monkeypatch, config, data):  # noqa: F811
    monkeypatch.setattr(machine, "cores", lambda: [0])
    wanted = [replace(config, steps=s, seed=s) for s in (24, 20, 8)] + [
        replace(config, steps=100_000)]  # more epochs than are allowed
    records = runner.sweep(tmp_path / "runs", wanted, data.folder, population=4)
    assert [r["config"]["steps"] for r in records] == [8, 20, 24]
    assert {r["plan"]["population"] for r in records} == {4}
    failure = files.read_json(tmp_path / "runs" / cells.name(wanted[3]) / "failure.json")
    assert "epochs" in failure["reason"]
    listed = files.read_json(tmp_path / "runs/sweep.json")
    assert len(listed["packs"]) == 1 and 0 < listed["idle"] < 1
    alone = runner.sweep(tmp_path / "alone", wanted[:3], data.folder)
    assert [r["loss"] for r in alone] == [r["loss"] for r in records]
    for c in wanted[:3]:
        assert run.record(tmp_path / "alone" / cells.name(c))["plan"]["population"] == 1
        assert bits(tmp_path / "runs" / cells.name(c), c) == bits(
            tmp_path / "alone" / cells.name(c), c)
