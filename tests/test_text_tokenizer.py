import itertools
import json
import random
import time

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.files import Damaged
from tinylm.text import corpora, tokenizer
from tinylm.text.tokenizer import ASSISTANT, BOS, CONTROL, END, FIRST, HALF, PAD, SYSTEM, USER

WORDS = ["the", "a", "boat", "river", "mountain", "went", "going", "down", "under", "over", "again",
         "nothing", "Something", "12", "345"]


def prose(seed: int, words: int = 4000) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ".\n", "\n\n"])
                   for _ in range(words))


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train([prose(1), prose(2)], 120)


STRANGE = ["", " ", "  two  spaces ", "\u2581", "a\u2581b \u2581\u2581", "\u2585", "\0", "a\0b",
           "\ud800", "\udfff end", "\ud83d\ude00", "\U0001f600", "\r\n\r", "\ufeffbom", "\ufffd",
           "<|user|>", "<|end|><|assistant|>", "<0x41>", "<s></s><unk>", "caf\u0065\u0301",
           "\u202e", "日本語 text", "\x7f\x85\u2028", "\U0010ffff", "\ufffe\uffff",
           "\t\ttabs\n\n\n", " ⁇ "]


@pytest.mark.parametrize("text", STRANGE)
def test_strange_strings_come_back_and_hold_no_control_id(learnt, text):
    ids = learnt.encode(text)
    assert learnt.decode(ids) == text
    assert ids.dtype == np.int32 and (ids >= HALF).all() and (ids < learnt.V).all()


def test_merges_build_the_pieces_from_characters_a_pair_at_a_time(learnt):
    for text in (*WORDS, "the river went\n\nunder  12", prose(5, 30)):
        steps = learnt.merges(text)
        assert steps[0] == list(text)
        assert steps[-1] == [learnt.piece(i) for i in learnt.encode(text)]
        for before, after in itertools.pairwise(steps):
            at = next(n for n, (a, b) in enumerate(zip(before, [*after, ""], strict=True))
                      if a != b)
            assert after == [*before[:at], before[at] + before[at + 1], *before[at + 2:]]
    assert learnt.merges("") == [[]] and learnt.merges("日a") == [["日", "a"]]


def test_random_strings_come_back_and_hold_no_control_id(learnt):
    rng = random.Random(7)
    for _ in range(400):
        text = "".join(rng.choice([*STRANGE, *WORDS, *CONTROL, " ", chr(rng.randrange(0x110000))])
                       for _ in range(rng.randrange(12)))
        ids = learnt.encode(text)
        assert learnt.decode(ids) == text and (ids >= HALF).all()


def test_a_megabyte_of_one_character_comes_back_quickly(learnt):
    for character in ("x", " ", "\n", "é", "\u2581"):
        began = time.process_time()
        assert learnt.decode(learnt.encode(character * 1_000_000)) == character * 1_000_000
        assert time.process_time() - began < 5


def test_long_texts_encode_as_their_lines_do(learnt):
    text = "\n" + prose(3, 40_000).strip("\n")
    lines = [learnt.encode("\n" + line) for line in text[1:].split("\n")]
    assert len(text) > 2 * 65_536
    assert np.array_equal(learnt.encode(text), np.concatenate(lines))


def test_the_vocabulary_has_exactly_v_ids_and_learnt_pieces_shorten(learnt):
    assert learnt.V == 120 == len(learnt.lengths)
    text = prose(5)
    ids = learnt.encode(text)
    assert len(text) / len(ids) > 2 and ids.max() < 120


def test_lengths_add_up_to_the_bytes_of_any_text(learnt):
    for text in [prose(6), "caf\u00e9 \U0001f600 \u2581"]:
        assert learnt.lengths[learnt.encode(text)].sum() == len(text.encode())
    assert (learnt.lengths[:HALF] == 0).all()


