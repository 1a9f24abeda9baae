"""Trunks and branches: the bits of lone runs for less compute, killed, swept, fitted."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from test_stages_pretrain import PLAN, bits, config, data  # noqa: F401  (fixtures)

from tinylm import files
from tinylm.config import BadInput, identity
from tinylm.stages.pretrain import Parent, PretrainConfig, pretrain
from tinylm.sweep import cells, law, runner
from tinylm.sweep.presets import RateRule
from tinylm.sweep.trunks import saved, shared
from tinylm.train import checkpoint, run
from tinylm.train.run import Stopped

SWEEP = Path(__file__).parents[1] / "experiments" / "results" / "laptop" / "sweep"


def weights(folder: Path, config: PretrainConfig) -> str:  # noqa: F811
    leaves = jax.tree.leaves(checkpoint.final_params(folder, config.model))
    return files.sha256_of(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))


def stopping(folder, config, data, at: int, **more):  # noqa: F811
    """Train until the first chunk that ends at or after a step, then be killed."""
    def stop(step: int, loss: float) -> None:
        if step >= at:
            raise Stopped("pulled the plug")

    with pytest.raises(Stopped):
        pretrain(folder, config, data, PLAN, stop, **more)


@pytest.fixture(scope="module")
def family(config):  # noqa: F811
    """A trunk that leaves at 14 and 21 steps, its branches of 20 and 30."""
    runs = shared([config, replace(config, steps=20)], RateRule(lr0=4e-3, horizon=0.0))
    assert [c.kind for c in runs] == ["trunk", "branch", "branch"]
    return runs


@pytest.fixture(scope="module")
def grown(tmp_path_factory, family, data):  # noqa: F811
    """The trunk trained without a stop."""
    folder = tmp_path_factory.mktemp("family") / "trunk"
    return folder, pretrain(folder, family[0], data, PLAN)


def test_a_branch_has_the_bits_of_the_run_trained_alone(
        tmp_path, grown, family, data):  # noqa: F811
    assert grown[1]["kind"] == "trunk" and grown[1]["loss"] is None
    for branch in family[1:]:
        alone = replace(branch, parent=None)
        apart = pretrain(tmp_path / f"alone{branch.steps}", alone, data, PLAN)
        record = pretrain(tmp_path / f"branch{branch.steps}", branch, data, PLAN, trunk=grown[0])
        assert weights(tmp_path / f"branch{branch.steps}", branch) == weights(
            tmp_path / f"alone{branch.steps}", alone)
        assert record["loss"] == apart["loss"] and record["tokens"] == apart["tokens"]
        assert record["flops"]["exact"] == apart["flops"]["exact"] == apart["flops"]["spent"]
        assert record["flops"]["spent"] == pytest.approx(0.3 * apart["flops"]["exact"])
        assert record["kind"] == "branch" and record["parent"]["id"] == identity(family[0])


def test_a_trunk_and_its_branch_killed_anywhere_end_in_the_same_bits(
        tmp_path, grown, family, data):  # noqa: F811
    trunk, branch = family[0], family[1]
    for at in (6, 16):  # before the first branch leaves, and between the two
        stopping(tmp_path / "trunk", trunk, data, at)
    early = {p.name for p in checkpoint.steps(tmp_path / "trunk/checkpoints")}
    assert "step-00000014" in early and run.record(tmp_path / "trunk") is None
    pretrain(tmp_path / "whole", branch, data, PLAN, trunk=grown[0])
    pretrain(tmp_path / "trunk", trunk, data, PLAN)
    assert {p.name for p in checkpoint.steps(tmp_path / "trunk/checkpoints")} == {
        "step-00000014", "step-00000021"}
    for at in (22, 26):
        stopping(tmp_path / "branch", branch, data, at, trunk=tmp_path / "trunk")
    pretrain(tmp_path / "branch", branch, data, PLAN, trunk=tmp_path / "trunk")
    assert bits(tmp_path / "branch", branch) == bits(tmp_path / "whole", branch)
    assert bits(tmp_path / "trunk", trunk) == bits(grown[0], trunk)


def test_a_branch_does_without_its_own_damaged_checkpoints(
        tmp_path, grown, family, data):  # noqa: F811
    branch = family[1]
    pretrain(tmp_path / "whole", branch, data, PLAN, trunk=grown[0])
    stopping(tmp_path / "branch", branch, data, 30, trunk=grown[0])
    for place in checkpoint.steps(tmp_path / "branch/checkpoints"):
        (place / files.MANIFEST).unlink()
    pretrain(tmp_path / "branch", branch, data, PLAN, trunk=grown[0])
    assert bits(tmp_path / "branch", branch) == bits(tmp_path / "whole", branch)


def test_a_branch_is_refused_without_its_own_trunk_and_its_checkpoint(
        tmp_path, grown, family, data):  # noqa: F811
    branch = family[1]
    with pytest.raises(BadInput, match="trunk .* is not there; train that first"):
        pretrain(tmp_path / "a", branch, data, PLAN)
    hotter = replace(branch, optim=replace(branch.optim, lr=9e-3))
    with pytest.raises(BadInput, match="of other settings than the trunk"):
        pretrain(tmp_path / "b", hotter, data, PLAN, trunk=grown[0])
    early = replace(branch, parent=Parent(branch.parent.id, 13))
    with pytest.raises(BadInput, match="kept no checkpoint at step 13"):
        pretrain(tmp_path / "c", early, data, PLAN, trunk=grown[0])
    with pytest.raises(BadInput, match="parent.step=22 is not within 1 to 21"):
        replace(branch, parent=Parent(branch.parent.id, 22))
    with pytest.raises(BadInput, match="a branch has no optim.warmup_steps"):
        replace(branch, optim=replace(branch.optim, warmup_steps=0))


def test_horizons_within_a_factor_four_share_a_trunk_and_its_rate():
    one = PretrainConfig(steps=1600)
    runs = [replace(one, steps=s) for s in (100, 400, 399, 1600)] + [replace(one, seed=1)]
    made = shared(runs, RateRule(lr0=1e-2, tokens0=512 * 800, horizon=0.5))
    trunks = {c.steps: c for c in made if c.kind == "trunk"}
    assert {s: t.branches for s, t in trunks.items()} == {1120: (280, 1120), 279: (70, 279)}
    assert trunks[1120].optim.warmup_steps == 80 and trunks[1120].optim.decay == 0.0
    assert trunks[1120].optim.lr == pytest.approx(1e-2)  # at the geometric mean, 800 steps
    lone = [c for c in made if c.kind == "pretrain"]
    assert lone == [replace(one, seed=1)]
    with pytest.raises(BadInput, match="decay=1 leaves no stable phase"):
        shared([replace(c, optim=replace(c.optim, decay=1.0)) for c in runs], RateRule())
    fixed = [replace(c, optim=replace(c.optim, warmup_steps=50)) for c in runs]
    assert {c.optim.warmup_steps for c in shared(fixed, RateRule())} == {50}
    spent = 1120 + 480 + 120 + 279 + 120 + 30 + 1600
    assert saved(made) == pytest.approx(1 - spent / (100 + 400 + 399 + 1600 + 1600))
    ids = {identity(t): t for t in trunks.values()}
    assert all(c.parent.step in ids[c.parent.id].branches for c in made if c.kind == "branch")


def test_a_sweep_trains_trunks_first_and_returns_their_branches(
        tmp_path, family, data):  # noqa: F811
    records = runner.sweep(tmp_path / "runs", family, data.folder)
    assert [(r["kind"], r["config"]["steps"]) for r in records] == [("branch", 20), ("branch", 30)]
    trunk = run.record(tmp_path / "runs" / cells.name(family[0]))
    assert trunk["kind"] == "trunk" and trunk["status"] == "ok"
    assert runner.sweep(tmp_path / "runs", family, data.folder) == records


def test_branches_of_a_failed_trunk_are_rows_that_say_so(tmp_path, family, data):  # noqa: F811
    hot = [replace(c, optim=replace(c.optim, lr=1e30, clip=1e30)) for c in family]
    hot = [hot[0], replace(hot[1], parent=Parent(identity(hot[0]), hot[1].parent.step))]
    assert runner.sweep(tmp_path / "runs", hot, data.folder) == []
    failure = files.read_json(tmp_path / "runs" / cells.name(hot[1]) / "failure.json")
    assert failure["kind"] == "branch" and "did it diverge?" in failure["reason"]


def test_a_fit_counts_branches_and_passes_by_trunks():
    records = [json.loads(p.read_text()) for p in sorted(SWEEP.glob("*/record.json"))]
    grown = [{**r, "kind": "branch"} for r in records] + [
        {**records[0], "kind": "trunk", "loss": None}]
    assert law.fit(grown) == law.fit(records)
