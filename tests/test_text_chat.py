import json
import random

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.text import chat, tokenizer
from tinylm.text.corpora import Document
from tinylm.text.tokenizer import ASSISTANT, BOS, CONTROL, END, PAD, SYSTEM, USER

TALK = [("system", "Be brief."), ("user", "Where is the boat?"), ("assistant", "On the river."),
        ("user", "And the cook?"), ("assistant", "With the tea.")]


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train(["the boat is on the river, and the cook has more tea.\n" * 40], 60)


def hostile(rng: random.Random) -> str:
    bits = [*CONTROL, "<|", "end|>", "\0", "\ud800", "\u2581", "<|\u200bend|>", "tea", " ", "\n"]
    return "".join(rng.choice(bits) for _ in range(rng.randrange(1, 10)))


def test_every_mark_has_an_id_of_its_own_and_padding_is_no_end(learnt):
    ids = (PAD, BOS, SYSTEM, USER, ASSISTANT, END)
    assert [learnt.piece(i) for i in ids] == list(CONTROL)


def test_no_message_can_forge_a_turn(learnt):
    rng = random.Random(3)
    for _ in range(200):
        talk = [("system", hostile(rng))] * rng.randrange(2)
        for _ in range(rng.randrange(1, 4)):
            talk += [("user", hostile(rng)), ("assistant", hostile(rng))]
        ids, mask = chat.render(talk, learnt)
        assert (ids < len(CONTROL)).sum() == 1 + 2 * len(talk)
        assert (ids == BOS).sum() == 1 and ids[0] == BOS
        said = [text for role, text in talk if role == "assistant"]
        wanted = "".join(f" {text}{CONTROL[END]}" for text in said)
        assert learnt.decode(ids[mask == 1], control=True) == wanted
        assert [chat.read(chat.written(text, learnt), learnt) for text in said] == said


def test_the_template_is_what_the_module_says(learnt):
    ids, mask = chat.render(TALK[:3], learnt)
    texts = [learnt.encode(f" {text}") for _, text in TALK[:3]]
    want = [BOS, SYSTEM, *texts[0], END, USER, *texts[1], END, ASSISTANT, *texts[2], END]
    assert ids.tolist() == want and ids.dtype == np.int32 and mask.dtype == np.float32
    assert mask.sum() == len(texts[2]) + 1 and mask[-1] == 1 and mask[-len(texts[2]) - 2] == 0


def test_a_prompt_is_the_beginning_of_the_longer_conversation(learnt):
    whole, supervised = chat.render(TALK, learnt)
    for turns in (2, 4):
        ids, mask = chat.render(TALK[:turns], learnt, prompt=True)
        assert np.array_equal(whole[:len(ids)], ids) and ids[-1] == ASSISTANT
        assert np.array_equal(supervised[:len(ids)], mask)


def test_a_word_has_the_same_ids_wherever_it_stands_in_a_turn(learnt):
    ids, mask = chat.render([("user", "Say: river"), ("assistant", "river")], learnt)
    answer = ids[mask == 1][:-1]
    asked = ids[2: len(ids) - len(answer) - 3]
    assert asked[-len(answer):].tolist() == answer.tolist()


def test_an_empty_answer_still_teaches_its_end(learnt):
    ids, mask = chat.render([("user", "tea?"), ("assistant", "")], learnt)
    assert ids[-2:].tolist() == [ASSISTANT, END] and mask.sum() == 1 and mask[-1] == 1


@pytest.mark.parametrize("talk, words", [
    ([], "no user message"), ([("system", "a")], "no user message"),
    ([("assistant", "a")], "message 1 has role 'assistant'; it must be user"),
    ([("user", "a"), ("user", "b")], "message 2 has role 'user'; it must be assistant"),
    ([("user", "a"), ("system", "b")], "message 2 has role 'system'"),
    ([("system", "a"), ("system", "b")], "message 2 has role 'system'"),
    ([("User", "a")], "has role 'User'")])
def test_roles_out_of_order_are_refused(learnt, talk, words):
    with pytest.raises(BadInput, match=words):
        chat.render(talk, learnt)


def test_a_prompt_that_ends_with_the_assistant_is_refused(learnt):
    with pytest.raises(BadInput, match="end with a user message"):
        chat.render(TALK, learnt, prompt=True)


GOOD = json.dumps({"messages": [{"role": r, "content": t} for r, t in TALK]})
BAD = {
    "not JSON": '{"messages": [', "an object": "[]", "no list of messages": '{"text": "a"}',
    "no list": '{"messages": []}', "list of": '{"messages": "hello"}',
    "message 1 must be": '{"messages": ["hello"]}',
    "and nothing else": '{"messages": [{"role": "user", "content": "a", "weight": "1"}]}',
    "strings role and content": '{"messages": [{"role": "user", "content": null}]}',
    "message 1 is empty": '{"messages": [{"role": "user", "content": " "}]}',
    "must be user": '{"messages": [{"role": "assistant", "content": "a"}]}',
    "end with an assistant": '{"messages": [{"role": "user", "content": "a"}]}',
    "nested": '{"messages":' + "[" * 100_000,
}


def test_good_lines_are_read_whatever_the_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n \r\n{GOOD}\r\n".encode())
    assert chat.read_jsonl(path) == [tuple(TALK)] * 2


@pytest.mark.parametrize("words", BAD)
def test_bad_lines_are_refused_by_file_and_line(tmp_path, words):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n\n{BAD[words]}\n{GOOD}")
    with pytest.raises(BadInput, match=words) as caught:
        chat.read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3 ") and "\n" not in str(caught.value)


