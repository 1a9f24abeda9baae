"""The page: static files, and what its tabs ask for as JSON."""

import asyncio
import contextlib
import functools
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tinylm import files
from tinylm.config import BadInput, from_json
from tinylm.look import depth, heads, next_word, plots, tokens
from tinylm.look.page import shown
from tinylm.look.study import Study
from tinylm.model.baselines import NGram
from tinylm.model.capture import Insides, capture
from tinylm.model.decoder import ModelConfig, Params
from tinylm.serve.api import body_of, chosen, refusal
from tinylm.serve.asked import Refused
from tinylm.serve.engine import Engine, Model
from tinylm.text import shards
from tinylm.text.tokenizer import BOS, FIRST
from tinylm.train import checkpoint, run

STATIC = Path(__file__).parent / "static"
LOCK, COUNTING = threading.Lock(), threading.Lock()
SEEN = 48
"""tokens of a text that are drawn, the first id included: what a screen shows"""
LONGEST = 20_000
"""characters that a tab takes"""


def routes(engine: Engine, rankings: Path | None = None) -> list[Any]:
    """Give the routes of the page over an engine's models; a person's `rankings` go to that file.
    """
    views = {"tokens": cut, "next": following, "attention": attention, "layers": layers,
             "law": law, "rank": functools.partial(rank, rankings)}
    found = [Route(f"/look/{name}", functools.partial(_shown, engine, view), methods=["POST"])
             for name, view in views.items()]
    return [*found, Mount("/", StaticFiles(directory=STATIC, html=True))]


async def _shown(engine: Engine, view: Callable[[Model, dict[str, Any]], Any],
                 http: Http) -> Response:
    try:
        body = await body_of(http)
        model = chosen(engine, body.get("model"))
        if not isinstance(body.get("text"), str) or len(body["text"]) > LONGEST:
            raise Refused("text", f"text is a text of at most {LONGEST} characters")
        return JSONResponse(await asyncio.to_thread(view, model, body))
    except BadInput as why:
        return refusal(why)


