"""Ten thousand runs are read in seconds, and a damaged one among them is named, not averaged in."""

import time

import pytest
from command import tinylm
from test_verbs_planted import GRID, record

from tinylm import files
from tinylm.sweep import cells
from tinylm.verbs import folders


@pytest.mark.slow
def test_ten_thousand_runs_are_listed_in_five_seconds(tmp_path, tally):
    for n in range(10_000):
        config = GRID[n % len(GRID)]
        place = tmp_path / f"{n // 100:02d}" / f"{cells.name(config)}-{n}"
        place.mkdir(parents=True)
        (place / "record.json").write_text(files._sealed_text(record(config)))
    began = time.monotonic()
    assert len(folders.records(tmp_path)) == 10_000
    took = time.monotonic() - began
    bad = place / "record.json"
    bad.write_text(bad.read_text().replace('"tokens": ', '"tokens": 1'))
    refused = tinylm("fit", tmp_path)
    assert refused.returncode == 2 and str(bad) in refused.stderr
    assert took < 5, f"{took:.1f} s for 10,000 runs"
    tally("10,000 runs, one of them damaged", 1, f"read and fitted in {took:.1f} s, named")
