"""The smoke study: a text file in, a report out, through every stage; and again, at once."""

import bz2
import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from command import ROOT, experiment
from test_stages_pretrain import story

from tinylm import files
from tinylm.sweep.times import stages


def started(*args: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "experiments/study.py"), *map(str, args)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=ROOT, env=env)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A study that was killed in its sweep and given again, and what was done by then."""
    folder = tmp_path_factory.mktemp("studies")
    text, more = folder / "stories.txt", folder / "more.jsonl.bz2"
    text.write_text("\n".join(story(n, 80) for n in range(40)))
    more.write_bytes(bz2.compress("".join(
        json.dumps({"text": story(n, 80)}) + "\n" for n in range(40, 60)).encode()))
    args = ("--preset", "smoke", "--corpus", text, more, "--out", folder / "smoke")
    with started(*args) as first:
        until = time.monotonic() + 900
        while not (records := list((folder / "smoke/sweep").glob("*/record.json"))):
            assert first.poll() is None and time.monotonic() < until, first.communicate()[1][-3000:]
            time.sleep(0.1)
        first.kill()
    before = {path: path.read_bytes() for path in records}
    with started(*args) as second:
        said = second.communicate(timeout=900)[1]
    assert second.returncode == 0, said[-3000:]
    return folder, args, said, before


def test_the_smoke_study_goes_from_a_text_file_to_a_report(finished):
    folder, _, said, _ = finished
    assert "stories.txt" in said and "more.jsonl.bz2" in said
    score = files.read_json(folder / "smoke/score.json")
    record = files.read_json(folder / "smoke/target/record.json")
    assert record["config"]["forecast_sha256"] == files.sha256(folder / "smoke/forecast.json")
    assert score["measured"] == record["loss"]["nats_per_token"]
    assert len((folder / "forecasts.csv").read_text().splitlines()) == 2
    page = (folder / "smoke/report.html").read_text()
    assert f"{score['error_percent']:.2f}" in page
    assert "http://" not in page and "https://" not in page


def test_every_stage_says_what_it_took(finished):
    folder, *_ = finished
    took = stages(folder / "smoke")
    assert list(took) == ["text", "baselines", "rate check", "sweep", "forecast", "held-out run",
                          "growth", "chat", "report"]
    assert took["sweep"][0] > 1 and took["sweep"][1] > 1
    page = (folder / "smoke/report.html").read_text()
    assert "processor minutes" in page and "held-out run" in page


def test_what_was_done_when_a_study_was_killed_stays_done(finished):
    *_, before = finished
    assert before and {path: path.read_bytes() for path in before} == before


def test_a_dry_run_lists_every_run_with_what_follows_the_sweep(finished):
    _, args, *_ = finished
    done = experiment("study", *args, "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("│")[1].strip() for line in done.stderr.splitlines() if line[:1] == "│"]
    assert Counter(rows) == {"sweep": 12, "position": 1, "held-out": 1, "chat": 1}


def test_the_same_command_again_changes_nothing(finished):
    folder, args, *_ = finished
    before = {p: p.read_bytes() for p in (folder / "smoke").rglob("record.json")}
    done = experiment("study", *args)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.read_bytes() for p in (folder / "smoke").rglob("record.json")} == before
    assert len((folder / "forecasts.csv").read_text().splitlines()) == 2