def cut(model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Cut a text into pieces, and its first words by the merges that built them."""
    found = tokens.pieces(model.tokenizer, model.tokenizer.encode(body["text"]))
    words = list(dict.fromkeys(re.findall(r"\s?\S+", body["text"][:400])))[:6]
    return {"pieces": [piece._asdict() for piece in found], "V": model.tokenizer.V,
            "bytes": len(body["text"].encode("utf-8", "surrogatepass")),
            "merges": [{"word": word.strip(), "steps": [
                [shown(p) for p in step] for step in model.tokenizer.merges(word[:41])]}
                for word in words]}


def following(model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Give the ten likeliest next tokens: by the model, by position weights, by counts."""
    said = model.tokenizer.encode(body["text"])
    ids = np.concatenate([[BOS], said[-model.config.T + 2:]])
    found = {f"transformer, D={model.config.D}": next_word.predicted(
        model.config, model.params, ids, 10)}
    if other := _position_weights(model.folder.resolve().parent / "position", model.tokenizer.id):
        found["position weights"] = next_word.predicted(*other, ids[-other[0].T:], 10)
    if model.tokens:
        found["bigram, by counts"] = next_word.counted(_bigram(model.tokens), ids, 10)
    return {"cut": _cut(len(ids), len(said)), "next": [{"name": name, "likeliest": [
        {**one._asdict(), "text": shown(model.tokenizer.piece(one.id)),
         "adds": model.tokenizer.decode([one.id]) if one.id >= FIRST else ""}
        for one in likeliest]}
        for name, likeliest in found.items()]}


def _bigram(tokens: Path) -> NGram:
    with COUNTING:  # a text that is being typed asks again before the first count has ended
        return _counted(tokens)


@functools.cache
def _counted(tokens: Path) -> NGram:
    data = shards.open_dataset(tokens)
    return NGram.fit(data.train, 2, data.V)


@functools.cache
def _position_weights(folder: Path, tokenizer: str) -> tuple[ModelConfig, Params] | None:
    """Open the study's position-weights net, where it has one of the same tokenizer."""
    for place in sorted(folder.rglob("record.json")):
        record = run.record(place.parent)
        if record and record["tokenizer_id"] == tokenizer:
            config = from_json(ModelConfig, record["config"]["model"], "model")
            return config, checkpoint.final_params(place.parent, config)
    return None


def attention(model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Give every head's weights and habits, and one weight worked out where `pair` names it."""
    inside, words, cut = _captured(model, body["text"])
    pair = body.get("pair")
    if pair is None:
        pair = heads.sharpest(inside)
    L, H, T = inside.weights.shape[:3]
    if (not isinstance(pair, list | tuple) or len(pair) != 4
            or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
            or not (0 <= pair[0] < L and 0 <= pair[1] < H and 0 <= pair[3] <= pair[2] < T)):
        raise Refused("pair", "pair is layer, head, reading and read token, from 0, of "
                              f"{L} layers, {H} heads and {T} tokens")
    one = heads.worked(inside, *pair)
    return {"words": words, "cut": cut, "habits": _habits(model),
            "weights": np.round(np.asarray(inside.weights, float), 4).tolist(), "pair": list(pair),
            "worked": {k: np.round(v, 4).tolist() for k, v in one._asdict().items()}}


@functools.cache
def _habits(model: Model) -> dict[str, Any]:
    """Give heads.Habits of a model; nothing for one whose context is too short to repeat."""
    if model.config.T < 4:
        return {}
    found = heads.habits(model.config, model.params)
    return {name: np.round(scores, 3).tolist() for name, scores in found._asdict().items()}


def layers(model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Give the likeliest next tokens after each layer."""
    inside, words, cut = _captured(model, body["text"])
    found = depth.depth(model.config, model.params, inside, 3)
    names = [[[shown(model.tokenizer.piece(int(i))) for i in one] for one in row]
             for row in found.ids]
    return {"words": words, "cut": cut, "names": names, "p": np.round(found.p, 4).tolist(),
            "rank": found.rank.tolist(), "agree": found.agree.tolist(),
            "nats": np.round(found.nats, 4).tolist(), "settled": depth.settled(found).tolist()}


def law(model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Draw the figures of the study that the run belongs to, as SVG; none where it is of none."""
    study, drawn = Study(model.folder.resolve().parent), []
    for name, make in (("loss", plots.loss_axis), ("isoflops", plots.isoflops),
                       ("frontier", plots.frontier), ("rates", plots.rates)):
        with contextlib.suppress(BadInput):
            figure = make(study)
            drawn.append({"name": name, "title": figure.axes[0].get_title("left"),
                          "svg": plots.standalone(figure)})
    return {"figures": drawn}


def rank(rankings: Path | None, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Append two to four answers, best first, to the file that `tinylm reward --data` reads.

    Without answers, say which file that is.
    """
    said = body.get("responses")
    if "responses" not in body:
        return {"keeps": str(rankings or "")}
    if rankings is None:
        raise Refused("responses", "this server keeps no rankings; start it with --rankings FILE")
    if (not isinstance(said, list) or not 2 <= len(said) <= 4
            or not all(isinstance(s, str) and s.strip() and len(s) <= LONGEST for s in said)
            or len(set(said)) < len(said)):
        raise Refused("responses", "responses are two to four different texts, best first")
    if not body["text"].strip():
        raise Refused("text", "text is the prompt that was answered")
    row = {"prompt": body["text"], "responses": said}
    with LOCK:
        try:
            before = rankings.read_bytes()[-1:] if rankings.exists() else b""
            ended = before in (b"", b"\n")  # else a line was torn, or typed by hand
            files.append_lines(rankings, ["", json.dumps(row)][ended:])
        except OSError as fault:
            raise Refused("", f"the ranking was not kept: {fault}", "server_error", 500) from None
    return {"kept": str(rankings)}


def _captured(model: Model, text: str) -> tuple[Insides, list[str], str]:
    said = model.tokenizer.encode(text)
    ids = np.concatenate([[BOS], said[-min(SEEN, model.config.T) + 1:]])
    return (capture(model.config, model.params, ids),
            [shown(model.tokenizer.piece(int(i))) for i in ids], _cut(len(ids), len(said)))


def _cut(read: int, said: int) -> str:
    """Say what of a long text was read, the first id not counted; nothing if all of it was."""
    return f"the last {read - 1} of {said} tokens" if read <= said else ""
