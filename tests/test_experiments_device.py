"""The device checks: all of them run at toy size; one that fails is a row and the rest goes on."""

from unittest import mock

import pytest
from command import ROOT

from tinylm import bench, files, machine
from tinylm.model import attention


@pytest.fixture
def checks(monkeypatch):
    """The script as a module, with few small products to time."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setattr(bench, "PRODUCTS", ((8, 8, 8),))
    with mock.patch.object(machine, "pin"):
        import device_checks
    return device_checks


@pytest.mark.slow
def test_every_check_is_a_row_and_one_that_fails_stops_none(tmp_path, monkeypatch, checks):
    def full(sizes):
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand a long tale")

    monkeypatch.setattr(checks, "mixing", full)
    args = checks.Args(out=tmp_path / "out", toy=True, results=tmp_path, minutes=60)
    assert checks.main(args) == 1
    found = files.read_json(tmp_path / "toy.json")
    rows = {r["check"]: r for r in found["checks"]}
    assert [name for name, r in rows.items() if not r["passed"]] == ["attention"]
    assert rows["attention"]["more"]["error"] == "RuntimeError: RESOURCE_EXHAUSTED: no memory"
    assert rows["machine"]["value"] > 0 and not found["passed"]
    for name in ("resume, one run", "resume, a population"):
        assert rows[name]["value"] == 0 and rows[name]["more"]["bytes"] > 10_000
    assert rows["124M, best"]["value"] == rows["124M, 2 rows, recomputed, written out"]["value"] > 0
    assert rows["population D=16, best"]["value"] == rows["population D=16 P=2"]["value"] > 0
    assert rows["decode tiny, 2 at once"]["value"] > 0


def test_the_librarys_attention_is_held_against_ours(monkeypatch, checks):
    assert checks.mixing(checks.TOY).passed
    whole = attention.by_library
    monkeypatch.setattr(attention, "by_library", lambda *given: 1.1 * whole(*given))
    assert not checks.mixing(checks.TOY).passed


def test_a_target_is_met_by_the_best_row_or_by_its_share(checks):
    rows = [{"check": f"of {n}", "value": v, "unit": "x", "more": {"bf16_share": s}}
            for n, (v, s) in enumerate(((2.0, 0.1), (5.0, 0.2), (None, 0.9)))]
    assert checks.best(rows, "of ", 5.0, 0.5).passed and checks.best(rows, "of ", 9.0, 0.2).passed
    assert not checks.best(rows, "of ", 5.1, 0.21).passed
    with pytest.raises(RuntimeError, match="none of these was measured"):
        checks.best(rows[2:], "of ", 1.0, 1.0)


def test_checks_that_would_begin_too_late_are_rows_that_say_so(tmp_path, checks):
    assert checks.main(checks.Args(tmp_path / "out", toy=True, minutes=0, results=tmp_path)) == 1
    rows = files.read_json(tmp_path / "toy.json")["checks"]
    assert {r["more"]["error"] for r in rows if not r["check"].endswith("best")} >= {
        "TimeoutError: 0 minutes were over"}
