"""A sweep survives: kills, bad members, a second call, a second owner."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_stages_pretrain import bits, config, data  # noqa: F401  (fixtures)

from tinylm import files, leases, machine
from tinylm.config import BadInput, from_json, to_json
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import cells, presets, runner, times, worker
from tinylm.train import run

CODE = """
import sys
from pathlib import Path
from tinylm import machine
machine.pin(devices=2)
from tinylm import files
from tinylm.config import from_json
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import runner
from tinylm.train.run import Stopped
configs = [from_json(PretrainConfig, c) for c in files.read_json(Path(sys.argv[1]))["configs"]]
try:
    runner.sweep(Path(sys.argv[2]), configs, Path(sys.argv[3]), population=int(sys.argv[4]))
except Stopped:
    sys.exit(75)
"""


def start(folder, configs, data, population=0):  # noqa: F811
    files.write_json(folder / "configs.json", {"configs": [to_json(c) for c in configs]})
    command = [sys.executable, "-c", CODE, str(folder / "configs.json"), str(folder / "runs"),
               str(data.folder), str(population)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def configs(config):  # noqa: F811
    return [replace(config, steps=s, seed=n) for n, s in enumerate((400, 300, 40, 30))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, configs, data):  # noqa: F811
    folder = tmp_path_factory.mktemp("whole") / "runs"
    return folder, runner.sweep(folder, configs, data.folder)


def test_a_run_alone_has_all_cores_and_several_have_one_each(tmp_path, configs, monkeypatch):
    monkeypatch.setattr(runner.machine, "survey", lambda: ("cpu", 2))
    for part, workers, devices in ((configs[:1], 1, 2), (configs, 2, 1)):
        runs = {runner.name(c): c for c in part}
        (tmp_path / str(workers)).mkdir()
        listed = runner._settle(tmp_path / str(workers), runs, 0)
        assert listed["workers"] == workers
        assert {p["devices"] for p in listed["plans"].values()} == {devices}


def test_every_run_is_there_once_and_the_second_call_trains_nothing(
        whole, configs, data):  # noqa: F811
    folder, records = whole
    assert sorted(r["seed"] for r in records) == [0, 1, 2, 3]
    began = time.monotonic()
    assert runner.sweep(folder, configs, data.folder) == records
    assert time.monotonic() - began < 10


def cut(folder, configs, data, how, population=0):  # noqa: F811
    """Start a sweep and stop it once a run that is not finished has some rows of metrics."""
    process = start(folder, configs, data, population)
    seen = time.monotonic() + 60
    while time.monotonic() < seen and process.poll() is None:
        logs = list((folder / "runs").glob("*/metrics.jsonl"))
        if any(log.stat().st_size > 1500 for log in logs if not
               (log.parent / "record.json").exists()):
            break
        time.sleep(0.02)
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = children.read_text().split() if children.exists() else []
        os.killpg(process.pid, how)
        for worker_id in workers if how == signal.SIGKILL else ():  # they are not of that group
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker_id), how)
    code = process.wait(timeout=60)
    process.stderr.close()
    assert code in ((-9,) if how == signal.SIGKILL else (75, 0))


@pytest.mark.slow
def test_a_population_killed_in_its_middle_ends_with_the_bits_of_runs_alone(
        tmp_path, whole, configs, data):  # noqa: F811
    cut(tmp_path, configs, data, signal.SIGKILL, population=4)
    records = runner.sweep(tmp_path / "runs", configs, data.folder, population=4)
    assert [r["loss"] for r in records] == [r["loss"] for r in whole[1]]
    assert {r["plan"]["population"] for r in records} == {4}
    for c in configs:
        assert bits(tmp_path / "runs" / cells.name(c), c) == bits(whole[0] / cells.name(c), c)


@pytest.mark.parametrize("how", [
    signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_sweep_killed_in_its_middle_ends_with_the_same_bits(
        tmp_path, whole, configs, data, how):  # noqa: F811
    for _ in range(2 if how == signal.SIGKILL else 1):
        cut(tmp_path, configs, data, how)
    begun = [log.parent for log in (tmp_path / "runs").glob("*/metrics.jsonl")]
    if how == signal.SIGINT:  # to the whole group, as a terminal does: each run saved once
        assert begun and all(list(place.glob("checkpoints/step-*")) for place in begun)
    folder, records = whole
    assert runner.sweep(tmp_path / "runs", configs, data.folder) == records
    for c in configs:
        assert bits(tmp_path / "runs" / cells.name(c), c) == bits(folder / cells.name(c), c)
    assert not list(tmp_path.rglob(".*.tmp"))


REPLAY = """
import sys
from pathlib import Path
from tinylm import machine
pin = machine.pin
machine.pin = lambda *asked: print("pinned", *asked) or pin(*asked)
from tinylm.verbs import again
again.replay(Path(sys.argv[1]))
"""


def test_a_run_of_one_core_is_replayed_on_one(whole, configs):
    place = whole[0] / cells.name(configs[-1])
    assert files.read_json(place / "environment.json")["threads"] == "one"
    done = subprocess.run([sys.executable, "-c", REPLAY, str(place)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert "pinned 1 " in done.stdout and "equal" in done.stdout


def test_workers_that_do_not_start_are_told_with_what_they_said(tmp_path, config):  # noqa: F811
    with pytest.raises(BadInput, match="workers end before they begin a run; .*worker-.*: .*none"):
        runner.sweep(tmp_path / "runs", [config], tmp_path / "none")


def test_a_member_that_cannot_train_is_a_row_that_says_so_and_the_rest_goes_on(
        tmp_path, config, data):  # noqa: F811
    greedy = replace(config, steps=100_000)
    records = runner.sweep(tmp_path / "runs", [greedy, config], data.folder)
    assert [r["config"]["steps"] for r in records] == [config.steps]
    failure = files.read_json(tmp_path / "runs" / cells.name(greedy) / "failure.json")
    assert failure["status"] == "failed" and "epochs" in failure["reason"]
    assert run.record(tmp_path / "runs" / cells.name(greedy)) is None


def test_why_a_run_failed_is_written_by_its_holder_alone(tmp_path, config):  # noqa: F811
    with leases.hold(tmp_path / "run"):  # who else takes it sweeps out what lies half written
        worker._failed(tmp_path, "run", config, ValueError("one"))
        assert not (tmp_path / "run/failure.json").exists()
    worker._failed(tmp_path, "run", config, ValueError("two"))
    assert files.read_json(tmp_path / "run/failure.json")["reason"] == "ValueError: two"


def test_each_shape_has_one_worker_and_who_is_done_helps_the_others(config):  # noqa: F811
    runs = {f"D{width} {steps}": replace(config, model=replace(config.model, D=width), steps=steps)
            for width, steps in ((8, 100), (8, 90), (8, 2), (12, 80), (16, 70), (16, 10), (20, 9),
                                 (24, 1), (28, 1), (32, 1), (36, 1))}
    one = ["D16 70", "D20 9", "D16 10", "D36 1", "D32 1", "D28 1", "D24 1"]
    other = ["D12 80", "D8 100", "D8 90", "D8 2"]
    assert worker.share(runs, 2, 0) == one + other and worker.share(runs, 2, 1) == other + one
    longest = sorted(runs, key=lambda n: -runs[n].flops)
    assert worker.share(runs, 1, 0) == longest == worker.share(runs, 9, 8)


def test_seconds_outside_runs_are_waiting(whole):
    folder, records = whole
    row, = files.read_rows(folder / "workers.jsonl")
    seconds = times.spent(folder)
    assert seconds["wall"] == pytest.approx(row["workers"] * row["wall_seconds"])
    assert seconds["wall"] == pytest.approx(seconds["wait"] + sum(
        seconds[kind] for kind in times.KINDS), abs=0.1)
    first = [files.read_rows(folder / cells.name(from_json(PretrainConfig, r["config"])) /
                              "timing.jsonl")[0]["compile_seconds"] for r in records]
    assert min(first) < 0.2 * max(first) and seconds["wait"] > 0  # who comes second compiles little


def test_another_list_in_the_same_folder_is_refused(whole, config, data):  # noqa: F811
    with pytest.raises(BadInput, match="holds another list of 4 runs"):
        runner.sweep(whole[0], [config], data.folder)


def test_the_rest_of_a_sweep_is_trained_as_it_was_begun_or_adopted_on_record(configs, tmp_path,
                                                                                monkeypatch):
    wanted = {cells.name(c): c for c in configs}
    runner._settle(tmp_path, wanted, 2)
    begun = runner._settle(tmp_path, wanted, 2)
    assert runner._settle(tmp_path, wanted, 0) == begun and begun["population"] == 2
    with pytest.raises(BadInput, match="begun with --population 2, not 3"):
        runner._settle(tmp_path, wanted, 3)
    place = tmp_path / "sweep.json"
    for change in ({"code_id": "0" * 16}, {"versions": {"jax": "0.9"}}, {"instructions": "avx"},
                   *({name: "9.9"} for name in machine.LIBRARIES
                     if any(p[name] for p in begun["plans"].values()))):
        files.write_json(place, begun | change)
        with pytest.raises(BadInput, match=f"tinylm adopt {tmp_path}"):
            runner._settle(tmp_path, wanted, 0)
        assert run.adopt_sweep(place) and not run.adopt_sweep(place)
        (key, value), = change.items()
        assert runner._settle(tmp_path, wanted, 0)["adopted_from"][-1][key] == value
    files.write_json(place, {k: v for k, v in begun.items() if k not in run.surroundings()})
    runner._settle(tmp_path, wanted, 0)  # a list of before did not say
    without = {n: p | dict.fromkeys(machine.LIBRARIES, False) for n, p in begun["plans"].items()}
    files.write_json(place, begun | {"plans": without, "native": "9.9"})
    runner._settle(tmp_path, wanted, 0)  # which none of its plans uses
    used = {n: p | dict.fromkeys(machine.LIBRARIES, True) for n, p in begun["plans"].items()}
    name = next(iter(wanted))
    files.write_json(tmp_path / name / "plan.json", used[name])
    files.write_json(place, begun | {"plans": used, "instructions": "avx"})
    monkeypatch.setattr(machine, "basis", lambda backend: {
        "backend": backend, "instructions": "fma", **dict.fromkeys(machine.LIBRARIES, "")})
    assert run.adopt_sweep(place)  # what has not begun is done without what is not here
    assert [p["native"] for p in files.read_json(place)["plans"].values()] == [
        n == name for n in wanted]
    for broken in ({"plans": None}, {"plans": {}}, {"plans": dict.fromkeys(wanted, 3)},
                   {"packs": None}, {"workers": "x"}):
        files.write_json(place, begun | broken)
        with pytest.raises(BadInput, match="lists no plans, packs or workers; delete it"):
            runner._settle(tmp_path, wanted, 0)
    files.write_json(place, begun | {"backend": "tpu"})
    for go_on in (lambda: runner._settle(tmp_path, wanted, 0), lambda: run.adopt_sweep(place)):
        with pytest.raises(BadInput, match=f"{tmp_path} was begun with backend='tpu', this is "
                           "backend='.*'; go on as it was begun, or choose a new folder"):
            go_on()


def test_names_are_unique_and_safe(configs):
    names = [cells.name(c) for c in configs]
    assert len(set(names)) == len(names)
    assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyzD0123456789.-") for n in names)


@pytest.mark.parametrize("study", presets.PRESETS.values(), ids=presets.PRESETS)
def test_every_preset_builds_its_grid_and_refuses_a_corpus_too_small(study, data):  # noqa: F811
    models = cells.ladder(study.base, study.widths)
    chosen = cells.grid(models, study.budgets, study.per_budget, study.spread, study.batch)
    assert all(sum(c.budget == b for c in chosen) >= 4 for b in study.budgets)
    assert study.target >= 5 * max(study.budgets)
    with pytest.raises(BadInput, match="trains a run on .* tokens and .* hold"):
        cells.check_tokens(study, models, data)


@pytest.mark.slow  # a worker waits for the holder with patience
def test_a_run_held_by_another_process_stops_the_sweep_in_words(
        tmp_path, config, data):  # noqa: F811
    with leases.hold(tmp_path / "runs" / cells.name(config)), pytest.raises(
            leases.Owned, match="1 runs of .* are held by another process"):
        runner.sweep(tmp_path / "runs", [config], data.folder)
