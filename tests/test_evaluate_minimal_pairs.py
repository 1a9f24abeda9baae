"""Minimal pairs: the higher probability wins, by paradigm; what is no pair is named."""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model_decoder import forward

from tinylm.config import BadInput
from tinylm.evaluate import minimal_pairs
from tinylm.model.decoder import ModelConfig, init
from tinylm.text import tokenizer
from tinylm.text.tokenizer import BOS

WORDS = "the cat sat on the mat and the dog ran to the hill. "


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train([WORDS * 40], 60)


@pytest.fixture(scope="module")
def model(learnt):
    return ModelConfig(V=learnt.V, D=16, L=1, H=2, T=32)


def pairs(path, rows):
    path.write_text("".join(json.dumps(dict(zip(minimal_pairs.KEYS, row, strict=True))) + "\n"
                            for row in rows))
    return path


def test_the_sentence_of_higher_probability_wins_and_ties_count_half(tmp_path, learnt, model):
    params = init(model, jax.random.key(0))
    some = [("the cat sat", "the dog ran to the hill"), ("a", "the cat"), ("the", "the")]

    def logp(text):
        ids = np.concatenate([[BOS], learnt.encode(text)])
        row = np.zeros(model.T, np.int32)  # what stands behind a text does not change it
        row[:len(ids)] = ids
        logits = np.asarray(jax.nn.log_softmax(forward(model, params, jnp.asarray(row)[None])[0]))
        return float(sum(logits[t, i] for t, i in enumerate(ids[1:])))

    read = minimal_pairs.read(pairs(tmp_path / "agree.jsonl", some))
    found = minimal_pairs.scored(model, params, learnt, read)
    want = np.mean([(np.sign(logp(a) - logp(b)) + 1) / 2 for a, b in some])
    assert found["paradigms"]["agree"]["rate"] == pytest.approx(want) and want % 1 > 0
    long = {"agree": [*some, ("the cat " * 99, "a")]}
    assert minimal_pairs.scored(model, params, learnt, long) == {**found, "too_long": 1}
    with pytest.raises(BadInput, match="none of 1 pairs fits"):
        minimal_pairs.scored(model, params, learnt, {"long": long["agree"][-1:]})


def test_a_zip_holds_a_paradigm_a_file_and_what_is_wrong_is_named(tmp_path):
    place = tmp_path / "all.zip"
    with zipfile.ZipFile(place, "w") as packed:
        for name in ("one", "two"):
            packed.write(pairs(tmp_path / f"{name}.jsonl", [("a b", "b a")]), f"data/{name}.jsonl")
    assert minimal_pairs.read(place) == {"one": [("a b", "b a")], "two": [("a b", "b a")]}
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as packed:
        for folder in ("a", "b"):
            packed.write(tmp_path / "one.jsonl", f"{folder}/one.jsonl")
    with pytest.raises(BadInput, match="holds 1 paradigms twice by name"):
        minimal_pairs.read(tmp_path / "twice.zip")
    with zipfile.ZipFile(place, "a") as packed:
        packed.writestr("data/bad.jsonl", '{"sentence_good": "a"}\n')
    with pytest.raises(BadInput, match=r"bad.jsonl:1 lacks the texts"):
        minimal_pairs.read(place)
    with pytest.raises(BadInput, match=r"void.jsonl:1 lacks the texts"):
        minimal_pairs.read(pairs(tmp_path / "void.jsonl", [("a", " ")]))
    place.write_bytes(b"PK no zip")
    with pytest.raises(BadInput, match="is no .zip"):
        minimal_pairs.read(place)
