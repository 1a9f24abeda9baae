"""The smoke study: a text file in, a report out, through every stage; and again, at once."""

import os
import subprocess
import sys

import pytest
from command import ROOT, experiment
from test_stages_pretrain import story

from tinylm import files


def study(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments/study.py"), *args]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400, env=env)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    text = folder / "stories.txt"
    text.write_text("\n".join(story(n, 80) for n in range(60)))
    done = study("--preset", "smoke", "--corpus", str(text), "--out", str(folder / "smoke"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, text, done


def test_the_smoke_study_goes_from_a_text_file_to_a_report(finished):
    folder, text, done = finished
    assert "stories.txt" in done.stderr
    score = files.read_json(folder / "smoke/score.json")
    record = files.read_json(folder / "smoke/target/record.json")
    assert record["config"]["forecast_sha256"] == files.sha256(folder / "smoke/forecast.json")
    assert score["measured"] == record["loss"]["nats_per_token"]
    assert len((folder / "forecasts.csv").read_text().splitlines()) == 2
    page = (folder / "smoke/report.html").read_text()
    assert f"{score['error_percent']:.2f}" in page
    assert "http://" not in page and "https://" not in page


def test_the_same_command_again_changes_nothing(finished):
    folder, text, _ = finished
    before = {p: p.read_bytes() for p in (folder / "smoke").rglob("record.json")}
    done = experiment("study", "--preset", "smoke", "--corpus", text, "--out", folder / "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.read_bytes() for p in (folder / "smoke").rglob("record.json")} == before
    assert len((folder / "forecasts.csv").read_text().splitlines()) == 2
