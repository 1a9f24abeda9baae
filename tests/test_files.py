"""Files appear whole or not at all, and a changed bit is named."""

import json
import os
import re
from pathlib import Path

import pytest

from tinylm import files


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"new": 2})
    assert files.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.staged(tmp_path / "out") as draft:
        (draft / "half").write_bytes(b"x")
        raise RuntimeError("died")
    assert list(tmp_path.iterdir()) == []
    with files.staged(tmp_path / "out", step=3) as draft:
        (draft / "whole").write_bytes(b"x")
    assert files.verified(tmp_path / "out")["step"] == 3


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "delete", "add", "link"])
def test_every_harm_to_a_sealed_folder_is_named(tmp_path, harm):
    with files.staged(tmp_path / "out") as draft:
        (draft / "sub").mkdir()
        (draft / "sub/data").write_bytes(bytes(range(200)))
    path = tmp_path / "out/sub/data"
    data = bytearray(path.read_bytes())
    match harm:
        case "flip":
            data[77] ^= 4
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-1])
        case "empty":
            path.write_bytes(b"")
        case "delete":
            path.unlink()
        case "add":
            (tmp_path / "out/new").write_bytes(b"x")
        case "link":
            path.unlink()
            (tmp_path / "target").write_bytes(data)
            path.symlink_to(tmp_path / "target")
    with pytest.raises(files.Damaged, match="new" if harm == "add" else "data"):
        files.verified(tmp_path / "out")


def test_a_damaged_folder_is_told_in_one_line_with_one_path_and_one_remedy(tmp_path):
    for text in (None, "[", '{"files": 3}'):
        if text:
            (tmp_path / files.MANIFEST).write_text(text)
        with pytest.raises(files.Damaged) as told:
            files.verified(tmp_path)
        words = str(told.value)
        assert words.count(files.MANIFEST) == 1 and words.count(";") == 1
        assert words.endswith(f"; delete {tmp_path} and run again")


@pytest.mark.parametrize("text", ["", "[", '{"files": 3}', '{"files": {"a": 1}}', "[" * 100_000])
def test_a_hostile_manifest_is_damaged_not_a_traceback(tmp_path, text):
    (tmp_path / files.MANIFEST).write_text(text)
    with pytest.raises(files.Damaged):
        files.verified(tmp_path)


def test_any_changed_bit_of_a_json_file_is_seen(tmp_path):
    path = tmp_path / "law.json"
    files.write_json(path, {"a": 1e-5, "words": "né", "list": [1, 2.5, None], "deep": {"b": True}})
    whole = path.read_bytes()
    assert files.read_json(path)["a"] == 1e-5
    for bit in range(8 * len(whole)):
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        with pytest.raises(files.Damaged, match=r"law\.json"):
            files.read_json(path)
    files.write_json(path, {})
    assert files.read_json(path) == {}
    path.write_text('{"a": 1e-05}\n')
    with pytest.raises(files.Damaged, match="changed"):
        files.read_json(path)


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_every_file_is_hashed_however_many_threads_share_the_large_ones(
        tmp_path, monkeypatch, cores):
    monkeypatch.setattr(files.os, "cpu_count", lambda: cores)
    names = ["a/large", "a/larger", "largest", "small"]
    with files.staged(tmp_path / "sealed") as folder:
        (folder / "a").mkdir()
        for n, name in enumerate(names):
            (folder / name).write_bytes(bytes([n]) * (1 << 20 - 8 * (n == 3)) * (n + 1))
    folder = tmp_path / "sealed"
    assert files.problems(folder) == []
    for name in names:
        with open(folder / name, "r+b") as f:
            f.write(b"x")
    assert files.problems(folder) == [
        f"{folder / name} has other bytes than its manifest's sha256" for name in names]


def test_a_log_whose_kept_rows_were_edited_is_damaged(tmp_path):
    log = tmp_path / "metrics.jsonl"
    size = files.append_lines(log, ["abc"])
    sha = files.sha256(log)
    files.append_lines(log, ["def"])
    files.truncate(log, size, sha)
    assert log.read_text() == "abc\n"
    log.write_text("abd\n")
    with pytest.raises(files.Damaged, match="other bytes"):
        files.truncate(log, size, sha)


