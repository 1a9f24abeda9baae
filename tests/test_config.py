"""Configs: strict JSON, ids that only content moves."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tinylm.config import BadInput, canonical, from_json, identity, to_json
from tinylm.model.decoder import ModelConfig
from tinylm.stages.pretrain import PretrainConfig
from tinylm.train.optim import OptimConfig

SWEEP = Path(__file__).parents[1] / "experiments" / "results" / "laptop" / "sweep"


def test_json_round_trip_gives_the_same_config_and_id():
    config = PretrainConfig(ModelConfig(D=96, compute="bf16"), steps=7, seed=3)
    again = from_json(PretrainConfig, to_json(config))
    assert again == config and identity(again) == identity(config)


def test_every_field_that_differs_from_its_default_moves_the_id():
    base = PretrainConfig()
    changed = [replace(base, model=ModelConfig(D=32)), replace(base, optim=OptimConfig(lr=1e-3)),
               replace(base, steps=5), replace(base, seed=1), replace(base, data_id="x"),
               replace(base, forecast_sha256="y"), replace(base, model=ModelConfig(compute="bf16"))]
    assert len({identity(c) for c in [base, *changed]}) == len(changed) + 1


def test_a_new_field_with_a_default_keeps_old_ids():
    @dataclass(frozen=True)
    class Old:
        a: int = 1

    @dataclass(frozen=True)
    class New:
        a: int = 1
        b: tuple = field(default_factory=tuple)

    New.__name__ = "Old"
    assert identity(Old(2)) == identity(New(2))
    assert identity(New(2, (1,))) != identity(New(2))


def test_recorded_runs_keep_their_ids():
    found = [json.loads(p.read_text()) for p in sorted(SWEEP.glob("*/record.json"))]
    assert len(found) == 30
    assert all(identity(from_json(PretrainConfig, r["config"])) == r["id"] for r in found)


@pytest.mark.parametrize(("values", "words"), [
    ({"stepz": 3}, "no field 'stepz'; did you mean steps"),
    ({"steps": "3"}, "steps is '3'; it must be int"),
    ({"steps": True}, "it must be int"),
    ({"steps": 0}, "steps=0 is below 1"),
    ({"model": {"compute": "fp8"}}, "choose one of f32, bf16"),
    ({"model": []}, "is list, not an object"),
    ({"optim": {"lr": float("nan")}}, "finite"),
    ({"batch": 100}, "not a multiple of the context T=128; choose 128 or 256"),
])
def test_bad_configs_are_refused_with_field_and_remedy(values, words):
    with pytest.raises(BadInput, match=words):
        from_json(PretrainConfig, values)


def test_canonical_json_has_one_spelling():
    assert canonical({"b": 1, "a": [1.0, "x"]}) == '{"a":[1.0,"x"],"b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical(float("inf"))


@pytest.mark.parametrize("values", [
    {"optim": {"lr": -1.0}}, {"optim": {"lr": 0.0}}, {"optim": {"beta2": 2.0}},
    {"optim": {"clip": 0.0}}, {"optim": {"warmup": -5.0}}, {"optim": {"decay": 7.0}},
    {"seed": -1}, {"seed": 2**40}])
def test_numbers_outside_their_range_are_refused_with_the_range(values):
    with pytest.raises(BadInput, match="is not within .* to .*; choose a value there"):
        from_json(PretrainConfig, values)