def test_same_texts_give_the_same_id_and_others_another():
    one, two, other = (tokenizer.train([prose(n)], 100) for n in (1, 1, 2))
    assert one.id == two.id and one.id != other.id
    assert np.array_equal(one.encode(prose(4)), two.encode(prose(4)))


def test_too_large_v_names_the_largest_that_works():
    with pytest.raises(BadInput, match="choose at most") as caught:
        tokenizer.train(["hello world, hello there"] * 9, 5000)
    most = int(str(caught.value).rsplit(" ", 1)[1])
    tokenizer.train(["hello world, hello there"] * 9, most)
    with pytest.raises(BadInput):
        tokenizer.train(["hello world, hello there"] * 9, most + 1)


def test_too_small_v_names_the_smallest_that_works():
    with pytest.raises(BadInput, match="choose at least") as caught:
        tokenizer.train([prose(1)], 24)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    tokenizer.train([prose(1)], least)
    with pytest.raises(BadInput):
        tokenizer.train([prose(1)], least - 1)


@pytest.mark.parametrize("V", [-1, 0, 22, 65_537])
def test_v_outside_uint16_is_refused(V):
    with pytest.raises(BadInput, match="uint16"):
        tokenizer.train([prose(1)], V)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"], ["\u2581\0"]])
def test_training_without_text_is_refused(texts):
    with pytest.raises(BadInput, match="no text"):
        tokenizer.train(texts, 100)


def test_training_takes_any_string():
    learnt = tokenizer.train([prose(1), *STRANGE, "\u2585 in a line", "x" * 50_000], 150)
    assert learnt.decode(learnt.encode(prose(2))) == prose(2)
    tokenizer.train(["one line without an end " * 4000], 40)


def test_more_text_than_the_limit_is_thinned_evenly(monkeypatch, learnt):
    seen = []
    real = tokenizer.sentencepiece.SentencePieceTrainer.train

    def spy(sentence_iterator, **options):
        seen.extend(sentence_iterator)
        real(sentence_iterator=iter(seen), **options)

    monkeypatch.setattr(tokenizer.sentencepiece.SentencePieceTrainer, "train", spy)
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", 6000)
    lines = [f"line {n} " + prose(n, 9).replace("\n", " ") for n in range(400)]
    tokenizer.train(lines, 100)
    assert 5000 < sum(map(len, seen)) < 7000
    kept = [int(line.split()[1]) for line in seen]
    assert max(np.diff(kept)) <= 2 * min(np.diff(kept)) and kept[-1] > 390


def test_control_ids_are_skipped_or_shown(learnt):
    ids = [BOS, SYSTEM, USER, *learnt.encode("hi"), END, ASSISTANT, PAD]
    assert learnt.decode(ids) == "hi"
    shown = "<|bos|><|system|><|user|>hi<|end|><|assistant|><|pad|>"
    assert learnt.decode(ids, control=True) == shown


def test_stray_half_bytes_and_bad_bytes_become_replacement_characters(learnt):
    assert learnt.decode([HALF + 4]) == "\ufffd"
    assert learnt.decode([HALF + 4, *learnt.encode("the")]) == "\ufffdthe"
    assert learnt.decode([HALF + 4, HALF + 1]) == "A"
    assert learnt.decode([HALF + 15, HALF + 15]) == "\ufffd"
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert isinstance(learnt.decode(rng.integers(0, learnt.V, 40)), str)


def test_a_streamed_text_only_grows_once_a_torn_character_at_its_end_is_held_back(learnt):
    text = "caf\u00e9 \U0001f600 the river"
    for stream in (learnt.encode(text), np.random.default_rng(1).integers(0, learnt.V, 300)):
        whole = learnt.decode(stream, control=True)
        for n in range(len(stream)):
            assert whole.startswith(learnt.decode(stream[:n], control=True).rstrip("\ufffd"))


@pytest.mark.parametrize("ids", [[-1], [120], [10**6]])
def test_ids_beyond_the_vocabulary_are_refused(learnt, ids):
    with pytest.raises(BadInput, match=r"not in this tokenizer's 0\.\.119"):
        learnt.decode(ids)


