"""Five questions of newcomers, each answered by the study's own numbers."""

import itertools
import math
from collections import Counter

import numpy as np
from scipy.special import softmax

from tinylm import config as configs
from tinylm.look import heads, page, plots
from tinylm.look.page import p, shown, table
from tinylm.look.study import Study
from tinylm.model.baselines import NGram
from tinylm.model.capture import capture
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text import prepare
from tinylm.text.shards import Dataset
from tinylm.text.tokenizer import CONTROL, Tokenizer
from tinylm.train.batch import windows as count_windows
from tinylm.train.checkpoint import final_params

SEEN = 24  # tokens in the attention figure
WINDOWS = 32  # held-out windows in which the model's best token is looked for
CONTEXT = 12  # tokens of context shown


def subwords(study: Study) -> str:
    """Say what a token covers, against a character."""
    data, learnt = prepare.open_text(study.folder / "text")
    text = learnt.decode(data.heldout)
    counts, size = np.array(list(Counter(text).values())), int(data.documents.bytes.sum())
    entropy = float(-(counts * np.log2(counts / counts.sum())).sum()) / size
    T, each = study.record("target")["config"]["model"]["T"], len(text) / len(data.heldout)
    unigram = study.part("baselines.json")["tables"]["1"]["bits_per_byte"]
    return p(f"A token covers {each:.2f} characters ({size / len(data.heldout):.2f} bytes) of the "
             f"held-out text. A window of {T} tokens therefore shows {T * each:.0f} characters, "
             f"{each:.2f} times what {T} characters would, and the same text takes "
             f"{each:.2f} times fewer passes through the model. How often each one occurs already "
             f"gives {unigram:.3f} bits per byte for tokens; for characters it gives "
             f"{entropy:.3f} (measured on the held-out text itself, which flatters it).")


