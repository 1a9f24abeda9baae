"""A crash, a torn write, a full and a broken disk at every N-th operation; then the run again."""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from unittest import mock

import pytest
from command import tinylm
from disk import Crash, Disk, failing
from test_stages_pretrain import story

from tinylm import machine
from tinylm.train import checkpoint

SAMPLE = 60  # every so many operations in `make test`


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "stories.txt"
    text.write_text("\n".join(story(n, 30) for n in range(20)))
    return text


def trained(corpus: Path, out: Path):
    """Run a training command of twenty steps, with its tokenizer and three checkpoints."""
    plan = machine.plan_for

    def often(*args):
        return dataclasses.replace(plan(*args), chunk=4, checkpoint_every=8)

    with mock.patch.object(machine, "plan_for", often):
        return tinylm("train", "--out", out, "--corpus", corpus, "--model.V", 96, "--model.D", 8,
                      "--model.T", 32, "--batch", 64, "--steps", 20)


def came_to(out: Path) -> str:
    """Hash what a run came to: its parameters, its log, its record; no litter may lie about."""
    assert not [p for p in out.rglob("*") if p.suffix in (".tmp", ".old")]
    total = hashlib.sha256(checkpoint.params_sha256(out / "checkpoints").encode())
    for name in ("metrics.jsonl", "record.json", "text/tokens/train.bin"):
        total.update((out / name).read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """What the undisturbed run comes to, and how many operations it takes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with failing(Disk()) as disk:
        done = trained(corpus, out)
    assert done.returncode == 0, done.stderr
    assert disk.count > 60 and {"write", "fsync", "replace", "save", "rmtree"} == set(disk.names)
    return came_to(out), disk.count


@pytest.mark.parametrize("kind", ["crash", "full", *(
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("torn", "broken"))])
def test_a_fault_at_the_nth_operation_loses_nothing(corpus, whole, tmp_path, kind, tally):
    expected, count = whole
    chosen = tally.chosen(range(1, count + 1), SAMPLE)
    for at in chosen:
        out = tmp_path / "run"
        try:
            with failing(Disk(kind, at)) as disk:
                done = trained(corpus, out)
        except Crash:
            assert kind in ("crash", "torn")
        else:
            name = disk.names[min(at, disk.count) - 1]
            what = f"{kind} at {name} {at} of {disk.count}: {done.stderr}"
            # Orbax splits its arrays over more or fewer files, so the last operations may not be
            assert kind in ("full", "broken") or disk.count < at, what
            assert done.returncode == (disk.failed if kind in ("full", "broken") else 0), what
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1]
                assert last.startswith("failed: ") and str(out) in last, what
        again = trained(corpus, out)
        assert again.returncode == 0, f"{kind} at {at} of {count}: {again.stderr}"
        assert came_to(out) == expected, f"{kind} at {at} of {count}"
        shutil.rmtree(out)
    tally(f"train: {kind} at every write, fsync, rename, save and delete", len(chosen), "same bits")