def test_every_id_has_a_readable_name_of_its_own(learnt):
    names = [learnt.piece(i) for i in range(learnt.V)]
    assert len(set(names)) == learnt.V and names[:6] == list(CONTROL)
    assert names[HALF + 10] == "<half A>" and "\n" in names[FIRST:]


def test_a_saved_tokenizer_loads_as_itself(learnt, tmp_path):
    learnt.save(tmp_path / "t")
    loaded = tokenizer.load(tmp_path / "t")
    assert (loaded.id, loaded.V) == (learnt.id, learnt.V)
    assert np.array_equal(loaded.encode(prose(8)), learnt.encode(prose(8)))


def damage_json(change):
    def damage(folder):
        facts = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(change(facts)))
    return damage


def rewrite(folder, data: bytes):
    import hashlib
    (folder / "tokenizer.model").write_bytes(data)
    damage_json(lambda f: f | {"sha256": hashlib.sha256(data).hexdigest()})(folder)


HOSTILE = {
    "missing model": lambda f: (f / "tokenizer.model").unlink(),
    "missing json": lambda f: (f / "tokenizer.json").unlink(),
    "torn json": lambda f: (f / "tokenizer.json").write_text('{"id'),
    "json list": damage_json(lambda facts: [1]),
    "other V": damage_json(lambda facts: facts | {"V": 121}),
    "other id": damage_json(lambda facts: facts | {"id": "0" * 16}),
    "other controls": damage_json(lambda facts: facts | {"control": []}),
    "other sha": damage_json(lambda facts: facts | {"sha256": "0" * 64}),
    "no sha": damage_json(lambda facts: {"id": facts["id"]}),
    "one byte": lambda f: (f / "tokenizer.model").write_bytes(
        b"\x00" + (f / "tokenizer.model").read_bytes()[1:]),
    "random model": lambda f: rewrite(f, random.Random(0).randbytes(5000)),
    "cut model": lambda f: rewrite(f, (f / "tokenizer.model").read_bytes()[:900]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_tokenizer_is_refused_in_one_line(learnt, tmp_path, name):
    learnt.save(tmp_path)
    HOSTILE[name](tmp_path)
    with pytest.raises(Damaged) as caught:
        tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and "tokenizer" in str(caught.value)


def test_the_default_corpus_trains_in_seconds_and_holds_few_half_bytes():
    try:
        corpus = corpora.load()
    except BadInput as missing:
        pytest.skip(str(missing))
    began = time.process_time()
    learnt = tokenizer.train([d.text for d in corpus.train], 784)
    assert time.process_time() - began < 20
    ids = np.concatenate([learnt.encode(d.text) for d in corpus.heldout])
    size = sum(len(d.text.encode()) for d in corpus.heldout)
    assert size / len(ids) > 2.6 and (ids < FIRST).mean() < 0.003


def test_an_alphabet_larger_than_v_is_spelt_in_half_bytes_not_refused():
    rng = np.random.default_rng(0)
    alphabet = [chr(0x4E00 + i) for i in range(900)]
    texts = ["".join(rng.choice(alphabet, 200)) for _ in range(200)]
    learnt = tokenizer.train(texts, 300)
    assert learnt.V == 300
    assert learnt.decode(learnt.encode(texts[0])) == texts[0]


@pytest.mark.parametrize("spaces", [0, 1, 80])
def test_spaces_survive_where_the_text_has_few_or_none(spaces):
    rng = np.random.default_rng(0)
    letters = rng.choice(list("0123456789abcdef"), 20_000)
    letters[rng.choice(20_000, spaces, replace=False)] = " "
    learnt = tokenizer.train(["".join(letters)], 64)
    for text in ("a b", " ", "  ab  c ", "a\u2581b c"):
        assert learnt.decode(learnt.encode(text)) == text
