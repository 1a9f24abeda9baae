"""The verbs that look inside a finished run: its tokens, predictions, heads and layers."""

import re
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional

from tinylm import files
from tinylm.config import BadInput, require
from tinylm.laws import forecast
from tinylm.look import (
    depth,
    growth,
    heads,
    next_word,
    page,
    plots,
    progress,
    terminal,
    tokens,
    tuned,
)
from tinylm.look.page import shown
from tinylm.look.study import Study
from tinylm.model import generate
from tinylm.model.baselines import NGram
from tinylm.model.capture import capture
from tinylm.text import prepare
from tinylm.text.tokenizer import BOS
from tinylm.train import checkpoint
from tinylm.verbs import folders, models, talk

TEXT = "The cat sat on the"
K = 8
READS = {"tokens": ("text",), "next": ("text", "beside", "k", "at"),
         "attention": ("text", "layer", "head", "pair", "at"), "heads": ("at",),
         "layers": ("text", "k", "at", "lens"), "growth": (), "isoflops": (), "frontier": (),
         "chat": ("text", "beside", "system")}
"""the options of each view"""
LONGEST = 2000  # characters of the text whose words are built piece by piece
WORD = 40  # and of one word
FREQUENT = 20  # most frequent ids listed


def look(view: Positional[Literal[
             "tokens", "next", "attention", "heads", "layers", "growth", "isoflops", "frontier",
             "chat"]],
         target: Positional[Path], text: str = TEXT, beside: tuple[Path, ...] = (),
         layer: int = 0, head: int = 0, pair: tuple[int, ...] = (), k: int = K,
         system: str = "", at: int = 0, lens: Path | None = None, prepared: Path | None = None,
         out: Path | None = None) -> None:
    """Look inside: tokens, next words, attention, heads, layers, growth, laws, answers in tokens.

    Args:
        view: what to look at
        target: folder of a run; for growth of a sweep, a study or a run that kept checkpoints; for
            isoflops and frontier of a study
        text: what is read
        beside: for next and chat: further runs of the same text, such as a study's position weights
        layer: for attention, from 1; 0 with head 0: the head that looks back most sharply
        head: for attention, from 1
        pair: for attention: two token numbers from 0, the one reading and the one read
        k: for next and layers: likeliest tokens shown
        system: for chat: a system prompt, which tuned runs answer with and without
        at: step of a checkpoint that the run kept (tinylm train --keep); 0: the last
        lens: for layers: the run's tuned lens (tinylm lens); none: the logit lens
        prepared: the prepared folder of the run, where it has moved
        out: write it too: .html, .svg, or its figure as .png (not of tokens, next and chat)
    """
    given = {"text": text != TEXT, "beside": beside, "layer": layer, "head": head, "pair": pair,
             "k": k != K, "system": system, "at": at, "lens": lens}
    for name in given:
        if given[name] and name not in READS[view]:
            raise BadInput(f"--{name} with {view}: it is for " + ", ".join(
                one for one in READS if name in READS[one]))
    if lens and at:
        raise BadInput(f"--lens {lens} with --at {at}: a lens is of the last step; leave one out")
    require("k", k, 1, 1000)
    draw = {"tokens": _tokens, "next": _next, "attention": _attention, "heads": _heads,
            "layers": _layers, "growth": _growth, "isoflops": _isoflops, "frontier": _frontier,
            "chat": _chat}[view]
    require("at", at, 0, 1e9)
    drawn = view not in ("tokens", "next", "chat")
    if out and out.suffix not in (".html", ".svg", *[".png"] * drawn):
        raise BadInput(f"--out {out}: {view} cannot be written so; give .html or .svg, or .png to "
                       "a view that is a figure")
    terminal.out.record = out is not None and (out.suffix == ".html" or not drawn)
    figure = draw(target, text, beside=beside, layer=layer, head=head, pair=pair, k=k,
                  system=system, at=at, fitted=lens, prepared=prepared)
    if at:
        terminal.show(f"after step {at} of {target}")
    if out:
        _write(figure, out, f"tinylm look {view} {target}")


