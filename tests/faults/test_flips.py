"""One flipped bit, a cut, an emptied or a missing file, met by what a user would run next.

Nothing passes in silence: a command refuses and names the file, or it announces what it passes by
and comes to the same bits.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from command import tinylm
from test_stages_pretrain import story
from test_verbs_planted import GRID, record
from test_writes import came_to, trained

from tinylm import files
from tinylm.sweep import cells
from tinylm.train import loop
from tinylm.verbs.care import CLOCKS

SMALL = ("--model.V", 96, "--model.D", 8, "--model.T", 128, "--batch", 128, "--steps", 9)
HARMS = ("cut", "empty", "missing")  # and a flipped bit, any number of times


class World:
    """A folder with an artefact of every kind, and what a user would do with each."""

    def __init__(self, folder: Path):
        self.folder, self.corpus = folder, folder / "stories.txt"
        self.corpus.write_text("\n".join(story(n, 30) for n in range(20)))
        (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": [
            {"role": "user", "content": a}, {"role": "assistant", "content": a + b}]}) + "\n"
            for a in "bdgkl" for b in "aeiou"))
        (folder / "ranked.jsonl").write_text("".join(json.dumps({
            "prompt": a, "chosen": a + a, "rejected": b}) + "\n" for a in "bdgkl" for b in "ae"))
        files.write_json(folder / "sweep/sweep.json", {"runs": {cells.name(c): {} for c in GRID}})
        for config in GRID:
            files.write_json(folder / "sweep" / cells.name(config) / "record.json", record(config))
        files.append_row(folder / "sweep/workers.jsonl", {"workers": 2, "wall_seconds": 1.0})
        self.again = {
            "run": ("train", "--out", folder / "run", "--text", folder / "text", *SMALL),
            "sft": ("sft", folder / "run", "--out", folder / "sft", "--data",
                    folder / "talks.jsonl", "--steps", 2),
            "reward": ("reward", folder / "sft", "--out", folder / "reward", "--data",
                       folder / "ranked.jsonl", "--steps", 2),
            "grpo": ("grpo", folder / "sft", "--out", folder / "grpo", "--family", "choice",
                     "--policy.rollouts", 2, "--policy.budget", 4, "--policy.prompts", 2,
                     "--policy.responses", 2)}
        self.loads = {
            "text": [self.again["run"]],
            "run": [("sample", folder / "run", "--prompt", "Ba"), self.again["run"]],
            "sft": [("chat", folder / "sft", "--prompt", "a"), self.again["sft"]],
            "reward": [("best-of-n", folder / "sft", "--reward", folder / "reward", "--family",
                        "choice", "--count", 8, "--samples", 8, "--n", 2, "--budget", 16),
                       self.again["reward"]],
            "grpo": [("chat", folder / "grpo", "--prompt", "a"), self.again["grpo"]],
            "sweep": [("fit", folder / "sweep")],
            "forecast.json": [("check", folder / "forecast.json", folder / "run")]}
        self.ok(trained(self.corpus, folder / "whole"))
        shutil.copytree(folder / "whole/text", folder / "text")
        self.ok(tinylm(*self.again["run"]))
        self.ok(tinylm("forecast", folder / "sweep", "--flops", 5e12, "--out",
                       folder / "forecast.json"))
        self.whole = came_to(folder / "whole")
        with stopping(4):
            assert trained(self.corpus, folder / "begun").returncode == 75
        assert len(list(folder.glob("begun/checkpoints/step-*"))) == 2

    def ok(self, done: subprocess.CompletedProcess) -> None:
        """Fail with what a command said, unless it went well."""
        assert done.returncode == 0, done.stderr

    def kept(self, kind: str) -> list[Path]:
        """List the files of an artefact that anything is read from again."""
        place = self.folder / kind
        found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        return [p for p in found if p.name != ".lease"]


@contextlib.contextmanager
def stopping(after: int) -> Iterator[None]:
    """Let a signal come after so many chunks."""
    @contextlib.contextmanager
    def signals():
        asked = iter([False] * (after - 1))
        yield lambda: next(asked, True)

    with mock.patch.object(loop, "_signals", signals):
        yield


@contextlib.contextmanager
def harmed(path: Path, harm: str, rng: np.random.Generator, mend: bool = True) -> Iterator[str]:
    """Do one kind of harm to a file, yield it in words, and make the file good again."""
    whole = path.read_bytes()
    data, said = bytearray(whole), f"{harm} of {path}"
    if harm == "flip":
        bit = int(rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        said = f"bit {bit} of {path} flipped"
    try:
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes({"cut": data[:len(data) // 2], "empty": b""}.get(harm, data))
        yield said
    finally:
        if mend:
            path.write_bytes(whole)


def harms(path: Path, flips: int) -> list[str]:
    """Name what is done to a file: an empty one can only be missing."""
    return [*HARMS, *["flip"] * flips] if path.stat().st_size else ["missing"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", [
    "text", "run", "sweep", "forecast.json",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sft", "reward", "grpo"))])
def test_harm_to_what_is_finished_is_named_by_the_next_command(world, tally, kind):
    trials = flips = 0
    if kind in ("sft", "reward", "grpo"):
        for made in dict.fromkeys(("sft", kind)):
            world.ok(tinylm(*world.again[made]))
    for path in tally.chosen(world.kept(kind), 20):
        for harm in harms(path, tally.many(1, 66)):
            if path.name in CLOCKS and harm in HARMS:  # rows of clocks may be thrown away
                continue
            with harmed(path, harm, tally.rng) as what:
                loads = [("verify", path.parent)] if path.name in CLOCKS else world.loads[kind]
                done = [tinylm(*load) for load in loads]
                place = str(path.relative_to(world.folder))
                named = [d for d in done if (d.returncode in (1, 2) or harm == "missing") and (
                    place in (said := d.stderr.replace("\n", "") + d.stdout)
                    or f"{path.parent} is no finished run (no {path.name})" in said)]
                assert named, f"--draw {tally.seed}: {what}, and in silence: " + " | ".join(
                    d.stderr for d in done)
            trials, flips = trials + 1, flips + (harm == "flip")
    for load in world.loads[kind]:
        assert kind == "forecast.json" or tinylm(*load).returncode == 0
    tally(f"{kind}: a flipped bit, a cut, an emptied, a missing file", trials,
          f"named each time; {flips} of them single bits")


@pytest.mark.slow
def test_harm_to_a_run_that_goes_on_is_named_or_announced_and_comes_to_the_same_bits(
        world, tally, tmp_path):
    begun, out = world.folder / "begun", tmp_path / "begun"
    newest = max(begun.glob("checkpoints/step-*"))
    trials = flips = announced = 0
    for path in tally.chosen([p for p in world.kept("begun") if p.name not in CLOCKS], 30):
        for harm in harms(path, tally.many(1, 15)):
            shutil.copytree(begun, out, symlinks=True)
            with harmed(out / path.relative_to(begun), harm, tally.rng, mend=False) as what:
                done = trained(world.corpus, out)
            said = f"--draw {tally.seed}: {what}: {done.stderr}"
            if done.returncode == 0:  # an older checkpoint is not looked at
                assert came_to(out) == world.whole, said
                assert path.name in done.stderr or "checkpoints" in path.parts, said
                assert path.name in done.stderr or newest not in path.parents, said
                announced += "passing by a damaged checkpoint" in done.stderr
            else:
                assert done.returncode == 2 and path.name in done.stderr, said
            shutil.rmtree(out)
            trials, flips = trials + 1, flips + (harm == "flip")
    assert announced or not tally.place  # a sample may hold no newest checkpoint
    tally("begun run: a flipped bit, a cut, an emptied, a missing file", trials,
          f"named, or announced ({announced}) and the same bits; {flips} of them single bits")
