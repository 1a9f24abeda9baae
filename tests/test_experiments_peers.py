"""The comparison with a peer: both sides get the same shapes and tokens, and ratios are ours over
theirs. Stand-ins answer here with a rate of their first argument and a loss by the learning rate
(the real servers of ours run in test_bench.py)."""

import json
import sys
from unittest import mock

import numpy as np
import pytest
from command import ROOT, experiment
from test_stages_pretrain import story

from tinylm import bench, files, machine
from tinylm.laws.accounting import flops_per_token
from tinylm.model.decoder import ModelConfig

STAND_IN = """
import json, os, sys
for line in sys.stdin:
    open(os.environ["ASKED"], "a").write(line)
    what, *_, rate = json.loads(line)
    slow = isinstance(what, dict) and what["compute"] == "f32"
    answer = float(sys.argv[1]) / (2 if slow else 1)
    print(2.0 + rate if what == "loss" else answer, flush=True)
"""


def test_a_folder_without_a_model_is_refused(tmp_path):
    done = experiment("peers", "--nanogpt", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and "holds no model.py" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_python_without_torch_is_refused(tmp_path):
    (tmp_path / "model.py").write_text("")
    for python in (tmp_path / "none", tmp_path / "model.py", "/bin/false"):
        for name, more in (("peers", "--out"), ("peers_grid", "--study")):
            done = experiment(name, "--nanogpt", tmp_path, more, tmp_path / "out",
                              "--python", python)
            assert done.returncode == 2 and f"{python} cannot import torch" in done.stderr
    done = experiment("peers_grid", "--nanogpt", tmp_path, "--study", tmp_path, "--every", 0)
    assert done.returncode == 2 and "every=0 is not within 1" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ratios_are_ours_over_theirs_on_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    with mock.patch.object(machine, "pin"):
        import peers
    (tmp_path / "peer.py").write_text(STAND_IN)
    (tmp_path / "model.py").write_text("")
    (tmp_path / "stories.txt").write_text("\n".join(story(n, 80) for n in range(40)))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.jsonl"))
    monkeypatch.setattr(machine, "cores", lambda: [0, 1])
    theirs, ours = ([sys.executable, str(tmp_path / "peer.py"), rate] for rate in ("1000", "3000"))
    monkeypatch.setattr(peers, "imports_torch", lambda python: True)
    monkeypatch.setattr(peers, "peers", lambda args, models: [theirs] * models)
    monkeypatch.setattr(bench, "servers", lambda models: [ours] * models)
    monkeypatch.setattr(bench, "peak", lambda rounds: {"best_f32_gflops": 5e3,
                                                       "best_bf16_gflops": 1.0})
    monkeypatch.setattr(bench, "decoder", lambda model, rows, seconds: lambda: 500.0 * rows)
    monkeypatch.setitem(bench.SHAPES, "tiny", (ModelConfig(V=128, D=16, L=2, H=2, T=16), 4))
    args = peers.Args(nanogpt=tmp_path, out=tmp_path / "out", shapes=("tiny",), rounds=1, steps=10,
                      decode=("tiny",),
                      corpus=(str(tmp_path / "stories.txt"),), seconds=0.05, results=tmp_path)
    assert peers.main(args) == 0
    (place,) = tmp_path.glob("peers_py3*.json")
    found = files.read_json(place)["shapes"]["tiny"]
    one, two = found["training"]["models_1"], found["training"]["models_2"]
    assert one["ratio"] == {"ours f32": 2.0, **dict.fromkeys(peers.WAYS, 3.0)}
    assert one["ratio_f32"] == {"ours": 0.5, **dict.fromkeys(peers.WAYS, 1.5)}
    assert two["ratio"] == {"ours f32": 2.0, **dict.fromkeys({**peers.WAYS, **peers.TUNED}, 3.0)}
    assert two["tokens_per_second"]["torch tuned, 4 at once"]["median"] == 2000
    assert found["product_gflops"] == {"f32": 5e3, "bf16": 2e3}  # the best of both sides, by type
    config = ModelConfig(V=found["model"]["V"], D=16, L=2, H=2, T=16)
    assert found["most"] == pytest.approx(5e12 / flops_per_token(config.shape))
    assert [found["decoding"][f"batch_{rows}"]["ratio"] for rows in (1, 64)] == [0.5, 32.0]
    assert found["loss"]["nanoGPT"] == 2.0 + min(peers.RATES)
    assert found["loss"]["tokens"] == 10 * 4 * 16 and 2 < found["loss"]["ours"] < 6
    assert peers.told("tiny", found).count("3.00 x") == 10
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    asked = [a for a in asked if isinstance(a[0], str)]  # of the peer: ours are asked for a model
    assert {what for what, *_ in asked} == {"product", "rate", "generate", "loss"}
    every = np.load(next(a[3] for a in asked if a[0] == "loss"))
    few = np.load(next(a[3] for a in asked if a[0] == "rate"))
    assert every.shape == (10, 4, 17) and (few == every[:8]).all()
    half, config = (files.read_json(tmp_path / f"out/tiny/run-10-{compute}/config.json")["config"]
                    for compute in ("bf16", "f32"))
    assert half["model"] == {**config["model"], "compute": "bf16"}
    assert config["model"] == found["model"] and (config["batch"], config["steps"]) == (64, 10)


def test_our_shapes_match_the_peers_parameters_and_flops_within_two_percent(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    with mock.patch.object(machine, "pin"):
        import peers
    for name in ("s", "m", "l", "xl"):
        for ratio in peers.compared(bench.shape(name)[0]).values():
            assert abs(ratio - 1) < 0.02, name


def test_a_grid_s_time_is_starts_and_tokens_at_the_rate_of_each_width(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    with mock.patch.object(machine, "pin"):
        import peers_grid
    runs = [{"tokens": 1000.0, "config": {"model": {"D": d}}} for d in (10, 20, 40)]
    told = [{"D": d, "tokens": 0, "start_seconds": s, "tokens_per_second": rate,
             "our_tokens_per_second": 4 * rate} for d, s, rate in ((10, 4., 400.), (40, 6., 100.))]
    found = peers_grid.scaled(runs, told, computing=0.5)
    assert found["theirs_start_seconds"] == pytest.approx(15.0)
    assert found["theirs_seconds"] == pytest.approx(15.0 + 2.5 + 5.0 + 10.0)
    assert found["ours_seconds"] == pytest.approx(17.5 / 4 / 0.5)
    assert found["ratio"] == pytest.approx(32.5 / 8.75)