def lens(run: Positional[Path], out: Path, steps: int = 250, seed: int = 0,
         prepared: Path | None = None) -> None:
    """Fit the tuned lens of a run: what each depth knows, in the language of the last.

    Args:
        run: folder of a finished run
        out: folder that it is written to
        steps: of tuned.ROWS windows of training text
        seed: of their order
        prepared: the prepared folder of the run, where it has moved
    """
    config, data, _ = models.opened(run, prepared)
    if config.kind != "transformer":
        raise BadInput(f"{run} is a {config.kind} model and has no layers; give a transformer")
    facts = {"kind": "tuned lens", "of": folders.finished(run)["id"], "steps": steps, "seed": seed}
    if not out.exists():
        with progress.bar("tuned lens", steps) as told:
            found = tuned.fit(config, checkpoint.final_params(run, config), data, steps, seed,
                              lambda step, nats: told(step, float(nats)))
        tuned.save(out, found.maps, **facts, before=found.before.tolist(),
                   after=found.after.tolist())
    kept = tuned.facts(out)
    if {k: kept.get(k) for k in facts} != facts:
        raise BadInput(f"{out} holds something else than this lens ({facts}); give another --out")
    for n, (before, after) in enumerate(zip(kept["before"], kept["after"], strict=True)):
        terminal.show(f"after {n or 'the embedding'}: {before:.3f} nats from the whole model's "
                      f"prediction by the logit lens, {after:.3f} by the tuned one (held-out text)")
    terminal.show(f"tinylm look layers {run} --lens {out}")


def _tokens(target, text, prepared, **_):
    learnt, data = _prepared(target, prepared)
    ids = learnt.encode(text)
    cut = tokens.pieces(learnt, ids)
    size = len(text.encode("utf-8", "surrogatepass"))
    terminal.show(tokens.coloured(cut, ids=True),
                  f"{len(text)} characters, {size} bytes, {len(ids)} tokens of a vocabulary of "
                  f"{learnt.V}" + (f": {size / len(ids):.2f} bytes a token" if len(ids) else ""))
    for word in dict.fromkeys(re.findall(r" ?\S+", text[:LONGEST])):
        steps = learnt.merges(word[:WORD])
        if len(steps) > 1:
            terminal.show(" → ".join("|".join(map(shown, step)) for step in steps))
    found = tokens.frequencies(data)
    terminal.show("most frequent in training: " + ", ".join(
        f"“{terminal.name_of(learnt, i)}” {n:,}" for i, n in zip(
            found.ids[:FREQUENT], found.counts[:FREQUENT], strict=True))
        + f"; {tokens.unused(found)} pieces and half-bytes never occur")
    terminal.show(*(f"{split}: " + ", ".join(f"{part} {b:.3f}" for part, b in parts.items())
                    + " bytes a token" for split, parts in tokens.bytes_per_token(data).items()))


def _next(target, text, beside, k, at, prepared, **_):
    config, data, learnt = models.opened(target, prepared)
    ids = np.concatenate([[BOS], learnt.encode(text)])
    found = {"bigram, by counts": next_word.counted(NGram.fit(data.train, 2, data.V), ids, k)}
    for folder in (*beside, target):
        config = _beside(folder, target, data.tokenizer_id, prepared)
        name = config.kind if config.kind != "transformer" else f"transformer, D={config.D}"
        found[f"{name} ({folder})"] = next_word.predicted(
            config, checkpoint.final_params(folder, config, at if folder == target else 0), ids, k)
    terminal.show(f"after “{shown(text)}”:", terminal.next_words(found, learnt))


def _attention(target, text, layer, head, pair, at, prepared, **_):
    config, _, inside, words, _ = _captured(target, text, at, prepared)
    require("layer", layer, 0, config.L)
    require("head", head, 0, config.H)
    if (layer == 0) != (head == 0):
        raise BadInput(f"--layer {layer} with --head {head}: give both from 1, or neither")
    if layer:
        l, h = layer - 1, head - 1
        t, s = len(words) - 1, int(np.asarray(inside.weights[l, h, -1]).argmax())
    else:
        l, h, t, s = heads.sharpest(inside)
    if pair:
        if len(pair) != 2 or not 0 <= pair[1] <= pair[0] < len(words):
            raise BadInput(f"--pair {' '.join(map(str, pair))} is not two token numbers, the one "
                           f"read at or before the one reading, both in 0..{len(words) - 1}")
        t, s = pair
    weights = np.asarray(inside.weights[l, h])
    terminal.show(f"layer {l + 1} of {config.L}, head {h + 1} of {config.H}",
                  terminal.heatmap(weights, words),
                  terminal.worked(heads.worked(inside, l, h, t, s), (words[t], words[s]), t + 1))
    return plots.attention(weights, words, f"layer {l + 1}, head {h + 1}")


def _heads(target, text, at, prepared, **_):
    config, _, _ = models.opened(target, prepared)
    found = heads.habits(config, checkpoint.final_params(target, config, at))
    terminal.show(terminal.habits(found))
    return plots.habits(found)