def bigram(study: Study) -> str:
    """Show the held-out token at which the model gains most on the bigram table."""
    data, tokenizer, config, params = _opened(study)
    rows = min(WINDOWS, count_windows(data.heldout, config.T))
    ids = np.asarray(data.heldout[: rows * config.T + 1], np.int64)
    windows = ids[:-1].reshape(rows, config.T)
    chance = [softmax(capture(config, params, w).logits, axis=-1) for w in windows]
    ours = np.concatenate(chance)[np.arange(len(ids) - 1), ids[1:]]
    model = NGram.fit(data.train, 2, data.V)
    theirs = np.exp(-model.nats(ids)[1:])
    known = (np.arange(len(ours)) % config.T >= CONTEXT) & (ids[1:] >= len(CONTROL))
    at = int(np.argmax(np.where(known, ours / theirs, 0)))
    here = chance[at // config.T][at % config.T]
    name = lambda i: f"“{shown(tokenizer.piece(int(i)))}”"  # noqa: E731
    tops = [[(i, q) for i, _, q in model.counts(ids[at : at + 1], 5)],
            [(i, here[i]) for i in np.argsort(-here)[:5]]]
    table_bits = study.part("baselines.json")["tables"]["2"]["bits_per_byte"]
    bits = study.record("target")["loss"]["bits_per_byte"]
    return p(
        f"Everything before the last token: the bigram table needs {table_bits:.3f} bits per "
        f"byte, the model {bits:.3f}. Among the first {len(ours):,} held-out tokens the model "
        f"gains most after “{shown(tokenizer.decode(ids[at - CONTEXT + 1 : at + 1]))}”: to the "
        f"token that follows, {name(ids[at + 1])}, the bigram gives {theirs[at]:.2%} and the model "
        f"{ours[at]:.1%}. On {np.mean(ours < theirs):.0%} of them the bigram gave more.") + (
        table((f"after {name(ids[at])} alone (bigram)", "after the whole window (model)"),
              itertools.zip_longest(*([f"{name(i)} {q:.1%}" for i, q in top] for top in tops),
                                    fillvalue=""), "likeliest next tokens", "text"))


def query_key(study: Study) -> str:
    """Work one attention weight out by hand, from the model's own query and key."""
    data, tokenizer, config, params = _opened(study)
    ids = np.asarray(data.heldout[: min(SEEN, config.T)])
    inside = capture(config, params, ids)
    words = [shown(tokenizer.piece(int(i))) for i in ids]
    l, h, t, s = heads.sharpest(inside)
    one = heads.worked(inside, l, h, t, s)
    weights, K = np.asarray(inside.weights[l, h]), config.head_width
    most, name = min(K, 8), f"layer {l + 1}, head {h + 1}"
    title = f"{name}: “{words[t]}” gives “{words[s]}” a weight of {weights[t, s]:.2f}"
    rows = [(label, *(f"{x:+.2f}" for x in v[:most])) for label, v in (
        (f"q of “{words[t]}”", one.q), (f"k of “{words[s]}”", one.k), ("product", one.q * one.k))]
    return p(
        f"How much one token wants what another offers. Shown is {name}, the one that looks back "
        f"most sharply in the first {len(ids)} held-out tokens. For the pair with its largest "
        f"weight the {K} products sum to q·k = {one.dot:.3f}; divided by √{K} that is "
        f"{one.score:.3f}; its exponential, {math.exp(one.score):.5g}, over the sum of all "
        f"{t + 1} visible ones, {one.total:.5g}, is the weight "
        f"{math.exp(one.score) / one.total:.3f} (the model computed {one.weight:.3f}).") + table(
        ("", *range(1, most + 1)), rows, f"the first {most} of {K} channels") + page.figure(
        plots.svg(plots.attention(weights, words, title)),
        "Each row is a token reading; the darker a cell, the more it takes from there.")


def tenfold(study: Study) -> str:
    """Say what ten times the compute buys by each frontier law."""
    flops, rows = study.record("target")["flops"]["exact"], []
    for name, line in study.frontiers().items():
        here, there = float(line.loss(flops)), float(line.loss(10 * flops))
        rows.append((name, f"{here:.4f}", f"{there:.4f}", f"{here - there:.4f}",
                     f"{(here - there) * study.bits_per_nat:.4f}", f"{1 - there / here:.2%}"))
    out = table(("law", "nats now", "nats at ten times", "gain, nats", "gain, bits per byte",
                 "gain"), rows, f"from {page.scientific(flops)} FLOPs, the held-out run's")
    e = study.fitted("exponents")
    return out + p(f"Spent as the minima suggest, it goes into {10 ** e['a']:.2f} times the "
                   f"parameters and {10 ** e['b']:.2f} times the tokens.")


def chat(study: Study) -> str:
    """Say what instruction tuning changed, in loss and in behaviour."""
    before, after = study.record("target")["loss"], study.record("chat")
    answers = after["answers_nats_per_token"]
    ends = {m: [s["ended"] for s in study.part("samples.json")["samples"] if s["model"] == m]
            for m in ("base", "chat")}
    share = {m: f"{sum(e)} of {len(e)}" for m, e in ends.items()}
    return table(("held out", "base", "chat"), [
        ("answers, nats per token", f"{answers['before']:.3f}", f"{answers['after']:.3f}"),
        ("plain text, nats per token", f"{before['nats_per_token']:.3f}",
         f"{after['loss']['nats_per_token']:.3f}"),
        ("samples that ended their turn", share["base"], share["chat"])]) + p(
        f"Tuning moved the loss on answers by {answers['after'] - answers['before']:+.3f} nats "
        "and that on plain text by "
        f"{after['loss']['nats_per_token'] - before['nats_per_token']:+.3f}.")


def _opened(study: Study) -> tuple[Dataset, Tokenizer, ModelConfig, Params]:
    values = study.record("target")["config"]["model"]
    config = configs.from_json(ModelConfig, values, "the target's model")
    return (*prepare.open_text(study.folder / "text"), config,
            final_params(study.folder / "target", config))


ANSWERS = {"Why subwords rather than characters?": subwords, "What can a bigram not see?": bigram,
           "What does the query-key product measure?": query_key,
           "What does ten times the compute buy?": tenfold,
           "What changes between base and chat?": chat}
