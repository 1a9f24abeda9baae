"""What belongs to another run, lies behind a link, has gone or was made up, is met by name."""

import contextlib
import gzip
import json
import os
import shutil
from unittest import mock

import pytest
from command import tinylm
from test_flips import stopping
from test_stages_pretrain import story
from test_verbs_planted import GRID, record

from tinylm import files, leases
from tinylm.config import BadInput
from tinylm.sweep import cells
from tinylm.text import lines

SMALL = ("--model.V", 96, "--model.D", 8, "--model.T", 32, "--batch", 64)


def trained(out, *more, steps=9):
    return tinylm("train", "--out", out, *SMALL, "--steps", steps, *more)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two finished runs on one text, two that a signal stopped, and another text."""
    folder = tmp_path_factory.mktemp("world")
    for name, first in (("stories", 0), ("others", 50)):
        (folder / f"{name}.txt").write_text("\n".join(story(n + first, 30) for n in range(20)))
        done = tinylm("tokenizer", "--out", folder / name, "--corpus", folder / f"{name}.txt",
                      "--V", 96)
        assert done.returncode == 0, done.stderr
    for seed, name in ((0, "a"), (1, "b")):
        where = ("--text", folder / "stories", "--seed", seed)
        assert trained(folder / name, *where).returncode == 0
        with stopping(2):
            assert trained(folder / f"begun-{name}", *where, steps=64).returncode == 75
    return folder


@pytest.fixture
def copy(world, tmp_path):
    """A copy that a test may harm."""
    place = tmp_path / "world"
    shutil.copytree(world, place, symlinks=True)
    return place


def swap(copy, name, other, *parts):
    for part in parts:
        with contextlib.suppress(NotADirectoryError):
            shutil.rmtree(copy / name / part)
        (shutil.copytree if (copy / other / part).is_dir() else shutil.copy)(
            copy / other / part, copy / name / part)


def test_checkpoints_of_another_run_are_neither_spoken_with_nor_gone_on_from(copy):
    swap(copy, "a", "b", "checkpoints")
    for verb in (("sample", copy / "a", "--prompt", "Ba"), ("eval", copy / "a")):
        done = tinylm(*verb)
        assert done.returncode == 2 and "is a checkpoint of run" in done.stderr, verb
    found = tinylm("verify", copy / "a", "--json")
    assert found.returncode == 1 and "is a checkpoint of run" in found.stdout
    swap(copy, "begun-a", "begun-b", "checkpoints", "metrics.jsonl")
    assert "is a checkpoint of run" in tinylm("verify", copy / "begun-a").stdout
    done = trained(copy / "begun-a", "--text", copy / "stories", "--seed", 0, steps=64)
    assert done.returncode == 2 and "put the run's own back" in done.stderr


def test_a_log_that_a_resume_refuses_stays_as_it_was(copy):
    log = copy / "begun-a/metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step": 16', b'"step": 17') + b'{"step": 99}\n')
    before = log.read_bytes()
    assert f"{log} has other bytes than its checkpoint saw" in tinylm(
        "verify", copy / "begun-a").stdout
    done = trained(copy / "begun-a", "--text", copy / "stories", "--seed", 0, steps=64)
    assert done.returncode == 2 and str(log) in done.stderr and log.read_bytes() == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.json", "environment.json", "config.json"])
def test_what_a_begun_run_has_lost_is_named_by_verify(copy, name):
    (copy / "begun-a" / name).unlink()
    found = tinylm("verify", copy / "begun-a")
    assert found.returncode == 1 and str(copy / "begun-a" / name) in found.stdout
    if name in ("plan.json", "environment.json"):
        done = trained(copy / "begun-a", "--text", copy / "stories", "--seed", 0, steps=64)
        assert done.returncode == 2 and "delete that run's folder" in done.stderr


def test_tokens_of_another_tokenizer_are_refused_wherever_they_are_opened(copy):
    swap(copy, "stories", "others", "tokens")
    for verb in (("eval", copy / "a"), ("sample", copy / "a", "--prompt", "Ba"),
                 ("train", "--out", copy / "new", "--text", copy / "stories", *SMALL)):
        done = tinylm(*verb)
        assert done.returncode == 2 and "holds tokens of tokenizer" in done.stderr, verb


def test_a_begun_population_and_a_member_without_a_record_are_sound(tmp_path):
    for name, facts in (("population-1", {"logs": [[9, "x", True]]}), ("member", {})):
        with files.staged(tmp_path / name / "checkpoints/step-00000008", **facts) as draft:
            (draft / "params").write_text("x")
    for name in ("config.json", "plan.json", "environment.json"):
        files.write_json(tmp_path / "member" / name, {"id": "m"})
    found = tinylm("verify", tmp_path)
    assert found.returncode == 0, found.stdout


def test_a_linked_run_is_fitted_and_verified_as_any_other(tmp_path):
    for config in GRID:
        place = tmp_path / "sweep" / cells.name(config)
        files.write_json(place / "record.json", record(config))
    whole = tinylm("fit", tmp_path / "sweep", "--json").stdout
    shutil.move(place, tmp_path / "moved")
    place.symlink_to("../moved")
    (tmp_path / "sweep/round").symlink_to(".")
    assert tinylm("fit", tmp_path / "sweep", "--json").stdout == whole
    moved = tmp_path / "moved/record.json"
    moved.write_text(moved.read_text().replace('"tokens": ', '"tokens": 1'))
    found = tinylm("verify", tmp_path / "sweep")
    assert found.returncode == 1 and str(place / "record.json") in found.stdout


def test_runs_that_a_sweep_lists_and_has_not_are_said_wherever_the_list_lies(tmp_path):
    for config in GRID[1:]:
        files.write_json(tmp_path / "runs" / cells.name(config) / "record.json", record(config))
    files.write_json(tmp_path / "runs/sweep.json", {"runs": {cells.name(c): {} for c in GRID}})
    lost = str(tmp_path / "runs" / cells.name(GRID[0]) / "record.json")
    assert lost in tinylm("fit", tmp_path).stderr.replace("\n", "")
    assert json.loads(tinylm("verify", tmp_path, "--json").stdout)["unfinished"] == [lost]
    files.write_json(tmp_path / "runs/sweep.json", {"runs": [1]})
    assert "lists no runs by name" in tinylm("fit", tmp_path).stderr


@pytest.mark.parametrize("name", ["record.json", "metrics.jsonl", "timing.jsonl",
                                  "checkpoints/step-00000009/MANIFEST.json"])
def test_one_file_is_verified_by_its_seal_or_by_what_lists_it(copy, name):
    place = copy / "a" / name
    assert tinylm("verify", place).returncode == 0
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    found = tinylm("verify", place)
    assert found.returncode == 1 and name in found.stdout
    stranger = tinylm("verify", copy / "stories.txt")
    assert stranger.returncode == 2 and "in no manifest or record" in stranger.stderr


@pytest.mark.parametrize(("change", "said"), [
    ({"config": []}, "is no record of ours"), ({"kind": 7}, "is no record of ours"),
    ({"files": [1]}, "is no record of ours"),
    ({"files": {"/dev/zero": "x"}}, "is not inside it"),
    ({"files": {"../../x": "x"}}, "is not inside it")])
def test_a_record_that_was_made_up_is_refused_in_a_line(copy, change, said):
    place = copy / "a/record.json"
    files.write_json(place, files.read_json(place) | change)
    done = trained(copy / "a", "--text", copy / "stories")
    assert done.returncode == 2 and said in done.stderr
    found = tinylm("verify", copy / "a")
    assert found.returncode == 1 and ("is no record" in found.stdout or said in found.stdout)


def test_a_sealed_checkpoint_that_orbax_cannot_read_is_refused_in_a_line(copy):
    place = copy / "a/checkpoints/step-00000009"
    facts = {k: v for k, v in files.read_json(place / files.MANIFEST).items() if k != "files"}
    (place / "params/_METADATA").write_text(json.dumps({"a": {"a": 1}}))
    files.seal(place, **facts)
    for verb in (("eval", copy / "a"), ("verify", copy / "a", "--json")):
        done = tinylm(*verb)
        assert done.returncode == 2 and "is no checkpoint that can be read" in done.stderr, verb


def test_the_forecast_of_any_folder_is_made_again_from_its_runs(tmp_path):
    for config in GRID:
        files.write_json(tmp_path / "runs" / cells.name(config) / "record.json",
                         {**record(config), "versions": {}})
    place = tmp_path / "mine.json"
    assert tinylm("forecast", tmp_path, "--flops", 5e12, "--out", place).returncode == 0
    done = tinylm("replay", place, "--runs", tmp_path)
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout + done.stderr
    far = tmp_path / "far.json"
    assert "the budgets span" in tinylm("forecast", tmp_path, "--flops", 5e14, "--out", far).stdout
    assert tinylm("replay", far, "--runs", tmp_path).returncode == 0
    assert "name the folder of its runs" in tinylm("replay", place).stderr
    place.write_text(place.read_text().replace('"name": "target"', '"name": "better"'))
    assert tinylm("verify", tmp_path).returncode == 1
    assert tinylm("verify", place).returncode == 1


def test_only_our_own_drafts_are_swept_out(tmp_path):
    mine, ours = tmp_path / ".venv.old/lib", tmp_path / ".record.json.4711.tmp"
    mine.mkdir(parents=True)
    for path in (tmp_path / ".notes.tmp", ours):
        path.write_text("x")
    with leases.hold(tmp_path):
        assert mine.exists() and (tmp_path / ".notes.tmp").exists() and not ours.exists()


def test_a_folder_that_is_deleted_under_its_writer_is_said(tmp_path):
    place = tmp_path / "run"
    with pytest.raises(OSError, match="was deleted or replaced while this process"), \
            leases.hold(place):
        shutil.rmtree(place)
        place.mkdir()
        raise files.Damaged("config.json is missing")
    with pytest.raises(OSError, match="was deleted or replaced"), leases.hold(place):
        shutil.rmtree(place)


def test_a_finished_run_is_shown_on_a_disk_that_nobody_can_write_to(copy):
    def refused(path, *args):
        if str(path).endswith(".lease"):
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, *args)

    opened = os.open
    with mock.patch.object(leases.os, "open", refused):
        done = trained(copy / "a", "--text", copy / "stories")
    assert done.returncode == 0 and "nats a token" in done.stdout


@pytest.mark.parametrize("words", [("--out", ""), ("--out=",)])
def test_an_empty_place_is_not_this_folder(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = tinylm("train", *words, *SMALL)
    assert done.returncode == 2 and "--out is empty" in done.stderr
    assert not list(tmp_path.iterdir())


def test_endless_and_swelling_files_are_refused(tmp_path):
    (tmp_path / "z.csv").symlink_to("/dev/zero")
    assert "is a device" in tinylm("fit", tmp_path / "z.csv").stderr
    with pytest.raises(BadInput, match="is a device"):
        lines.text_of(tmp_path / "z.csv")
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"ba " * 10_000_000))
    with mock.patch("tinylm.text.lines.UNPACKED", 1e5):
        done = tinylm("train", "--out", tmp_path / "x", "--corpus", tmp_path / "bomb.txt.gz")
    assert done.returncode == 2 and "unpacks to more than" in done.stderr
