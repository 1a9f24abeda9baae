"""A run goes on to the same bits on fewer cores, in another zone, language and hash order, and with
a clock that was set back a day.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_kills import COMMANDS, Workshop, came_to
from test_shim import compiled
from test_stages_pretrain import story

SMALL = (*COMMANDS["train"][:-1], 96)
LARGE = ("train", "--out", "OUT", "--corpus", "words.txt", "--model.V", 4096, "--model.D", 256,
         "--model.L", 2, "--model.T", 128, "--batch", 2048, "--steps", 24)
CHANGES = {
    "one core": {},
    "another time zone": {"TZ": "Pacific/Kiritimati"},
    "an ASCII locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "another hash seed": {"PYTHONHASHSEED": "7"},
    "a clock a day back": {"CLOCK_SHIFT": "-86400"}}


class World(Workshop):
    """Commands that are begun in one world and go on in another."""

    def __init__(self, folder):
        super().__init__(folder)
        self.shim = ""
        if shutil.which("cc"):
            self.shim = str(compiled(folder))
            told = subprocess.run([sys.executable, "-c", "import time; print(time.time())"],
                                  env=os.environ | self.preloaded(), capture_output=True, text=True)
            assert 86_000 < time.time() - float(told.stdout) < 86_500, told
        (folder / "stories.txt").write_text("\n".join(
            "Übermut ist — ∞ — " + story(n, 200) for n in range(40)), encoding="utf-8")
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8)))
                 for _ in range(8000)]
        (folder / "words.txt").write_text("\n".join(
            " ".join(draw.choices(words, k=300)) for _ in range(200)))

    def preloaded(self) -> dict[str, str]:
        """Give what sets a process's clock a day back."""
        return CHANGES["a clock a day back"] | {"LD_PRELOAD": self.shim}

    def changed(self, words: tuple, changes: tuple[str, ...]):
        """Start a command in a world with these changes."""
        env = {name: value for change in changes for name, value in CHANGES[change].items()}
        if "CLOCK_SHIFT" in env:
            env |= self.preloaded()
        kept = os.sched_getaffinity(0)
        try:
            if "one core" in changes:
                os.sched_setaffinity(0, {min(kept)})
            return self.start(words, **env)
        finally:
            os.sched_setaffinity(0, kept)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


CASES = [(tuple(CHANGES), SMALL), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    *(((change,), SMALL) for change in CHANGES), (("one core",), LARGE)))]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken away here")
@pytest.mark.parametrize(("changes", "command"), CASES)
def test_another_world_comes_to_the_same_bits(world, tally, changes, command):
    if "a clock a day back" in changes and not world.shim:
        pytest.skip("there is no C compiler")
    width = command[command.index("--model.D") + 1]
    whole = world.folder / f"whole-{width}"
    if not whole.exists():
        assert world.start(world.begin(command, whole.name)).wait() == 0, world.said()
    expected = came_to(whole)
    out = world.folder / "moved"
    words = world.begin(command, out.name)
    running = world.start(words)
    until = time.monotonic() + 300
    while not any(out.glob("checkpoints/step-*/MANIFEST.json")):
        assert running.poll() is None and time.monotonic() < until, world.said()
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (out / "record.json").exists()
    assert world.changed(words, changes).wait() == 0, world.said()
    assert came_to(out) == expected, changes
    shutil.rmtree(out)
    tally(f"train, D={width}: killed, goes on with {', '.join(changes)}", 1, "same bits")
