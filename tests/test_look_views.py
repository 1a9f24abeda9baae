"""Views of a model's inside: each equals what is counted or multiplied out by hand."""

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_model_decoder import drawn, forward
from test_text_tokenizer import learnt, prose  # noqa: F401

from tinylm.config import BadInput
from tinylm.evaluate import heldout
from tinylm.look import depth, growth, heads, next_word, plots, terminal, tokens, tuned
from tinylm.model.baselines import NGram
from tinylm.model.capture import capture, streams
from tinylm.model.decoder import ModelConfig, init
from tinylm.text import shards
from tinylm.text.corpora import load

CONFIG = ModelConfig(V=60, D=16, L=3, H=4, G=2, T=24)


@pytest.fixture(scope="module")
def inside():
    ids = np.random.default_rng(0).integers(6, CONFIG.V, 20)
    return capture(CONFIG, drawn(CONFIG), ids)


@pytest.fixture(scope="module")
def text(learnt, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("views")
    for n in range(12):
        (folder / f"{n:02d}.txt").write_text(prose(n, 300))
    corpus = load(sorted(map(str, folder.glob("*.txt"))), heldout=0.2)
    return shards.write(folder / "tokens", corpus, learnt)


def test_attention_s_rows_sum_to_one_and_nothing_looks_ahead(inside):
    weights = np.asarray(inside.weights)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert (weights[..., ~np.tri(20, dtype=bool)] == 0).all() and (weights >= 0).all()


def test_a_weight_worked_out_by_hand_is_the_model_s(inside):
    for layer, head, t, s in ((0, 0, 5, 5), (1, 3, 19, 2), (2, 2, 7, 0)):
        one = heads.worked(inside, layer, head, t, s)
        assert np.exp(one.score) / one.total == pytest.approx(one.weight, rel=1e-4)
        assert one.dot == pytest.approx(float((one.q * one.k).sum()))
        assert one.weight == float(inside.weights[layer, head, t, s])


def test_the_sharpest_head_s_largest_weight_is_found(inside):
    layer, head, t, s = heads.sharpest(inside)
    assert 0 < s < t
    weights = np.asarray(inside.weights[layer, head])
    assert weights[t, s] == max(weights[a, b] for a in range(20) for b in range(1, a))


def test_the_lens_reads_the_last_layer_as_the_model_does(inside):
    found = depth.depth(CONFIG, drawn(CONFIG), inside, 3)
    p = np.exp(np.asarray(inside.logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    assert (found.ids[-1] == np.argsort(-p, axis=-1)[:, :3]).all()
    np.testing.assert_allclose(found.p[-1], -np.sort(-p, axis=-1)[:, :3], rtol=1e-4)
    assert found.agree[-1] == 1 and abs(found.nats[-1]) < 1e-6 and (found.rank[-1] == 0).all()
    assert (found.nats[:-1] > 0).all() and found.ids.shape == (4, 20, 3)


def test_the_lens_s_shares_ranks_and_depths_are_those_counted_by_hand(inside):
    found = depth.depth(CONFIG, drawn(CONFIG), inside, 60)
    for l in range(4):
        places = [found.ids[l, t].tolist().index(found.ids[-1, t, 0]) for t in range(20)]
        assert places == found.rank[l].tolist()
        assert found.agree[l] == np.mean([place == 0 for place in places])
    for t, at in enumerate(depth.settled(found)):
        assert (found.rank[at:, t] == 0).all() and (at == 0 or found.rank[at - 1, t] > 0)


def test_a_tuned_lens_starts_as_the_logit_lens_and_comes_nearer_on_text_it_has_not_seen(inside):
    params, rng = drawn(CONFIG), np.random.default_rng(0)
    text = rng.integers(0, 60, 20)
    np.testing.assert_allclose(streams(CONFIG, params, text), capture(CONFIG, params, text).stream,
                               rtol=1e-5, atol=1e-6)
    none = tuned.Maps(jnp.zeros((3, 16, 16)), jnp.zeros((3, 16)))
    plain = depth.depth(CONFIG, params, inside)
    for a, b in zip(plain, depth.depth(CONFIG, params, inside, maps=none), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    data = SimpleNamespace(train=rng.integers(0, 60, 4000), heldout=rng.integers(0, 60, 800))
    found = tuned.fit(CONFIG, params, data, 300)
    assert (found.after < 0.8 * found.before).all() and found.after[2] < found.after[0]
    same = tuned.fit(CONFIG, params, data, 300)
    assert all((a == b).all() for a, b in zip(found.maps, same.maps, strict=True))
    seen = depth.depth(CONFIG, params, inside, maps=found.maps)
    assert (seen.nats[:-1] < plain.nats[:-1]).all() and (seen.ids[-1] == plain.ids[-1]).all()


def planted() -> tuple[ModelConfig, dict]:
    """One layer whose first head goes on with what followed a token's last occurrence.

    Embeddings are one-hot, queries and keys too; smearing makes a key that of the token before it.
    The first channels, which rotation turns, stay empty. The value is put on the stream.
    """
    config = ModelConfig(V=200, D=208, L=1, H=1, K=416, T=32, rope_theta=1e30)
    params = jax.tree.map(np.array, init(config, jax.random.key(0)))
    attention = params["layers"]["self_attn"]
    hot = np.eye(200, 208, dtype=np.float32)
    params["embed_tokens"]["weight"] = hot
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention[name][...] = 0
    for token in range(200):
        for name in ("q_proj", "k_proj"):  # channels k and k + K/2 turn together, k = 0 by 1
            attention[name][0, token, 0, 1 + token] = 1
        attention["v_proj"][0, token, 0, token] = 1
        attention["o_proj"][0, 0, token, token] = 2
    attention["k_smear"][...] = 8.0
    params["layers"]["mlp"]["down_proj"][...] = 0
    return config, params


def test_a_planted_induction_head_is_found_and_makes_repeats_easy():
    found = heads.habits(*planted())
    assert found.induction[0, 0] > 0.8 and found.previous[0, 0] < 0.3
    assert found.nats[0] - found.nats[1] > 1
    blank = heads.habits(CONFIG, drawn(CONFIG))
    assert blank.induction.max() < 0.3 and abs(blank.nats[0] - blank.nats[1]) < 0.5


def test_a_context_without_room_for_a_repeat_is_refused():
    with pytest.raises(BadInput, match="T=3 has no room"):
        heads.habits(ModelConfig(V=40, D=16, T=3), {})


def test_habits_are_the_means_of_the_weights(monkeypatch):
    seen = []

    def watched(config, params, ids):
        seen.append((ids, capture(config, params, ids)))
        return seen[-1][1]

    monkeypatch.setattr(heads, "capture", watched)
    found, half = heads.habits(CONFIG, drawn(CONFIG), seed=3, count=2), 12
    for layer, head in np.ndindex(3, 4):
        weights = [np.asarray(i.weights[layer, head], np.float64) for _, i in seen]
        assert found.previous[layer, head] == pytest.approx(np.mean(
            [w[t, t - 1] for w in weights for t in range(1, 24)]))
        assert found.first[layer, head] == pytest.approx(np.mean(
            [w[t, 0] for w in weights for t in range(1, 24)]))
        assert found.induction[layer, head] == pytest.approx(np.mean(
            [w[t, t - half + 1] for w in weights for t in range(half, 23)]))
    for ids, _ in seen:
        assert (ids[:half] == ids[half:]).all() and ids.min() >= 22
    p = [np.asarray(jax.nn.log_softmax(i.logits), np.float64) for _, i in seen]
    again = [-p[n][t - 1, ids[t]] for n, (ids, _) in enumerate(seen) for t in range(13, 24)]
    assert found.nats[1] == pytest.approx(np.mean(again), rel=1e-5)


def test_what_comes_next_is_what_was_counted_and_what_the_model_says(text):
    table, ids = NGram.fit(text.train, 2, text.V), np.asarray(text.heldout[:9])
    for one in next_word.counted(table, ids, 5):
        pairs = zip(text.train[:-1], text.train[1:], strict=True)
        assert one.count == sum((a, b) == (ids[-1], one.id) for a, b in pairs) > 0
    config = ModelConfig(V=text.V, D=16, L=1, H=2, T=16)
    logits = forward(config, drawn(config), jnp.asarray(ids, jnp.int32)[None])[0, -1]
    p = np.asarray(jax.nn.softmax(logits))
    said = next_word.predicted(config, drawn(config), ids, 4)
    assert [one.id for one in said] == np.argsort(-p)[:4].tolist()
    assert [one.p for one in said] == pytest.approx(np.sort(p)[::-1][:4].tolist(), rel=1e-5)


def test_pieces_are_escaped_and_frequencies_are_counts(text, learnt):  # noqa: F811
    cut = [*tokens.pieces(learnt, learnt.encode("the river")), tokens.Piece(99, "<b>&")]
    assert tokens.spans(cut[-1:]) == '<span class="c0" title="99">&lt;b&gt;&amp;</span>'
    assert tokens.coloured(cut).plain == "the·river<b>&" and tokens.spans(cut).count("<span") > 2
    assert tokens.coloured(cut, ids=True).plain.endswith("<b>&99 ")
    found, counts = tokens.frequencies(text), Counter(text.train.tolist())
    assert {int(i): int(n) for i, n in zip(*found, strict=True) if n} == dict(counts)
    assert (np.diff(found.counts) <= 0).all() and found.counts.sum() == len(text.train)
    assert tokens.unused(found) == sum(i not in counts for i in range(6, text.V))


def test_loss_by_position_and_by_frequency_adds_up_to_the_loss(text):
    config = ModelConfig(V=text.V, D=16, L=1, H=2, T=16)
    nats = heldout.each(config, drawn(config), text)
    whole = heldout.heldout(config, drawn(config), text).nats_per_token
    by_position, rows = growth.by_position(nats, 16), growth.by_frequency(nats, text, 4)
    for groups in (by_position, rows):
        assert sum(r["tokens"] for r in groups) == len(nats)
        assert sum(r["tokens"] * r["nats"] for r in groups) / len(nats) == pytest.approx(
            whole, rel=1e-5)
    assert [r["at_most"] for r in by_position] == [1, 2, 4, 8, 16]
    assert [r["at_most"] for r in growth.by_position(nats[:60], 12)] == [1, 2, 4, 8, 12]
    windows = nats.reshape(-1, 16)
    for row, place in zip(by_position, (np.s_[:1], np.s_[1:2], np.s_[2:4]), strict=False):
        assert row["nats"] == pytest.approx(windows[:, place].mean(), rel=1e-5)
    seen = Counter(text.train.tolist())
    rare = [n for n, token in zip(nats, text.heldout[1:], strict=False)
            if seen[int(token)] <= rows[0]["at_most"]]
    assert rows[0]["nats"] == pytest.approx(np.mean(rare), rel=1e-5)


def test_the_run_that_first_beats_a_table_is_named():
    rows = [{"FLOPs": 1e9, "bits_per_byte": 3.0}, {"FLOPs": 2e9, "bits_per_byte": 2.0}]
    tables = {"1": {"bits_per_byte": 2.5}, "2": {"bits_per_byte": 1.5}}
    assert growth.passed(rows, tables) == {"1-gram": 2e9, "2-gram": None}


def test_the_best_run_of_every_budget_is_kept():
    runs = {Path(name): {"flops": {"exact": flops},
                         "loss": nats and {"nats_per_token": nats}}
            for name, flops, nats in (("a", 1e9, 3.0), ("b", 1.01e9, 2.9), ("c", 2e9, 2.5),
                                      ("d", 2e9, 2.7), ("e", 2e9, None), ("f", 9e9, None))}
    assert list(growth.best(runs)) == [Path("b"), Path("c")]


def test_a_heatmap_in_a_terminal_has_a_row_a_token_and_says_what_it_reads_most():
    weights = np.array([[1.0, 0, 0], [0.25, 0.75, 0], [0.6, 0.3, 0.1]])
    lines = terminal.heatmap(weights, ["a", "bb", "c"]).plain.splitlines()
    assert [line.split() for line in lines] == [
        ["a", "1.00", "of", "a"], ["bb", "0.75", "of", "bb"], ["c", "0.60", "of", "a"]]


def test_a_heatmap_is_one_line_a_token_however_narrow_the_terminal(monkeypatch):
    drawn = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=drawn, width=40))
    terminal.show(terminal.heatmap(np.tril(np.ones((60, 60))), ["日本", *["word"] * 59]))
    lines = drawn.getvalue().splitlines()
    assert len(lines) == 61 and lines[0].startswith("日本  ") and lines[59].startswith("word ")
    assert all(line.endswith(("of 日本", "")) for line in lines) and len(lines[59]) > 60


def test_figures_of_the_inside_hold_what_they_are_given(inside):
    found = depth.depth(CONFIG, drawn(CONFIG), inside, 2)
    words = ["$x$", *"abcdefghijklmnopqrs"]
    drawn_ = plots.standalone(plots.depths(found, words, [["y"] * 20] * 4))
    assert "$x$" in drawn_ and drawn_.count(">y<") == 80
    scores = SimpleNamespace(previous=np.eye(2), first=np.eye(2) / 4, induction=np.eye(2) / 8)
    assert ">0.25<" in plots.standalone(plots.habits(scores))
