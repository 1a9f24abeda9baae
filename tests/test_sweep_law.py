"""The fit of a sweep's records says how its minima were counted and how far off they may be."""

import json
from pathlib import Path

import pytest

from tinylm.look import progress
from tinylm.sweep import law

SWEEP = Path(__file__).parents[1] / "experiments" / "results" / "laptop" / "sweep"


def test_the_recorded_sweep_is_fitted_with_its_bias_and_three_counts():
    records = [json.loads(p.read_text()) for p in sorted(SWEEP.glob("*/record.json"))]
    failed = {**records[0], "status": "failed", "loss": None}
    fitted = law.fit([failed, *records])
    counted = fitted["conventions"]
    assert counted["blocks+head exact"]["a"] == pytest.approx(fitted["exponents"]["a"], abs=1e-9)
    assert counted["blocks exact"]["a"] > counted["blocks 6nd"]["a"] > fitted["exponents"]["a"]
    assert len(fitted["bias"]["percent"]) == len(fitted["minima"])
    said = progress.law(fitted)
    assert "the parabola misplaces the best size by up to +" in said
    assert "exponent by convention: blocks exact 0.844, blocks 6nd 0.651" in said
