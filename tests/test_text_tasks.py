"""Tasks: fixed by their seed, unseen where they say so, and paid for the right answer only."""

import os
import re
import subprocess
import sys

import pytest

from tinylm.config import BadInput
from tinylm.text import chat, rubric, tasks, tokenizer

EVERY = [(family, rule) for family in tasks.FAMILIES for rule in tasks.RULES]
LIST = tasks.draw("list", "plain", "test", 0, 200)


def words(task) -> set[str]:
    return set(re.findall(r"[A-Za-z]+|\d+", " ".join(text for _, text in task.messages)))


@pytest.fixture(scope="module")
def drawn():
    """Each family crossed with each rule, 60 a split."""
    return {split: [t for family, rule in EVERY for t in tasks.draw(family, rule, split, 0, 60)]
            for split in ("train", "test", "reworded")}


def test_the_answer_given_for_tuning_is_paid_and_the_bare_one_is_not(drawn):
    for task in [t for split in drawn.values() for t in split]:
        assert tasks.reward(task, task.answer) == tasks.reward(task, f" {task.answer}\n") == 1
        assert tasks.obeyed(task, task.answer) is not None
        if task.rule in ("closing", "persona") or task.plain != task.plain.upper():
            assert tasks.reward(task, task.plain) == (task.rule == "plain"), task
        assert tasks.conversation(task)[-1] == ("assistant", task.answer)


@pytest.mark.parametrize("change", [
    lambda a: a + "x", lambda a: a[:-1], lambda a: "", lambda a: a.swapcase() + " " + a,
    lambda a: a + "\n" + a, lambda a: a.replace(" ", "  ") + "!"])
def test_a_changed_answer_is_not_paid(drawn, change):
    paid = [t for t in drawn["test"] if tasks.reward(t, change(t.answer))]
    assert not paid, (paid[0], change(paid[0].answer))


def test_no_message_of_training_holds_a_word_that_a_test_asks_about(drawn):
    more = [t for f in tasks.FAMILIES for t in tasks.draw(f, "closing", "train", 1, 400)]
    trained = set().union(*map(words, drawn["train"] + more))
    everywhere = f"{tasks.WORDS} {tasks.NAMES} {' '.join(map(str, range(100)))}".split()
    for split in ("test", "reworded"):
        asked = set().union(*map(words, drawn[split])) & set(everywhere)
        kept = {w for w in asked if not (w.isdigit() and int(w) < 10)}
        assert len(kept) > 60 and not kept & trained, sorted(kept & trained)
    names = [w for t in drawn["test"] if t.family == "unknown" and t.rule == "plain"
             for w in words(t) if w.istitle() and len(w) == 5]
    assert names and not set(names) & trained


def test_a_glossary_question_of_a_test_was_never_asked_in_training():
    train = {t.messages for t in tasks.draw("glossary", "plain", "train", 0, 600)}
    test = {t.messages for t in tasks.draw("glossary", "plain", "test", 0, 600)}
    assert not train & test
    assert {t.plain for t in tasks.draw("glossary", "plain", "train", 0, 600)} >= {
        t.plain for t in tasks.draw("glossary", "plain", "reworded", 0, 600)}


def test_reworded_phrases_are_unseen_in_training(drawn):
    kinds = {"copy": "copy", "spelling": "spell", "glossary": "what", "unknown": "what",
             "sentence": "sentence", "choice": "choice", "recall": "ask"}
    for task in drawn["reworded"]:
        system = [(f"system {task.rule}", task.messages[0][1])] if task.rule != "plain" else []
        last = [(kinds[task.family], task.messages[-1][1])] if task.family in kinds else []
        for kind, text in system + last:
            for usual in tasks.PHRASES[kind][0]:
                start, end = usual.split("{0}")[0], usual.rpartition("}")[2]
                assert not (text.startswith(start) and text.endswith(end)), (usual, text)
    for kind, (usual, others) in tasks.PHRASES.items():
        assert others and not set(usual) & set(others), kind
    terms = " ".join(tasks.GLOSSARY.values()).split()
    assert not set(terms) & set(tasks.WORDS.split()) and len(terms) == len(set(terms))
    assert len(set(tasks.WORDS.split())) == len(tasks.WORDS.split())


@pytest.mark.parametrize("split", ["train", "test", "reworded"])
def test_every_family_has_500_different_tasks(split):
    for family in tasks.FAMILIES:
        found = tasks.draw(family, "plain", split, 3, 500)
        assert len({t.messages for t in found}) == 500


def test_more_than_there_are_and_unknown_names_are_refused():
    with pytest.raises(BadInput, match="5000 test tasks of 'glossary' .* ask for fewer"):
        tasks.draw("glossary", "plain", "test", 0, 5000)
    for bad in (("poem", "plain", "test"), ("copy", "shout", "test"), ("copy", "plain", "dev")):
        with pytest.raises(BadInput, match="is unknown; choose one of"):
            tasks.draw(*bad, 0, 1)


