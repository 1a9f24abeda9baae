"""Rollouts: what is the response's, what its probability is, and that padding says nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.model import generate
from tinylm.model.decoder import ModelConfig, init, rebuild
from tinylm.text.tokenizer import ASSISTANT, BOS, END, PAD, USER
from tinylm.train import rollout as rolls

MODEL = ModelConfig(V=40, D=16, L=2, H=2, T=32)
PROMPTS = [np.array([BOS, USER, *range(20, 20 + n), END, ASSISTANT], np.int32) for n in (1, 4, 2)]
WIDTH, BUDGET = 16, 12


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: 3 * a, init(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module")
def rolled(params):
    return rolls.rollout(MODEL, params, PROMPTS * 8, WIDTH, BUDGET, jax.random.key(1))


def test_a_row_is_prompt_response_padding_and_the_mask_is_the_response_s():
    drawn = np.array([[30, END, 0, 0], [31, 32, 33, 34], [USER, 0, 0, 0]])
    laid = rolls.laid_out(PROMPTS, drawn, WIDTH)
    for row, own, prompt, said in zip(laid.tokens, laid.mask, PROMPTS,
                                      ([30, END], [31, 32, 33, 34], [USER]), strict=True):
        assert row[: len(prompt)].tolist() == prompt.tolist()
        assert row[1:][own > 0].tolist() == said and set(row[len(prompt) + len(said):]) == {PAD}
    assert laid.ended.tolist() == [1, 0, 0] and laid.leaked.tolist() == [0, 0, 1]
    assert [ids.tolist() for ids in laid.responses] == [[30], [31, 32, 33, 34], []]


def test_the_loss_s_log_probabilities_are_those_of_the_cached_decoder(params, rolled):
    found = rolls.measured(MODEL, params, params, rolled)
    for row in (0, 1, 2, 10):
        prompt, own = PROMPTS[row % 3], rolled.mask[row] > 0
        said = rolled.tokens[row][1:][own]
        state = generate.prefill(MODEL, params, [prompt], WIDTH, WIDTH + BUDGET)
        model, seen = rebuild(MODEL, params), []
        for token in said:
            seen.append(float(jax.nn.log_softmax(state.logits)[0, token]))
            x, cache = model.extend(model.blocks(), jnp.full((1, 1), token), state.cache,
                                    state.slot, state.begin)
            state = state._replace(cache=cache, logits=model.head(x)[:, 0], slot=state.slot + 1)
        np.testing.assert_allclose(found.logp[row][own], seen, atol=2e-5)


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(params, rolled):
    same = rolls.measured(MODEL, params, params, rolled)
    assert not same.kl.any() and (same.logp == same.ref).all()
    other = rolls.measured(MODEL, init(MODEL, jax.random.key(5)), params, rolled)
    assert (other.kl >= -1e-6).all() and other.kl[rolled.mask > 0].mean() > 0.1


def test_padding_changes_nothing_that_the_mask_shows(params, rolled):
    junk = rolled.tokens.copy()
    behind = np.cumsum(rolled.mask[:, ::-1], axis=1)[:, ::-1] == 0
    prompt = np.cumsum(rolled.mask, axis=1) == 0
    junk[:, 1:][behind & ~prompt] = 7
    assert (junk != rolled.tokens).any()
    both = (rolled, rolled._replace(tokens=junk))
    pair = [rolls.measured(MODEL, params, params, r) for r in both]
    np.testing.assert_array_equal(*(p.logp[rolled.mask > 0] for p in pair))


def test_another_temperature_is_another_policy(params, rolled):
    hot = rolls.measured(MODEL, params, params, rolled, temperature=2.0)
    logits = rebuild(MODEL, params)(jnp.asarray(rolled.tokens[:4, :-1])) / 2
    entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(hot.entropy[:4], entropy * rolled.mask[:4], rtol=1e-4)


def test_a_cold_rollout_says_the_likeliest_and_a_hot_one_does_not(params):
    cold, hot = (rolls.rollout(MODEL, params, PROMPTS, WIDTH, BUDGET, jax.random.key(1), t)
                 for t in (1e-3, 3.0))
    likeliest = [row[row >= generate.CONTROL].tolist()
                 for row in generate.sample(MODEL, params, PROMPTS, BUDGET, 0, 0.0)]
    assert [ids.tolist() for ids in cold.responses] == likeliest
    assert [ids.tolist() for ids in hot.responses] != likeliest


def test_the_same_key_draws_the_same_and_what_does_not_fit_is_refused(params, rolled):
    again = rolls.rollout(MODEL, params, PROMPTS * 8, WIDTH, BUDGET, jax.random.key(1))
    np.testing.assert_array_equal(again.tokens, rolled.tokens)
    with pytest.raises(BadInput, match="do not fit the context T=32"):
        rolls.rollout(MODEL, params, PROMPTS, WIDTH, 20, jax.random.key(1))