def test_a_log_cut_back_forgets_what_followed_its_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    size = files.append_lines(log, ['{"step": 1}'])
    files.append_lines(log, ['{"step": 2}'])
    files.truncate(log, size)
    assert files.read_lines(log) == [{"step": 1}]
    with pytest.raises(files.Damaged, match="shorter"):
        files.truncate(log, 1000)


def test_what_is_written_is_on_the_disk_before_it_is_said_to_be(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (
        done.append(os.fstat(handle).st_ino), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    files.write_text(tmp_path / "whole", "text")
    assert done == [(tmp_path / "whole").stat().st_ino, "renamed", tmp_path.stat().st_ino]
    for write in (lambda p: files.append_lines(p, ["a line"]),
                  lambda p: files.append_row(p, {"a": 1}), lambda p: files.truncate(p, 0)):
        done.clear()
        write(tmp_path / "log")
        assert done == [(tmp_path / "log").stat().st_ino]
    done.clear()
    with files.staged(tmp_path / "folder") as draft:
        (draft / "part").write_text("text")
    part, manifest = ((tmp_path / "folder" / n).stat().st_ino for n in ("part", files.MANIFEST))
    assert done.index(part) < done.index(manifest) < len(done) - 1 - done[::-1].index("renamed")
    assert done[-1] == tmp_path.stat().st_ino


def test_every_flipped_bit_of_a_log_of_rows_is_met_by_readers_and_writers(tmp_path):
    log = tmp_path / "log.jsonl"
    files.append_row(log, {"a": 1})
    files.append_row(log, {"b": "two"})
    whole = log.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        log.write_bytes(data)
        with pytest.raises(files.Damaged, match="log.jsonl:[12] was changed"):
            files.read_rows(log)
    with pytest.raises(files.Damaged, match="log.jsonl:2 was changed"):  # the last line's end
        files.append_row(log, {"c": 3})


def test_a_row_torn_off_by_a_kill_is_cut_by_the_next_writer(tmp_path):
    log = tmp_path / "log"
    files.append_row(log, {"a": 1})
    log.write_bytes(log.read_bytes() + b'{"a": 2, "sh')
    assert files.read_rows(log) == [{"a": 1}]  # a torn last one is none yet
    files.append_row(log, {"a": 3})
    assert files.read_rows(log) == [{"a": 1}, {"a": 3}]


def test_a_changed_row_of_a_log_and_a_file_of_another_size_are_told_as_that(tmp_path):
    log = tmp_path / "log"
    files.append_row(log, {"a": 1})
    files.append_row(log, {"a": 2})
    log.write_bytes(log.read_bytes().replace(b'"a": 1', b'"a": 7'))
    with pytest.raises(files.Damaged, match="log:1 was changed"):
        files.read_rows(log)
    with files.staged(tmp_path / "folder") as draft:
        (draft / "part").write_text("text")
    (tmp_path / "folder/part").write_text("tex")
    assert "has 3 bytes, its manifest says 4" in files.problems(tmp_path / "folder")[0]


def test_files_that_a_record_lists_are_told_apart_missing_or_changed(tmp_path):
    for name in ("same", "other"):
        (tmp_path / name).write_text(name)
    sha = files.sha256(tmp_path / "same")
    assert files.changed(tmp_path, {"same": sha, "other": sha, "gone": sha}) == [
        f"{tmp_path}/other has other bytes than its record says",
        f"{tmp_path}/gone is missing, and its record lists it"]


def test_the_readme_tells_the_recorded_faults():
    root = Path(__file__).parents[1]
    rows = [json.loads(line) for line in
            (root / "experiments/results/faults.jsonl").read_text().splitlines()]
    harms = [row for row in rows if "a flipped bit" in row["faults"]]
    bits = sum(int(re.search(r"(\d+) of them single bits", row["found"])[1]) for row in harms)
    kills = [row["trials"] for row in rows if "kill -9" in row["faults"]]
    assert bits >= 10_000 and sorted(kills) == [30, 30, 100, 100, 100]
    told = (root / "README.md").read_text()
    others = sum(row["trials"] for row in harms) - bits
    assert f"| {bits:,} |" in told and f"| {others:,} |" in told