def test_the_answers_are_right_by_another_computation():
    for task in LIST:
        asked, _, rest = task.messages[-1][1].partition(":")
        some = rest.split()
        want = {"rst": some[:1], "ast": some[-1:], "ort": sorted(some), "der": sorted(some),
                "rse": some[::-1], "rds": some[::-1]}
        key = asked.removesuffix(" of").removeprefix("Give the ")[-3:]
        assert task.plain == " ".join(want[key]), task
    for task in tasks.draw("arithmetic", "plain", "test", 0, 200):
        a, b = map(int, re.findall(r"\d+", task.messages[-1][1]))
        asked = task.messages[-1][1]
        want = a + b if "plus" in asked or "Add" in asked else abs(a - b)
        assert task.plain == str(want) and int(task.plain) >= 0


@pytest.mark.parametrize(("text", "paid"), [
    ("The dog is near the boat.", 1), ("the dog is near the boat.", 0), ("Dog boat.", 0),
    ("The dog is near the boat", 0), ("The dog is. The boat is.", 0), ("The dogs like a boat.", 0),
    ("My boat, the red one, has a dog.", 1), ("The boat is near the town.", 0),
    ("The dog " + "and the dog " * 4 + "saw a boat.", 0)])
def test_a_sentence_is_paid_by_its_words_and_form(text, paid):
    task = tasks.Task("sentence", "plain", "", (("user", ""),), "", ("dog", "boat"))
    assert tasks.reward(task, text) == paid


def test_rules_are_seen_apart_from_the_answer():
    ask = (("user", "Say: tea"),)
    for rule, word, kept, lost in (("upper", "", "COFFEE", "TEa"),
                                   ("closing", "over", "coffee over", "tea overt"),
                                   ("persona", "Rex", "Rex: coffee", "Rex tea")):
        task = tasks.Task("copy", rule, word, ask, "tea")
        assert tasks.obeyed(task, kept) is not None and tasks.reward(task, kept) == 0
        assert tasks.obeyed(task, lost) is None and tasks.reward(task, lost) == 0


GOLDEN = "0ceffa175a71cd90"


def test_a_set_is_the_same_in_every_process_whatever_the_hash_seed():
    code = ("from tinylm.text import tasks as t; print(t.tasks_id([x for f in t.FAMILIES "
            "for r in t.RULES for x in t.draw(f, r, 'test', 7, 20)]))")
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True, env=os.environ | {"PYTHONHASHSEED": seed}).stdout.strip()
             for seed in ("1", "2")}
    assert found == {GOLDEN}, "update it if the tasks were meant to change; old records then stay"
    some = tasks.draw("copy", "plain", "train", 0, 30)
    assert tasks.tasks_id(some) != tasks.tasks_id(some[::-1])
    assert tasks.tasks_id(some) != tasks.tasks_id(tasks.draw("copy", "plain", "train", 1, 30))


def test_tasks_render_to_prompts_and_to_supervised_conversations(drawn):
    learnt = tokenizer.train(["the boat is on the river, and the cook has more tea.\n" * 40], 60)
    for task in drawn["reworded"][::40]:
        ids, _ = chat.render(task.messages, learnt, prompt=True)
        whole, mask = chat.render(tasks.conversation(task), learnt)
        assert whole[:len(ids)].tolist() == ids.tolist()
        said = learnt.decode(whole[len(ids):], control=True)
        assert said == f" {task.answer}<|end|>" and mask[len(ids):].all()


@pytest.mark.parametrize(("text", "ended", "score"), [
    ("The dog is near the boat.", True, 3.0), ("The red dog is near the boat.", True, 3.5),
    ("The red dog is near the old boat.", True, 4.0),
    ("The red kind dog is near the old boat.", True, 3.5), ("The dog is near the boat", True, 2.0),
    ("The dog is near the boat.", False, 2.0), ("The cat is near the boat.", True, 2.0),
    ("The dog is near the boat. The boat.", True, 1.5), ("", True, 0.0)])
def test_the_rubric_pays_for_words_form_and_two_adjectives(text, ended, score):
    task = tasks.Task("sentence", "plain", "", (("user", ""),), "", ("dog", "boat"))
    assert rubric.gold(task, text, ended) == pytest.approx(score)


def test_sentences_for_tuning_have_none_to_two_adjectives_and_full_marks_for_the_rest(drawn):
    some = [t for t in drawn["train"] if t.family == "sentence" and t.rule == "plain"]
    scores = {rubric.gold(t, t.answer, True) for t in some}
    assert scores == {3.0, 3.5, 4.0}


def test_what_needs_no_sentence_is_graded_by_its_one_answer():
    task = next(t for t in tasks.draw("copy", "plain", "test", 0, 1))
    assert rubric.graded(task, task.answer, True) == 1 == rubric.exact(task, task.answer, True)
    assert rubric.graded(task, task.answer, False) == 0 == rubric.exact(task, "another", True)