def _layers(target, text, k, at, fitted, prepared, **_):
    config, params, inside, words, learnt = _captured(target, text, at, prepared)
    maps = tuned.load(fitted, folders.finished(target)["id"]) if fitted else None
    found = depth.depth(config, params, inside, k, maps)
    terminal.show(terminal.depths(found, words, learnt))
    for n, (ids, p) in enumerate(zip(found.ids[:, -1], found.p[:, -1], strict=True)):
        terminal.show(f"at the last token, after {n or 'the embedding'}: " + ", ".join(
            f"“{terminal.name_of(learnt, i)}” {q:.1%}" for i, q in zip(ids, p, strict=True)))
    return plots.depths(found, words, [[terminal.name_of(learnt, i) for i in row]
                                       for row in found.ids[:, :, 0]])


def _chat(target, text, beside, system, prepared, **_):
    if system and not any(map(models.tuned, (target, *beside))):
        raise BadInput(f"--system with {target}: a base model knows no system prompt; name a tuned "
                       "run")
    _, _, learnt = models.opened(target, prepared)
    each = {one: _beside(one, target, learnt.id, prepared) for one in (target, *beside)}
    for folder, config in each.items():
        params, told = checkpoint.final_params(folder, config), models.tuned(folder)
        for head in ("", system) if system and told else ("",):
            ids, _ = talk.rendered([("user", text)], head, learnt, config.T, told)
            made = generate.sample(config, params, [ids], config.T, temperature=0.0)[0]
            terminal.show(f"{folder}" + f", told “{shown(head)}”" * bool(head),
                          tokens.coloured(tokens.pieces(learnt, ids), ids=True), "answers",
                          tokens.coloured(tokens.pieces(learnt, made), ids=True), "")


def _beside(folder, target, tokenizer_id, prepared):
    """Open the config of a run that is looked at beside another; refuse other ids for its text."""
    config, data, _ = models.opened(folder, prepared)
    if data.tokenizer_id != tokenizer_id:
        raise BadInput(f"{folder} was trained with tokenizer {data.tokenizer_id} and {target} with "
                       f"{tokenizer_id}; name runs of one prepared text")
    return config


def _growth(target, text, prepared, **_):
    if (target / "record.json").exists():
        runs = {target: folders.finished(target)}
    else:
        runs = growth.of_study(target, folders.records(target))
    config, data, _ = models.opened(next(iter(runs)), prepared)
    with progress.bar("growth") as told:
        rows = (growth.history(config, target, runs[target], data, told)
                if len(checkpoint.held(target)) > 1 else growth.ladder(runs, data, told))
    if not rows:
        raise BadInput(f"{target} holds no run that came to a loss; give the folder of a sweep")
    terminal.show(*terminal.growth(rows))
    if (target / "baselines.json").exists():
        for name, flops in growth.passed(rows, files.read_json(target / "baselines.json")[
                "tables"]).items():
            terminal.show(f"the {name} table is beaten " + (
                "by no run" if flops is None else f"from {flops:.3g} FLOPs on"))
    return plots.growth(rows)


def _isoflops(target, text, **_):
    study = Study(target)
    terminal.show(*progress.curves(_law(study)))
    return plots.isoflops(study)


def _frontier(target, text, **_):
    study, place = Study(target), target / "forecast.json"
    terminal.show(progress.law(_law(study)))
    terminal.show(progress.forecast(forecast.read(place), files.sha256(place)))
    terminal.show(progress.score(forecast.Score(**study.part("score.json"))))
    return plots.frontier(study)


def _law(study: Study):
    if not (study.folder / "law.json").exists():
        raise BadInput(f"{study.folder} holds no law.json; give the folder of a study, or see "
                       "tinylm fit for a sweep")
    return study.part("law.json")


def _captured(target, text, at, prepared):
    config, _, learnt = models.opened(target, prepared)
    ids = np.concatenate([[BOS], learnt.encode(text)])
    params = checkpoint.final_params(target, config, at)
    words = [terminal.name_of(learnt, i) for i in ids]
    return config, params, capture(config, params, ids), words, learnt


def _prepared(target, prepared):
    """Open the tokenizer and token files of a run or of a prepared folder itself."""
    if (target / "tokenizer").exists():
        data, learnt = prepare.open_text(target)
    else:
        _, data, learnt = models.opened(target, prepared)
    return learnt, data


def _write(figure, out: Path, title: str) -> None:
    if out.suffix == ".html":
        said = terminal.out.export_html(inline_styles=True, code_format="{code}")
        drawn = page.figure(plots.svg(figure), title) if figure else ""
        body = f'<div class="wide"><pre>{said}</pre></div>{drawn}'
        files.write_text(out, page.whole(title, body))
    elif out.suffix == ".png":
        files.write_bytes(out, plots.png(figure))
    else:
        files.write_text(out, plots.standalone(figure) if figure else terminal.svg(title))
