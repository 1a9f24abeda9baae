"""Five questions of newcomers, each answered by the study's own numbers."""

import math
from collections import Counter

import numpy as np
from scipy.special import log_softmax, softmax

from tinylm import config as configs
from tinylm.look import page, plots
from tinylm.look.page import p, shown, table
from tinylm.look.study import Study
from tinylm.model.baselines import NGram
from tinylm.model.capture import capture
from tinylm.model.decoder import ModelConfig, Params
from tinylm.stages.sft import load_params
from tinylm.text import prepare, shards
from tinylm.text.tokenizer import CONTROL

SEEN = 24  # tokens in the attention figure
WINDOWS = 32  # held-out windows in which the bigram's worst miss is looked for
CONTEXT = 12  # tokens of context shown


def subwords(study: Study) -> str:
    """Say what a token covers, against a character."""
    data = shards.open_dataset(study.folder / "text/tokens")
    text = prepare.open_tokenizer(study.folder / "text").decode(data.heldout)
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
    """Show the held-out token that the bigram table misses by most and the model does not."""
    data = shards.open_dataset(study.folder / "text/tokens")
    tokenizer = prepare.open_tokenizer(study.folder / "text")
    config, params = _target(study)
    rows = min(WINDOWS, (len(data.heldout) - 1) // config.T)
    ids = np.asarray(data.heldout[: rows * config.T + 1], np.int64)
    logits = np.concatenate([capture(config, params, w).logits
                             for w in ids[:-1].reshape(rows, config.T)])
    ours = -log_softmax(logits, axis=-1)[np.arange(len(logits)), ids[1:]]
    model = NGram.fit(data.train, 2, data.V)
    gain = model.nats(ids)[1:] - ours
    known = (np.arange(len(gain)) % config.T >= CONTEXT) & (ids[1:] >= len(CONTROL))
    at = int(np.argmax(np.where(known, gain, -np.inf)))
    seen, true = ids[at - CONTEXT + 1 : at + 1], ids[at + 1]
    best = np.argsort(-logits[at])[:5]
    chance, counted = softmax(logits[at]), model.counts(ids[at : at + 1], 5)
    pieces = [[f"{shown(tokenizer.piece(i))}  {q:.1%}" for i, q in top] for top in
              ([(i, q) for i, _, q in counted], [(int(i), chance[i]) for i in best])]
    pieces = [column + [""] * (5 - len(column)) for column in pieces]
    both = {name: study.part("baselines.json")["tables"]["2"]["bits_per_byte"] if name == "bigram"
            else study.record("target")["loss"]["bits_per_byte"] for name in ("bigram", "model")}
    return p(
        f"Everything before the last token: the bigram table needs {both['bigram']:.3f} bits per "
        f"byte, the model {both['model']:.3f}. In the first {len(gain)} held-out tokens the "
        f"bigram's largest disadvantage is here, after “{shown(tokenizer.decode(seen))}”: the next "
        f"token is “{shown(tokenizer.piece(int(true)))}”, to which the bigram gives "
        f"{math.exp(-ours[at] - gain[at]):.2%} and the model {math.exp(-ours[at]):.1%}. On "
        f"{np.mean(gain < 0):.0%} of these tokens the bigram gave more than the model.") + table(
        ("", "after “" + shown(tokenizer.piece(int(ids[at]))) + "” alone (bigram)",
         "after the whole window (model)"),
        zip(("1st", "2nd", "3rd", "4th", "5th"), *pieces, strict=True), "likeliest next tokens")


def query_key(study: Study) -> str:
    """Work one attention weight out by hand, from the model's own query and key."""
    tokenizer = prepare.open_tokenizer(study.folder / "text")
    config, params = _target(study)
    ids = np.asarray(shards.open_dataset(study.folder / "text/tokens").heldout[:SEEN])[: config.T]
    inside = [np.asarray(a, np.float64) for a in capture(config, params, ids)]
    words = [shown(tokenizer.piece(int(i))) for i in ids]
    back = np.tril(inside[2], -1)
    back[..., 0] = 0  # the first token is every head's place to look when it needs nothing
    layer, head = np.unravel_index(back.max(-1).mean(-1).argmax(), back.shape[:2])
    t, s = map(int, np.unravel_index(back[layer, head].argmax(), back.shape[2:]))
    q = inside[0][layer, t, head]
    keys = inside[1][layer, : t + 1, head * config.groups // config.H]
    dots, weights = keys @ q, inside[2][layer, head, t]
    scores, K = dots / math.sqrt(config.head_width), config.head_width
    total, most = np.exp(scores).sum(), min(K, 8)
    name = f"layer {layer + 1}, head {head + 1}"
    title = f"{name}: “{words[t]}” gives “{words[s]}” a weight of {weights[s]:.2f}"
    drawing = plots.svg(plots.attention(inside[2][layer, head], words, title))
    rows = [(label, *(f"{x:+.2f}" for x in v[:most]), "…" if most < K else "")
            for label, v in ((f"q of “{words[t]}”", q), (f"k of “{words[s]}”", keys[s]),
                             ("product", q * keys[s]))]
    return p(
        f"How much one token wants what another offers. Shown is {name}, the one that looks back "
        f"most sharply in the first {len(ids)} held-out tokens. For the pair with its largest "
        f"weight the {K} products sum to q·k = {dots[s]:.3f}; divided by √{K} that is "
        f"{scores[s]:.3f}; its exponential, {math.exp(scores[s]):.5g}, over the sum of all "
        f"{t + 1} visible ones, {total:.5g}, is the weight {math.exp(scores[s]) / total:.3f} "
        f"(the model computed {weights[s]:.3f}).") + table(
        ("", *(f"{i + 1}" for i in range(most)), ""), rows,
        f"the first {most} of {K} channels") + page.figure(
        drawing, "Each row is a token reading; the darker a cell, the more it takes from there.")


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
    ends = {m: [s["ended"] for s in study.part("samples.json") if s["model"] == m]
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


def _target(study: Study) -> tuple[ModelConfig, Params]:
    values = study.record("target")["config"]["model"]
    config = configs.from_json(ModelConfig, values, "the target's model")
    return config, load_params(study.folder / "target", config)


ANSWERS = {"Why subwords rather than characters?": subwords, "What can a bigram not see?": bigram,
           "What does the query-key product measure?": query_key,
           "What does ten times the compute buy?": tenfold,
           "What changes between base and chat?": chat}