def conversations(seed: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw conversations whose text tokens are all different, as (ids, mask)."""
    rng, fresh, out = random.Random(seed), iter(range(100, 10**9)), []
    for _ in range(count):
        ids, mask = [BOS], [0]
        for turn in range(rng.randrange(0, 7)):
            said = [next(fresh) for _ in range(rng.randrange(0, 12))]
            ids += [(USER, ASSISTANT)[turn % 2], *said, END]
            mask += [0] + [turn % 2] * (len(said) + 1)
        out.append((np.array(ids, np.int32), np.array(mask, np.float32)))
    return out


@pytest.mark.parametrize("T", [1, 2, 7, 20, 33, 200])
def test_packing_keeps_whole_turns_once_and_alone(T):
    rendered = conversations(T, 150)
    packed = chat.pack(rendered, T)
    assert packed.tokens.shape == (len(packed.mask), T + 1) == packed.segments.shape
    assert packed.mask.shape == (len(packed.tokens), T)
    assert (packed.mask.sum(1) > 0).all()
    found = []
    for row in range(len(packed.tokens)):
        for n in range(1, packed.segments[row].max() + 1):
            here = packed.segments[row] == n
            found.append(packed.tokens[row, here].tolist())
            supervised = np.flatnonzero(packed.mask[row]) + 1
            assert packed.tokens[row, here][-1] == END and supervised.size
    assert (packed.tokens[packed.segments == 0] == PAD).all()
    assert not packed.mask[packed.segments[:, 1:] == 0].any()
    assert not packed.mask[packed.segments[:, 1:] != packed.segments[:, :-1]].any()
    wanted = []
    for ids, mask in rendered:
        ends = [i + 1 for i in range(len(ids)) if ids[i] == END and mask[i] and i + 1 <= T + 1]
        if ends:
            wanted.append(ids[:ends[-1]].tolist())
    assert sorted(found) == sorted(wanted) and packed.dropped == len(rendered) - len(wanted)


@pytest.mark.parametrize("most", [1, 5, 2.5, 40, 9999])
def test_the_first_rows_are_packed_without_reading_what_cannot_lie_in_them(most):
    rendered, T = conversations(33, 600), 33
    whole, unread = chat.pack(rendered, T), iter(rendered)
    some = chat.pack(unread, T, most)
    for got, want in zip(some[:3], whole[:3], strict=True):
        np.testing.assert_array_equal(got, want[:int(most)])
    assert (len(list(unread)) > 0) == (len(whole.tokens) > most + chat.OPEN_ROWS)


def test_the_packed_mask_marks_the_position_that_predicts(learnt):
    ids, mask = chat.render(TALK, learnt)
    packed = chat.pack([(ids, mask)] * 2, 2 * len(ids) + 3)
    targets = packed.tokens[:, 1:]
    said = learnt.decode(targets[packed.mask == 1], control=True)
    assert said == " On the river.<|end|> With the tea.<|end|>" * 2
    assert packed.tokens[0, np.flatnonzero(packed.mask[0])[0]] == ASSISTANT


@pytest.mark.parametrize("T", [1, 6, 15, 40])
def test_windows_keep_each_exchange_that_fits_exactly_once(T):
    for ids, mask in conversations(50 + T, 100):
        cut = chat.windows(ids, mask, T)
        assert all(len(i) <= T + 1 and i[0] == BOS and i[-1] == END for i, _ in cut)
        ends = [0, *(i + 1 for i in range(len(ids)) if ids[i] == END and mask[i])]
        ends[0] = 1
        fits = [ids[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False) if b - a <= T]
        assert [t for i, _ in cut for t in i[1:]] == [t for exchange in fits for t in exchange]
        assert chat.pack(cut, T).dropped == 0


def test_packing_takes_the_fullest_row_that_has_room():
    talks = [(np.arange(n), np.ones(n)) for n in (5, 7, 3, 5)]
    packed = chat.pack(talks, 9)
    assert packed.segments.max(axis=1).tolist() == [2, 2]
    assert ((packed.segments > 0).sum(axis=1) == 10).all()


def test_packing_without_room_is_refused():
    with pytest.raises(BadInput, match="T=0"):
        chat.pack([], 0)


def test_packing_nothing_gives_no_rows():
    assert chat.pack([], 8).tokens.shape == (0, 9)


@pytest.mark.parametrize("line", ["\U0001f6f6" * 500 + "\n", "the boat is on the river. " * 20,
                                  "\u8239" * 30 + " the tea"])
def test_text_without_turns_is_cut_to_pairs_that_fit_a_row(learnt, line):
    documents = [Document(line * 3, "all", "a"), Document(line, "all", "b")]
    made = list(chat.conversations(documents, learnt, 64))
    assert len(made) > 2 and chat.pack(made, 64).dropped == 0
    said = "".join(learnt.decode(ids[ids >= len(CONTROL)]) for ids, _ in made)
    assert set(said) <= set(line + " ") and len(said) > len(line)


def test_text_whose_turns_never_fit_a_row_is_cut_to_pieces(learnt):
    talk = [("user", "tea " * 200), ("assistant", "boat " * 200)]
    long = Document("\n".join(t for _, t in talk), "all", "a", tuple(talk))
    assert len(list(chat.conversations([long], learnt, 80))) > 2
    both = [long, Document("", "all", "b", tuple(TALK))]
    assert len(list(chat.conversations(both, learnt, 80))) == 1
