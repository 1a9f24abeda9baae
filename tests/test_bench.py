"""Benchmarks: what is timed is what was asked for, in turn, and the counts are right."""

import os
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from test_stages_pretrain import story

from tinylm import bench, files, machine
from tinylm.config import BadInput
from tinylm.laws.accounting import flops_per_token
from tinylm.look import progress
from tinylm.model.decoder import ModelConfig
from tinylm.sweep import cells, presets

TINY = ModelConfig(V=64, D=16, L=2, H=2, T=16)
MANY = jax.device_count()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", (TINY, 4))


def test_tasks_take_turns_after_one_unmeasured_call_each():
    calls = []

    def task(name, values):
        left = iter(values)
        return lambda: (calls.append(name), next(left))[1]

    found = bench.interleaved({"a": task("a", (99.0, 1.0, 5.0, 2.0)),
                               "b": task("b", (-9.0, 7.0, 7.0, 8.0))}, rounds=3)
    assert "".join(calls) == "abababab"
    assert found == {"a": bench.Rate(2.0, 1.0, 5.0, 3), "b": bench.Rate(7.0, 7.0, 8.0, 3)}


def test_products_are_counted_as_two_operations_an_element(monkeypatch):
    monkeypatch.setattr(bench, "PRODUCTS", ((8, 4, 2),))
    monkeypatch.setattr(bench, "_gflops", lambda program, arrays, cost: cost)
    found = bench.peak(rounds=1)
    every = 2 * 8 * 4 * 2 * jax.device_count()
    assert found["best_f32_gflops"] == found["best_bf16_gflops"] == every
    kinds = {"float32", "bfloat16"} | (
        {"float32 by oneDNN"} if machine.environment()["onednn"] else set())
    assert set(found["rates"]) == {"copy GB/s", *(f"8x4x2 {kind}" for kind in kinds)}


def test_a_rate_is_work_over_the_time_it_took(monkeypatch):
    now = [7.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(x):
        now[0] += 0.02
        return x

    assert bench._gflops(slow, (1.0,), 1e9, seconds=0.09) == pytest.approx(50)


@pytest.mark.parametrize("models", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_is_timed_on_one_model_or_on_one_a_process(models):
    if models > len(machine.cores()):
        pytest.skip(f"{models} models want as many cores")
    found = bench.train(("tiny",), models, rounds=2, seconds=0.05)
    rate = found["tokens_per_second"]["tiny"]
    assert rate["gflops"] == rate["median"] * flops_per_token(TINY.shape) / 1e9
    assert 0 < rate["low"] <= rate["median"] <= rate["high"] and found["models"] == models


def test_a_process_that_dies_is_named_and_nobody_waits_for_it(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: [0, 0])
    started = subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", lambda command, **more: started(
        [command[0], "-c", "import sys; sys.exit(3)"], **more))
    with pytest.raises(ChildProcessError, match="exit code 3"):
        bench.train(("tiny",), 2, rounds=1, seconds=0.01)


def test_decoding_is_timed_for_each_batch_with_and_without_a_cache():
    rates = bench.generation(("tiny",), batches=(1, 3), rounds=1)["tokens_per_second"]
    for name in ("tiny batch 1", "tiny batch 3"):
        slow = rates.pop(name + " without cache")
        assert rates[name]["ratio"] == rates[name]["median"] / slow["median"]
        assert "ratio" not in slow
    assert set(rates) == {"tiny batch 1", "tiny batch 3"}
    assert all(r["median"] > 0 for r in rates.values())


@pytest.mark.parametrize(("rows", "asked", "used"), [(2 * MANY, 0, MANY), (1, 0, 1), (MANY, 1, 1)])
def test_sequences_are_decoded_on_as_many_devices_as_divide_them(monkeypatch, rows, asked, used):
    seen = []
    monkeypatch.setattr(bench, "decode", lambda config, params, state, *_, **__: (
        seen.append(state.begin.sharding), (state, state.begin))[1])
    bench.decoder(bench.shape("tiny")[0], rows, asked)()
    assert len(seen[0].device_set) == used and not (used > 1 and seen[0].is_fully_replicated)


def test_without_a_cache_a_token_costs_a_pass_over_the_whole_context(monkeypatch):
    shapes = []
    built = bench.rebuild
    monkeypatch.setattr(bench, "rebuild", lambda config, params: lambda tokens: shapes.append(
        tokens.shape) or built(config, params)(tokens))
    config, _ = bench.shape("tiny")
    bench.uncached(config, 3)()
    assert shapes == [(3, config.T)]


def test_a_sweeps_shares_are_told_as_run_and_as_at_full_length(monkeypatch, tmp_path):
    study = replace(presets.SMOKE, budgets=(2e9,))
    monkeypatch.setitem(bench.PRESETS, "smoke", study)
    (tmp_path / "stories.txt").write_text("\n".join(story(n, 80) for n in range(20)))
    caches = []

    def faked(folder, runs, data):
        caches.append(os.environ["JAX_COMPILATION_CACHE_DIR"])
        assert all(c.steps == max(1, round(0.1 * full.steps)) for c, full in zip(
            runs, cells.grid(cells.ladder(study.base, study.widths), (2e9,), 4, 6.0, 256),
            strict=True))
        files.append_row(folder / "workers.jsonl", {"workers": 2, "wall_seconds": 10.0})
        files.append_row(folder / "run/timing.jsonl", {
            "wall_seconds": 16, "compile_seconds": 8, "compute_seconds": 4, "input_seconds": 1,
            "start_seconds": 1, "save_seconds": 1, "evaluate_seconds": 1})

    monkeypatch.setattr(bench.runner, "sweep", faked)
    before = os.environ["JAX_COMPILATION_CACHE_DIR"]
    found = bench.sweep("smoke", 0.1, (str(tmp_path / "stories.txt"),))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == before != caches[0] == caches[1]
    assert found["cold"]["shares"] == {"wait": 0.2, "compile": 0.4, "start": 0.05, "input": 0.05,
                                       "compute": 0.2, "save": 0.05, "evaluate": 0.05}
    assert found["warm"]["full_length_shares"]["compute"] == pytest.approx(40 / 65)
    assert found["runs"] == found["shapes"] == 4
    assert "40.0%" in progress.swept(found)


@pytest.mark.slow
def test_members_together_are_held_against_one_at_a_time():
    found = bench.population((2,), (16,), rounds=1, seconds=0.01, tokens=64)
    rates = found["tokens_per_second"]
    assert set(rates) == {"D16 one at a time", "D16 2 together"}
    assert rates["D16 one at a time"]["ratio"] == 1.0
    assert rates["D16 2 together"]["ratio"] == (
        rates["D16 2 together"]["median"] / rates["D16 one at a time"]["median"])
    assert progress.benched(found).count(" x") == 2
    with pytest.raises(BadInput, match="100000 members of width 16 do not fit"):
        bench.population((100_000,), (16,), tokens=64)


def test_unknown_shapes_and_impossible_counts_are_refused(monkeypatch):
    with pytest.raises(BadInput, match="shape 'xxl' is not one of s, m"):
        bench.generation(("xxl",))
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for models in (0, most + 1):
        with pytest.raises(BadInput, match=f"models={models} is not within 1 to"):
            bench.train(("tiny",), models)
    monkeypatch.setattr(machine, "survey", lambda: ("gpu", 1))
    monkeypatch.setattr(machine, "cores", lambda: [0, 1])
    with pytest.raises(BadInput, match="do not share an accelerator"):
        bench.train(("tiny",), 2)
