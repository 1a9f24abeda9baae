"""The same faults below every library, Orbax's threads included, in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_kills import came_to
from test_stages_pretrain import story

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")]


def compiled(folder: Path) -> Path:
    """Compile what stands between a process and its system; give the library to preload."""
    shim, source = folder / "shim.so", Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
    return shim


class Shimmed:
    """A training command that can be run on a failing disk."""

    def __init__(self, folder: Path):
        self.folder, self.shim = folder, compiled(folder)
        (folder / "stories.txt").write_text("\n".join(story(n, 30) for n in range(20)))

    def run(self, out: Path, kind: str = "crash", at: int = 0) -> tuple[int, str, int]:
        """Train into `out` with a fault at an operation; give exit code, words, operations."""
        count = self.folder / "count"
        env = {**os.environ, "LD_PRELOAD": str(self.shim), "FAULT_FOLDER": str(out),
               "FAULT_KIND": kind, "FAULT_AT": str(at), "FAULT_COUNT": str(count)}
        command = [sys.executable, "-m", "tinylm", "train", "--out", out, "--corpus",
                   self.folder / "stories.txt", "--model.V", "96", "--model.D", "8", "--model.T",
                   "32", "--batch", "64", "--steps", "20"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, done.stderr, int(count.read_text())


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory):
    made = Shimmed(tmp_path_factory.mktemp("shimmed"))
    code, said, count = made.run(made.folder / "whole")
    assert code == 0 and count > 50, said
    return made, came_to(made.folder / "whole"), count


@pytest.mark.parametrize("kind", ["crash", "torn", "full", "broken"])
def test_a_fault_below_every_library_loses_nothing(shimmed, tally, tmp_path, kind):
    made, expected, count = shimmed
    trials = tally.many(2, 25)
    for at in tally.rng.choice(count, trials, replace=False) + 1:
        out = made.folder / "run"
        code, said, _ = made.run(out, kind, int(at))
        what = f"--draw {tally.seed}: {kind} at {at} of {count}: {code} {said}"
        if kind in ("crash", "torn"):
            assert code in (-9, 0), what
        elif code:
            told = said.partition("held out\n")[2]
            assert code == 1 and told.startswith("failed: ") and told.count("\n") == 1, what
            assert str(out) in told, what
        code, said, _ = made.run(out)
        assert code == 0, f"{what}; then {said}"
        assert came_to(out) == expected, what
        shutil.rmtree(out)
    tally(f"train: {kind} below every library", trials, "same bits")
