"""What answers the suite takes: the likeliest, or of several the one that a judge likes."""

from collections import Counter

import jax
import numpy as np
import pytest

from tinylm.evaluate import pool, suite
from tinylm.model.decoder import ModelConfig, init
from tinylm.text import tasks

MODEL = ModelConfig(V=48, D=8, L=1, H=1, T=64)
PROMPTS = [np.array([1, 20 + n, 30, 40 - n]) for n in range(6)]


@pytest.fixture(scope="module")
def params():
    return init(MODEL, jax.random.key(0))


@pytest.mark.parametrize("sign", [1, -1])
def test_of_several_answers_the_judge_gets_the_ended_one_it_likes(params, sign):
    each = [suite.joined(suite.answered(MODEL, params, PROMPTS, 16, 1 + k, 1.0), 6)
            for k in range(8)]
    lengths = np.array([np.where(r.ended > 0, r.mask.sum(1), -1) for r in each])
    some = (lengths > 0).any(axis=0)
    assert some.sum() > 2 and (lengths.max(0) > lengths[0]).any()
    best = suite.liked(MODEL, params, PROMPTS, 16, 0,
                       lambda rolled, _: sign * rolled.mask.sum(1), 8)
    wanted = np.where(lengths > 0, sign * lengths, -99).max(0)
    assert (sign * best.mask.sum(1) == wanted)[some].all() and (best.ended == some).all()


def test_sentences_that_may_win_are_as_many_as_asked_for_and_no_other_family_grows():
    for each, sentences, wanted in ((3, 0, 3), (3, 7, 7), (8, 5, 5)):
        asked = suite.drawn(suite.SuiteConfig(each, sentences=sentences))
        found = Counter(task.family for task in asked if task.rule == "plain")
        assert found == dict.fromkeys(tasks.FAMILIES, each) | {"sentence": wanted}
        assert len(set(asked)) == len(asked)


def test_labels_follow_the_gold_and_their_ceiling_is_a_perfect_judges_accuracy():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(4000, 2)).astype(np.float32)
    some = pool.Pool(np.zeros((4000, 2, 3), np.int32), np.ones((4000, 2, 2)), np.ones((4000, 2)),
                     np.zeros((4000, 2)), gold)
    ranked, ceiling = pool.labelled(some, 2.0, 1)
    right = (ranked.wins * (gold[:, :, None] > gold[:, None, :])).sum() / ranked.wins.sum()
    assert 0.6 < ceiling < 0.95 and right == pytest.approx(ceiling, abs=0.02)
    sure, top = pool.labelled(some, np.inf, 1)
    assert top == 1 and (sure.wins * (gold[:, :, None] < gold[:, None, :])).sum() == 0
