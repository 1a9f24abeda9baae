import json

import numpy as np
import pytest

from tinylm import files
from tinylm.files import Damaged
from tinylm.text import corpora, shards, tokenizer
from tinylm.text.tokenizer import BOS


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for part in ("a", "b"):
        rows = [{"text": f"{part} {n}: " + f"number {n * n} follows {n}. " * (3 + n % 5)}
                for n in range(60)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = corpora.load([folder / "a.jsonl", folder / "b.jsonl"])
    learnt = tokenizer.train([d.text for d in corpus.train], 70)
    seen = []
    return corpus, learnt, shards.write(folder / "data", corpus, learnt, seen.append), seen


def test_tokens_decode_to_the_documents_in_order(small):
    corpus, learnt, data, _ = small
    for split, tokens in ((corpus.train, data.train), (corpus.heldout, data.heldout)):
        assert tokens.dtype == np.uint16
        cuts = np.flatnonzero(tokens == BOS)
        texts = [learnt.decode(ids) for ids in np.split(tokens, cuts)[1:]]
        assert texts == [d.text for d in split] and cuts[0] == 0


def test_heldout_documents_tile_the_stream(small):
    corpus, _, data, _ = small
    where = data.documents
    assert np.array_equal(where.start, np.flatnonzero(data.heldout == BOS))
    assert np.array_equal(where.start[1:], np.cumsum(where.tokens)[:-1])
    assert where.tokens.sum() == len(data.heldout)
    assert where.bytes.tolist() == [len(d.text.encode()) for d in corpus.heldout]
    assert where.part == [d.part for d in corpus.heldout]


def test_counts_add_up_over_the_parts(small):
    corpus, _, data, _ = small
    for split, tokens in (("train", data.train), ("heldout", data.heldout)):
        counts = data.facts["counts"][split]
        for key in ("documents", "tokens", "bytes"):
            assert counts["all"][key] == sum(counts[p][key] for p in counts if p != "all")
        assert counts["all"]["tokens"] == len(tokens)
    size = sum(len(d.text.encode()) for d in corpus.train)
    assert data.bytes_per_token == size / len(data.train)
    assert (data.facts["corpus_id"], data.V) == (corpus.id, 70)


def test_progress_rises_to_one(small):
    seen = small[3]
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_reopening_gives_the_same_id_and_other_tokens_another(small, tmp_path):
    corpus, learnt, data, _ = small
    assert shards.open_dataset(data.folder).id == data.id
    assert shards.write(tmp_path / "again", corpus, learnt).id == data.id
    other = tokenizer.train([d.text for d in corpus.train], 65)
    assert shards.write(tmp_path / "other", corpus, other).id != data.id


def change(folder, name, data):
    (folder / name).write_bytes(data)


HOSTILE = {
    "a flipped bit": lambda f: change(f, "train.bin", bytes([1 ^ (b := (f / "train.bin")
                                      .read_bytes())[0]]) + b[1:]),
    "a cut file": lambda f: change(f, "heldout.bin", (f / "heldout.bin").read_bytes()[:-2]),
    "a missing file": lambda f: (f / "heldout_documents.json").unlink(),
    "no manifest": lambda f: (f / files.MANIFEST).unlink(),
    "a stranger": lambda f: change(f, "extra.bin", b"1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_dataset_is_refused(small, tmp_path, name):
    corpus, learnt, _, _ = small
    folder = shards.write(tmp_path / "d", corpus, learnt).folder
    HOSTILE[name](folder)
    with pytest.raises(Damaged):
        shards.open_dataset(folder)


@pytest.mark.parametrize("facts, words",
                         [({"schema": 2}, "newer"), ({"schema": 1}, "not a dataset")])
def test_a_sealed_folder_of_another_kind_is_refused(tmp_path, facts, words):
    with files.staged(tmp_path / "d") as draft:
        files.write_json(draft / "dataset.json", facts)
        files.write_json(draft / "heldout_documents.json", {})
    with pytest.raises(Damaged, match=words):
        shards.open_dataset(tmp_path / "d")
