"""A run that was begun on another machine or by other code goes on only when it is told to."""

import shutil

import pytest
from command import tinylm
from test_flips import stopping
from test_stages_pretrain import story
from test_writes import trained

from tinylm import files
from tinylm.train import checkpoint


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that a signal stopped, and the same one undisturbed."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "stories.txt").write_text("\n".join(story(n, 30) for n in range(20)))
    assert trained(folder / "stories.txt", folder / "whole").returncode == 0
    with stopping(3):
        assert trained(folder / "stories.txt", folder / "run").returncode == 75
    return folder


@pytest.mark.parametrize(("place", "change"), [
    ("environment.json", {"instructions": "avx"}), ("config.json", {"code_id": "0" * 16}),
    ("config.json", {"versions": {"jax": "0.9"}})])
def test_what_bits_depend_on_is_refused_until_it_is_adopted(begun, tmp_path, place, change):
    corpus, out = begun / "stories.txt", tmp_path / "run"
    shutil.copytree(begun / "run", out)
    assert "nothing differs" in tinylm("adopt", out).stdout
    files.write_json(out / place, files.read_json(out / place) | change)
    refused = trained(corpus, out)
    assert refused.returncode == 2 and f"tinylm adopt {out}" in refused.stderr
    (key, value), = change.items()
    assert (key if key == "versions" else str(value)) in refused.stderr
    assert tinylm("adopt", tmp_path).returncode == 0
    assert trained(corpus, out).returncode == 0
    record, whole = (files.read_json(p / "record.json") for p in (out, begun / "whole"))
    assert record["adopted_from"][0][key] == value
    assert record["versions"] == whole["versions"] and record["code_id"] == whole["code_id"]
    shas = [checkpoint.params_sha256(p / "checkpoints") for p in (out, begun / "whole")]
    assert shas[0] == shas[1]
    finished = tinylm("adopt", out)
    assert finished.returncode == 2 and "holds no run that was begun" in finished.stderr
