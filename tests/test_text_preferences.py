"""Preferences: strict reading by file and line, and no prompt on both sides of the split."""

import json

import pytest

from tinylm.config import BadInput
from tinylm.text import preferences

PAIR = json.dumps({"prompt": "Tea?", "chosen": "Yes, please.", "rejected": "No."})
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tea?"}]
RANKED = json.dumps({"messages": TALK, "responses": ["Gladly.", "Yes.", "No."]})
BAD = {
    "not JSON": '{"prompt": ', "not an object": '["Tea?"]',
    "neither prompt nor messages": '{"chosen": "a", "rejected": "b"}',
    "both prompt and messages": json.dumps({"prompt": "a", "messages": TALK, "chosen": "a",
                                            "rejected": "b"}),
    "has the fields prompt; write": '{"prompt": "Tea?"}',
    "and nothing else": '{"prompt": "a", "chosen": "a", "rejected": "b", "score": 1}',
    "the fields chosen, prompt, rejected, responses": json.dumps(
        {"prompt": "a", "chosen": "a", "rejected": "b", "responses": ["a", "b"]}),
    "chosen is a list; give it text": '{"prompt": "a", "chosen": ["a"], "rejected": "b"}',
    "rejected is empty": '{"prompt": "a", "chosen": "a", "rejected": " "}',
    "prompt is a NoneType": '{"prompt": null, "chosen": "a", "rejected": "b"}',
    "no list of 2 or more": '{"prompt": "a", "responses": ["a"]}',
    "list of 2 or more responses": '{"prompt": "a", "responses": "ab"}',
    "response 2 is a int": '{"prompt": "a", "responses": ["a", 2]}',
    "prefers a response to itself": '{"prompt": "a", "responses": ["a", "b", "a"]}',
    "end with the user's": json.dumps({"messages": [*TALK, {"role": "assistant", "content": "a"}],
                                       "chosen": "a", "rejected": "b"}),
    "message 1 has role 'tool'": json.dumps({"messages": [{"role": "tool", "content": "a"}],
                                             "chosen": "a", "rejected": "b"}),
}


def test_pairs_and_rankings_are_read_best_first(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{PAIR}\r\n\r\n{RANKED}\r\n".encode())
    pair, ranked = preferences.read_jsonl(path)
    assert pair == ((("user", "Tea?"),), ("Yes, please.", "No."))
    assert ranked == ((("system", "Be kind."), ("user", "Tea?")), ("Gladly.", "Yes.", "No."))


@pytest.mark.parametrize("words", BAD)
def test_bad_lines_are_refused_by_file_and_line(tmp_path, words):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{PAIR}\n\n{BAD[words]}\n{PAIR}")
    with pytest.raises(BadInput, match=words) as caught:
        preferences.read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3 ") and "\n" not in str(caught.value)


def asked(*prompts: str) -> list[preferences.Preference]:
    return [preferences.Preference((("user", p),), (f"a{n}", "b")) for n, p in enumerate(prompts)]


@pytest.mark.parametrize("heldout", [0.01, 0.2, 0.5, 0.99])
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(heldout):
    rows = asked(*(f"{'TEA' if n % 3 else 'tea '} {n % 40}?" for n in range(120)))
    train, held = preferences.split(rows, heldout)
    assert sorted(train + held) == sorted(rows) and train and held

    def prompts(side):
        return {" ".join(p.messages[0][1].casefold().split()) for p in side}

    assert not prompts(train) & prompts(held)
    assert abs(len(held) / len(rows) - heldout) <= 3 / 120  # a prompt
    assert preferences.split(rows[::-1], heldout)[1] == held[::-1]  # by prompt, not by place


@pytest.mark.parametrize(("rows", "share", "words"), [
    (("tea?", "Tea? "), 0.5, "2 preferences are about 1 prompt"), ((), 0.5, "about 0 prompt"),
    (("a", "b"), 0.0, "heldout=0.0"), (("a", "b"), 1.0, "heldout=1.0")])
def test_a_split_that_cannot_be_is_refused(rows, share, words):
    with pytest.raises(BadInput, match=words):
        preferences.split(asked(*rows), share)
