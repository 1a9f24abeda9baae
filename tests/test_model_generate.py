"""Sampling: cached equals full, streaming equals at once, and it stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model_decoder import SMALL, drawn, forward

from tinylm import machine
from tinylm.config import BadInput
from tinylm.model.decoder import ModelConfig
from tinylm.model.generate import (
    CONTROL,
    _decode,
    _spread,
    decode,
    draw,
    prefill,
    sample,
    stream,
)
from tinylm.text import tokenizer
from tinylm.train import step

PROMPT = np.array([1, 20, 30, 40], np.int32)


@pytest.fixture(scope="module")
def params():
    return drawn(SMALL)


def test_greedy_decoding_takes_the_full_passs_likeliest_token_each_time(params):
    out = sample(SMALL, params, [PROMPT], 12, temperature=0.0)[0]
    ids = list(PROMPT)
    for token in out:
        padded = np.array([ids + [0] * (SMALL.T - len(ids))], np.int32)
        logits = np.asarray(forward(SMALL, params, padded))[0, len(ids) - 1]
        assert token == logits.argmax()
        ids.append(int(token))


def test_a_padded_prompt_has_the_logits_of_the_full_pass(params):
    rows = [np.arange(8, 8 + n, dtype=np.int32) for n in (1, 5, 16, 20)]
    found = prefill(SMALL, params, rows).logits
    for row, logits in zip(rows, found, strict=True):
        full = forward(SMALL, params, row[None])[0, -1]
        np.testing.assert_allclose(logits, full, atol=5e-6)


def test_rows_of_a_batch_do_not_see_each_other_or_their_padding(params):
    long = np.array([1, 9, 8, 7, 6, 21, 22], np.int32)
    both = sample(SMALL, params, [PROMPT, long], 8, temperature=0.0)
    for prompt, got in zip([PROMPT, long], both, strict=True):
        np.testing.assert_array_equal(sample(SMALL, params, [prompt], 8, temperature=0.0)[0], got)


@pytest.mark.parametrize("every", [1, 3, 8])
def test_streaming_gives_the_same_tokens_as_sampling_at_once(params, every):
    whole = sample(SMALL, params, [PROMPT], 10, seed=4)[0]
    parts = list(stream(SMALL, params, PROMPT, 10, seed=4, every=every))
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_row_ends_at_its_first_control_id_or_where_its_own_context_is_full(params, temperature):
    prompts = [np.arange(8, 8 + n) for n in (1, 15, 16, 17, 22, 23)]
    full = 0
    for seed in range(6):
        out = sample(SMALL, params, prompts, 100, seed=seed, temperature=temperature)
        for prompt, row in zip(prompts, out, strict=True):
            assert (row[:-1] >= CONTROL).all()
            assert row[-1] < CONTROL or len(row) == SMALL.T - len(prompt)
            full += row[-1] >= CONTROL
            if temperature == 0:
                alone = np.concatenate(list(stream(SMALL, params, prompt, 100, temperature=0.0)))
                np.testing.assert_array_equal(alone, row)
    assert full


def test_the_same_seed_draws_the_same_and_another_does_not(params):
    one, again, other = (sample(SMALL, params, [PROMPT], 10, seed=s)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert len(one) != len(other) or (one != other).any()


def test_sampled_frequencies_are_the_softmax(params):
    rows = sample(SMALL, params, [PROMPT] * 4000, 1, seed=3)
    counts = np.bincount([int(r[0]) for r in rows], minlength=SMALL.V) / 4000
    padded = np.array([list(PROMPT) + [0] * (SMALL.T - 4)], np.int32)
    p = np.asarray(jax.nn.softmax(forward(SMALL, params, padded)[0, 3]))
    assert np.abs(counts - p).sum() / 2 < 0.06


@pytest.mark.parametrize("V", [50, 384])
def test_drawn_tokens_follow_the_softmax_and_never_an_impossible_one(V):
    logits = np.random.default_rng(0).normal(0, 2, V).astype(np.float32)
    logits[::3] = -1e30
    shares = jax.random.uniform(jax.random.key(1), (2, 200_000))
    found = np.asarray(jax.jit(draw)(np.tile(logits, (200_000, 1)), shares))
    p = np.asarray(jax.nn.softmax(logits))
    counts = np.bincount(found, minlength=V) / len(found)
    assert not counts[::3].any()
    assert (np.abs(counts - p) <= 5 * np.sqrt(p / len(found)) + 1e-9).all()


def test_rows_on_several_devices_are_those_of_one_and_no_device_waits_for_another(params):
    prompts = [PROMPT, PROMPT[:2], PROMPT[:3], PROMPT] * 2
    place = step.by_row(machine.mesh(4))
    states = [prefill(SMALL, params, prompts), prefill(SMALL, params, prompts, place=place)]
    dials = (jax.random.key(3), jnp.float32(1.5))
    (_, alone), (_, apart) = (decode(SMALL, params, state, 12, *dials) for state in states)
    assert [part.data.shape for part in apart.addressable_shards] == [(2, 12)] * 4
    np.testing.assert_array_equal(alone, apart)
    lengths = (np.asarray(alone).reshape(4, -1) > 0).sum(axis=1)
    assert len(set(lengths)) > 1 and (np.asarray(alone)[:, -1] == 0).any()
    halves, state = [], states[1]
    for _ in range(2):
        state, half = decode(SMALL, params, state, 6, *dials)
        halves.append(half)
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), alone)
    said = _decode.lower(SMALL, params, states[1], 12, *dials, CONTROL, _spread(states[1].begin))
    words = ("all-gather", "all-reduce", "collective")
    assert not [word for word in words if word in said.compile().as_text()]


def test_control_ids_are_those_of_the_tokenizer():
    assert len(tokenizer.CONTROL) == CONTROL


@pytest.mark.parametrize("length", [0, 24, 100])
def test_prompts_outside_the_context_are_refused_with_the_limit(params, length):
    with pytest.raises(BadInput, match="1 to 23 tokens fit the context T=24"):
        sample(SMALL, params, [np.full(length, 9)], 4)


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(BadInput, match="keeps no cache"):
        sample(ModelConfig(kind="position_weights"), {}, [PROMPT], 4)
