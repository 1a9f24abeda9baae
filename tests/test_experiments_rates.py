"""The rate and vocabulary experiments run whole at toy size and write the table they promise."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_stages_pretrain import story

ROOT = Path(__file__).parent.parent
TOYS = {
    "rate_rule": ("--rates", "0.002", "0.004", "--cells", "8", "2e8", "--V", "128", "--csv"),
    "vocab_size": ("--cells", "100", "8", "128", "8", "--flops", "2e8", "--csv"),
    "lr_by_width": ("--widths", "8", "16", "--seeds", "1", "--steps", "20", "--V", "128",
                    "--results"),
}


@pytest.mark.parametrize("name", TOYS)
def test_the_experiment_runs_at_toy_size_and_writes_its_table(tmp_path, name):
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(story(n, 80) for n in range(40)))
    place = tmp_path if name == "lr_by_width" else tmp_path / f"{name}.csv"
    command = [sys.executable, str(ROOT / f"experiments/{name}.py"), "--out",
               str(tmp_path / "runs"), "--corpus", str(text), *TOYS[name], str(place)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    assert len({row["id"] for row in rows}) == len(rows) == (10 if name == "lr_by_width" else 2)
    if name == "lr_by_width":
        summary = json.loads((tmp_path / "lr_by_width.json").read_text())
        assert summary["factor_smallest_to_largest"] >= 1
