"""kill -9 at random moments of whole commands: they go on to the bits of the undisturbed one."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_stages_pretrain import story

from tinylm import files, machine
from tinylm.train import checkpoint
from tinylm.verbs.care import CLOCKS

MODEL = ("--model.V", 96, "--model.D", 8, "--model.T", 32, "--batch", 64)
COMMANDS = {
    "tokenizer": ("tokenizer", "--out", "OUT", "--corpus", "long.txt", "--V", 700),
    "train": ("train", "--out", "OUT", "--corpus", "stories.txt", *MODEL, "--steps", 400),
    "sweep": ("sweep", "--out", "OUT", "--text", "base/text", "--budgets", 4e8, 8e8, "--widths", 8,
              12, 16, 24, 32, "--per-budget", 4, "--spread", 8, *MODEL[:2], *MODEL[4:]),
    "sft": ("sft", "base", "--out", "OUT", "--data", "talks.jsonl", "--steps", 600),
    "grpo": ("grpo", "sft", "--out", "OUT", "--family", "choice", "--policy.rollouts", 30,
             "--policy.budget", 4, "--policy.prompts", 2, "--policy.responses", 2)}
LONG = {"tokenizer": 100, "train": 100, "sweep": 100, "sft": 30, "grpo": 30}


class Workshop:
    """A folder in which commands run as processes of their own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, words: tuple, **env: str) -> subprocess.Popen:
        """Start a command, in a session of its own so that its workers can be killed with it."""
        command = [sys.executable, "-m", "tinylm", *(str(w) for w in words)]
        with open(self.folder / "said.txt", "w") as said:
            return subprocess.Popen(command, cwd=self.folder, start_new_session=True,
                                    env=os.environ | env, stdout=said, stderr=said)

    def said(self) -> str:
        """Give the end of what the last command said."""
        return (self.folder / "said.txt").read_text()[-2000:]

    def begin(self, command: tuple, name: str) -> tuple:
        """Bind a new run to many checkpoints, as its own plan would not at this size."""
        out, rows = self.folder / name, {"train": 2, "sft": 16, "grpo": 4}.get(command[0])
        if rows:
            plan = machine.plan_for(rows, 32, 8, "f32", "cpu", 2)
            every = dataclasses.replace(plan, chunk=16, checkpoint_every=32)
            files.write_json(out / "plan.json", dataclasses.asdict(every))
        return tuple(name if word == "OUT" else word for word in command)


def came_to(folder: Path) -> dict[str, str]:
    """Hash all that a command leaves but clocks, and look for litter."""
    every = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    assert not [p for p in folder.rglob("*") if p.suffix in (".tmp", ".old")]
    found = {str(p.relative_to(folder)): files.sha256(p) for p in every
             if p.name not in (*CLOCKS, ".lease", "environment.json") and p.suffix != ".log"
             and "checkpoints" not in p.parts}
    for saves in folder.rglob("checkpoints"):
        found[str(saves.relative_to(folder))] = checkpoint.params_sha256(saves)
    return found


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """With a corpus, conversations, and a run that is tuned on them."""
    shop = Workshop(tmp_path_factory.mktemp("workshop"))
    (shop.folder / "stories.txt").write_text("\n".join(story(n, 200) for n in range(40)))
    (shop.folder / "long.txt").write_text("\n".join(story(n, 600) for n in range(200)))
    (shop.folder / "talks.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": a}, {"role": "assistant", "content": a + b}]}) + "\n"
        for a in "bdgkl" for b in "aeiou"))
    for made in (("train", "--out", "base", "--corpus", "stories.txt", "--model.V", 96,
                  "--model.D", 8, "--model.T", 128, "--batch", 256, "--steps", 4),
                 ("sft", "base", "--out", "sft", "--data", "talks.jsonl", "--steps", 2)):
        assert shop.start(made).wait() == 0, shop.said()
    return shop


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(COMMANDS))
def test_a_command_killed_at_random_moments_comes_to_the_same_bits(workshop, tally, kind):
    whole = workshop.folder / f"whole-{kind}"
    words = workshop.begin(COMMANDS[kind], whole.name)
    began = time.monotonic()
    assert workshop.start(words).wait() == 0, workshop.said()
    took, expected = time.monotonic() - began, came_to(whole)
    wanted = tally.many(1, LONG[kind])
    kills = ends = 0
    while kills < wanted or not ends:
        out = workshop.folder / f"killed-{kind}"
        words = workshop.begin(COMMANDS[kind], out.name) if not out.exists() else words
        running = workshop.start(words)
        try:
            after = float(tally.rng.uniform(0.3 * took, 1.0 * took)) if kills < wanted else 600
            code = running.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            kills += 1
            continue
        assert code == 0, f"--draw {tally.seed}, after {kills} kills: {workshop.said()}"
        assert came_to(out) == expected, f"--draw {tally.seed}, after {kills} kills"
        ends += 1
        shutil.rmtree(out)
    tally(f"{kind}: kill -9 at random moments", kills, f"same bits, {ends} times to the end")
