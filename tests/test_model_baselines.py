import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.model import baselines
from tinylm.model.baselines import FACTORS, NGram, fit_orders

V = 12


def chain(length: int, seed: int = 0, states: int = V) -> np.ndarray:
    """Draw tokens from a known second-order chain over 2..states-1 (0 and 1 never occur)."""
    rng = np.random.default_rng(seed)
    p = np.random.default_rng(99).dirichlet(np.full(states - 2, 0.3), (states, states))
    noise, out = rng.random(length), [2, 3]
    edges = p.cumsum(-1)
    for u in noise[2:]:
        out.append(2 + min(int(np.searchsorted(edges[out[-2], out[-1]], u)), states - 3))
    return np.array(out)


@pytest.fixture(scope="module")
def models():
    return fit_orders(chain(6000), [1, 2, 3, 4, 5], V)


def written_out(tokens: list[int], order: int, discounts) -> dict:
    """Evaluate the module's formula by plain loops over dictionaries."""
    occurs = [Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))
              for n in range(1, order + 2)]
    before = [Counter(g[1:] for g in occurs[n]) for n in range(1, order + 1)]

    def p(token, context, n):
        if n == 0:
            return 1 / V
        a = occurs[n - 1] if n == order else before[n - 1]
        d = discounts[n - 1]
        seen = {w: a[(*context, w)] for w in range(V) if a[(*context, w)]}
        if not seen:
            return p(token, context[1:], n - 1)
        rest = sum(d[min(c, 3)] for c in seen.values()) / sum(seen.values())
        own = max(seen.get(token, 0) - d[min(seen.get(token, 0), 3)], 0) / sum(seen.values())
        return own + rest * p(token, context[1:], n - 1)
    return p


def closed_form(counts: list[int], factor: float) -> list[float]:
    n = Counter(counts)
    y = n[1] / max(1, n[1] + 2 * n[2])
    d = [0.0] * 3
    if n[1]:
        d = [1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / max(1, n[2]),
             3 - 4 * y * n[4] / max(1, n[3])]
    return [0.0, *(min(max(factor * x, 0.1), j) for j, x in enumerate(d, 1))]


def test_the_tables_equal_the_formula_written_out():
    tokens = chain(400, 5)
    model = NGram.fit(tokens, 3, V)
    words = tokens.tolist()
    grams = [Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1)) for n in range(1, 4)]
    counts = [list(Counter(g[1:] for g in grams[n]).values()) for n in (1, 2)]
    discounts = [closed_form(c, model.factor) for c in [*counts, list(grams[2].values())]]
    p = written_out(words, 3, discounts)
    probe = chain(60, 6)
    want = [p(int(probe[i]), tuple(probe[i - 2:i].tolist()), 3) for i in range(2, 60)]
    assert np.allclose(np.exp(-model.nats(probe))[2:], want, rtol=1e-9)


def test_probabilities_sum_to_one_after_any_context(models):
    rng = np.random.default_rng(1)
    for order, model in models.items():
        for context in [*rng.integers(0, V, (20, 6)), chain(50)[10:16], chain(6000)[-6:]]:
            rows = np.array([[*context, w] for w in range(V)])
            p = [np.exp(-model.nats(row)[-1]) for row in rows]
            assert min(p) > 0 and np.isclose(sum(p), 1, atol=1e-12), order


def test_unseen_ids_have_a_chance_even_when_every_count_is_large():
    model = NGram.fit(np.tile([3, 4], 5000), 2, 4096)
    assert np.isfinite(model.nats(np.array([0, 4095, 3, 3, 4]))).all()


def test_the_order_of_the_source_is_the_best_order(models):
    fresh = chain(4000, 8)
    loss = {order: model.nats(fresh).mean() for order, model in models.items()}
    assert loss[3] < loss[2] < loss[1] and loss[3] <= min(loss.values()) + 0.02
    p = np.random.default_rng(99).dirichlet(np.full(V - 2, 0.3), (V, V))
    entropy = -np.log(p[fresh[:-2], fresh[1:-1], fresh[2:] - 2]).mean()
    assert entropy < loss[3] < entropy + 0.25


def test_one_counting_gives_what_single_fits_give(models):
    fresh = chain(300, 9)
    for order in (1, 2, 4):
        assert np.array_equal(NGram.fit(chain(6000), order, V).nats(fresh),
                              models[order].nats(fresh))
        assert models[order].factor in FACTORS


def test_later_tokens_do_not_change_earlier_surprise(models):
    tokens = chain(100, 3)
    assert np.array_equal(models[5].nats(tokens)[:60], models[5].nats(tokens[:60]))


def test_counts_are_the_occurrences_in_the_training_tokens(models):
    tokens = chain(6000)
    follows = defaultdict(Counter)
    for i in range(2, len(tokens)):
        follows[tuple(tokens[i - 2:i].tolist())][int(tokens[i])] += 1
    context, truth = max(follows.items(), key=lambda item: sum(item[1].values()))
    listed = models[3].counts([7, *context], V)
    assert {i: n for i, n, _ in listed} == dict(truth)
    assert [q for _, _, q in listed] == sorted((q for _, _, q in listed), reverse=True)
    for token, _, q in listed:
        stream = np.array([*context, token])
        assert np.isclose(q, np.exp(-models[3].nats(stream)[-1]))


def test_counts_shorten_a_context_never_seen(models):
    assert models[3].counts([0, 5], 4) == models[3].counts([1, 5], 4)
    assert models[3].counts([0, 0], 2) == models[3].counts([], 2)
    assert len(models[1].counts([5], 3)) == 3


@pytest.mark.parametrize("tokens, orders, words", [
    ([1, 2, 99], [1], "beyond 0..11"), ([-1, 2, 3], [1], "beyond"), ([], [1], "do not fit 0"),
    ([1, 2, 3], [2], "do not fit 3 tokens"), ([1, 2, 3], [], "do not fit"),
    ([1, 2, 3], [0], "do not fit")])
def test_impossible_fits_are_refused(tokens, orders, words):
    with pytest.raises(BadInput, match=words):
        fit_orders(np.array(tokens, int), orders, V)


def test_a_large_vocabulary_and_order_do_not_overflow():
    cycle = np.random.default_rng(0).permutation(65_536)[:20_000]
    began = time.process_time()
    model = NGram.fit(np.tile(cycle, 6), 5, 65_536)
    assert time.process_time() - began < 5
    assert model.nats(cycle)[4:].max() < 0.1 and model.nats(np.repeat(cycle, 2))[1::2].min() > 5
    assert [i for i, _, _ in model.counts(cycle[:4], 9)] == [cycle[4]]


def test_the_factor_is_the_one_of_least_loss_on_the_slice(monkeypatch):
    """Any other factor, counted on the rest, does worse on the blocks that were kept out."""
    tokens = chain(1000)
    held = baselines._spread(len(tokens))
    for order, model in fit_orders(tokens, [3, 4], V).items():
        loss = {}
        for factor in FACTORS:
            monkeypatch.setattr(baselines, "FACTORS", (factor,))
            rest = fit_orders(tokens[~held], [order], V)[order]
            loss[factor] = rest.nats(tokens[held]).mean()
        monkeypatch.undo()
        assert min(loss, key=loss.get) == model.factor and max(loss.values()) > min(loss.values())
