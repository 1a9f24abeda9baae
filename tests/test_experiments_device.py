"""The device checks: all of them run at toy size; one that fails is a row and the rest goes on."""

from unittest import mock

import pytest
from command import ROOT

from tinylm import bench, files, machine
from tinylm.config import BadInput
from tinylm.model import attention
from tinylm.model.decoder import ModelConfig


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
    assert rows["124M, best"]["value"] == rows["124M, 2 rows, recomputed, scanned"]["value"] > 0
    together = rows["population D=16 of 64 tokens"]
    assert together["value"] == max(r["ratio"] for r in together["more"]["rates"].values()) > 0
    assert rows["decode tiny, 2 at once"]["value"] > 0


def test_the_librarys_attention_is_held_against_ours(monkeypatch, checks):
    assert checks.mixing(checks.TOY).passed
    whole = attention.by_library
    monkeypatch.setattr(attention, "by_library", lambda *given: 1.1 * whole(*given))
    assert not checks.mixing(checks.TOY).passed


def test_a_target_is_met_by_the_best_row(checks):
    rows = [{"check": f"of {n}", "value": v, "unit": "x"} for n, v in enumerate((2.0, 5.0, None))]
    assert checks.best(rows, "of ", 5.0).passed and not checks.best(rows, "of ", 5.1).passed
    with pytest.raises(RuntimeError, match="none of these was measured"):
        checks.best(rows[2:], "of ", 1.0)


def test_checks_that_would_begin_too_late_are_rows_that_say_so(tmp_path, checks):
    assert checks.main(checks.Args(tmp_path / "out", toy=True, minutes=0, results=tmp_path)) == 1
    rows = files.read_json(tmp_path / "toy.json")["checks"]
    assert {r["more"]["error"] for r in rows if not r["check"].endswith("best")} >= {
        "TimeoutError: 0 minutes were over"}


STAND_IN = """
import json, sys
for line in sys.stdin:
    what, shape, rows, path, how, seconds = json.loads(line)
    assert what == "rate" and how["device"] == "cuda" and open(path, "rb").read()
    print(1000.0 if shape["D"] == 16 else 50.0, flush=True)
"""


def test_a_peer_is_held_against_our_best_rate_of_its_shape(tmp_path, monkeypatch, checks):
    (tmp_path / "peer.py").write_text(STAND_IN)
    monkeypatch.setattr(checks, "PEER", tmp_path / "peer.py")
    args = checks.Args(tmp_path / "out", nanogpt=tmp_path)
    rows = [{"check": "population D=16 of 64 ", "value": 2.0, "unit": "x", "more": {
        "rates": {"one": {"median": 400.0}, "two": {"median": 3000.0}}}},
            {"check": "124M, 2 rows", "value": 0.4, "unit": "x",
             "more": {"tokens_per_second": 40.0}},
            {"check": "124M, 2 rows, scanned", "value": None, "unit": "", "more": {}}]
    small = checks.bench.member(16, 64, "bf16")
    ahead = checks.peer(args, small, 1, rows, "population D=16 of 64 ")
    assert (ahead.value, ahead.passed, ahead.more["ours"]) == (3.0, True, 3000.0)
    behind = checks.peer(args, ModelConfig(V=128, D=32, L=2, H=2, T=32), 2, rows,
                         "124M, 2 rows")
    assert (behind.value, behind.passed) == (0.8, False)


def test_a_folder_that_is_no_checkout_is_refused_before_any_check(tmp_path, checks):
    with pytest.raises(BadInput, match="holds no model.py"):
        checks.main(checks.Args(tmp_path / "out", nanogpt=tmp_path, toy=True, results=tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_was_checked_is_kept_when_the_rest_is_cut_off(tmp_path, monkeypatch, checks):
    def two(args, sizes, rows):
        yield "first", lambda: checks.Found(1.0, "x")
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "checks", two)
    with pytest.raises(KeyboardInterrupt):
        checks.main(checks.Args(tmp_path / "out", toy=True, results=tmp_path))
    found = files.read_json(tmp_path / "toy.json")
    assert [r["value"] for r in found["checks"]] == [1.0] and not found["passed"]
    monkeypatch.setattr(checks, "checks", lambda *_: [("first", lambda: checks.Found(1.0, "x"))])
    assert checks.main(checks.Args(tmp_path / "out", toy=True, results=tmp_path)) == 0
    assert files.read_json(tmp_path / "toy.json")["passed"]


def test_what_cannot_be_kept_or_is_no_time_is_told_before_anything_is_checked(tmp_path, checks):
    (tmp_path / "taken").write_text("a file where a folder is to be")
    for more, words in (({"minutes": float("nan")}, "minutes=nan"),
                        ({"minutes": -1.0}, "minutes=-1"),
                        ({"results": tmp_path / "taken"}, "taken")):
        with pytest.raises((BadInput, OSError), match=words):
            checks.main(checks.Args(tmp_path / "out", toy=True, **more))
    assert not (tmp_path / "out").exists()
