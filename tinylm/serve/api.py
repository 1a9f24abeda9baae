"""The endpoint: /v1/models, /v1/completions and /v1/chat/completions as OpenAI's clients ask."""

import asyncio
import functools
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tinylm.config import BadInput
from tinylm.serve import asked
from tinylm.serve.answers import Answer, Delta
from tinylm.serve.asked import Dials, Refused
from tinylm.serve.engine import Engine, Model, Part, Request
from tinylm.text import lines
from tinylm.text.chat import prompted, read
from tinylm.text.tokenizer import BOS

LARGEST = 1_000_000
"""bytes of a request's body"""
PATIENCE = 10.0
"""seconds in which a body must arrive"""
SEEDS = 2**32 - 16
"""the engine's seeds, so that those of a request's choices are below 2 to the 32nd"""
TOO_LARGE = Refused("", f"the body has more than {LARGEST} bytes; send less", "too_large", 413)


def routes(engine: Engine) -> list[Route]:
    """Give the endpoint's routes over an engine's models."""
    return [Route("/v1/models", functools.partial(listed, engine)),
            Route("/v1/models/{name:path}", functools.partial(listed, engine)),
            Route("/v1/completions", functools.partial(answered, engine, False), methods=["POST"]),
            Route("/v1/chat/completions", functools.partial(answered, engine, True),
                  methods=["POST"])]


async def listed(engine: Engine, http: Http) -> Response:
    """Name the models, or one of them."""
    rows = [{"id": name, "object": "model", "created": 0, "owned_by": "tinylm",
             "kind": "chat" if model.tuned else "base", "context": model.config.T}
            for name, model in engine.models.items()]
    if (name := http.path_params.get("name")) is None:
        return JSONResponse({"object": "list", "data": rows})
    try:
        found = chosen(engine, name)
    except Refused as refused:
        return refusal(refused)
    return JSONResponse(rows[list(engine.models).index(found.name)])


async def answered(engine: Engine, chat: bool, http: Http) -> Response:
    """Answer one request, whole or as server-sent events."""
    try:
        body = await body_of(http)
        want = asked.dials(body, chat)
        model = chosen(engine, want.model)
        said = asked.messages(body) if chat else asked.prompts(body)
        given = await asyncio.to_thread(read_in, model, said, chat)
        asking = Asking(engine, model, want, given, chat)
    except BadInput as refused:
        return refusal(refused)
    if want.stream:
        return StreamingResponse(asking.events(), media_type="text/event-stream")
    try:
        return JSONResponse(await asking.whole(http))
    except Exception as fault:
        return refusal(Refused("", f"the model failed: {fault}", "server_error", 500))


def chosen(engine: Engine, name: Any) -> Model:
    """Give the model of that name."""
    if not isinstance(name, str) or name not in engine.models:
        raise Refused("model", f"no model {name!r} here; /v1/models names them", "model_not_found",
                      404)
    return engine.models[name]


async def body_of(http: Http) -> dict[str, Any]:
    """Read a JSON object of at most LARGEST bytes that arrives within PATIENCE."""
    data, told = bytearray(), http.headers.get("content-length", "0")
    try:
        if told.isdecimal() and int(told) > LARGEST:
            raise TOO_LARGE
        async with asyncio.timeout(PATIENCE):
            async for part in http.stream():
                data += part
                if len(data) > LARGEST:
                    raise TOO_LARGE
        found = json.loads(bytes(data).decode(), object_pairs_hook=lines.once)
        if b"\\u" in data:  # half of a character alone can be written so, and nowhere else
            json.dumps(found, ensure_ascii=False).encode()
    except TimeoutError:
        raise Refused("", f"the body did not arrive within {PATIENCE:g} s", "timeout", 408
                      ) from None
    except (ValueError, RecursionError) as bad:
        raise Refused("", f"the body is no JSON: {bad}") from None
    if not isinstance(found, dict):
        raise Refused("", "the body is no JSON object")
    return found


def refusal(why: BadInput) -> JSONResponse:
    """Give an error as OpenAI's clients read it."""
    param, code, status = (getattr(why, k, d) for k, d in (
        ("param", None), ("code", None), ("status", 400)))
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": str(why), "type": kind, "param": param or None,
                                   "code": code}}, status)


def read_in(model: Model, said: Sequence[Any], chat: bool) -> list[np.ndarray]:
    """Turn a talk, or prompts, into ids; what cannot fit the context is not cut into tokens."""
    most = int((model.config.T - 1) * model.tokenizer.lengths.max())
    for size in ([sum(len(text.encode()) for _, text in said)] if chat else
                 [len(text.encode()) for text in said]):
        if size > most:
            raise Refused("messages" if chat else "prompt",
                          f"{size} bytes do not fit the context of {model.name}, "
                          f"T={model.config.T} tokens of {most} bytes at most; send less",
                          "context_length_exceeded")
    return [talk(model, said)] if chat else [
        np.concatenate([[BOS], model.tokenizer.encode(text)]) for text in said]


async def missing(http: Http, why: HTTPException) -> Response:
    """Say that a path, or a method of it, is not there, as OpenAI's clients read it."""
    return refusal(Refused("", f"{http.method} {http.url.path}: {why.detail}", None,
                           why.status_code))


def talk(model: Model, messages: Sequence[tuple[str, str]]) -> np.ndarray:
    """Render a talk; a system prompt for a base model is refused."""
    if not model.tuned and "system" in (role for role, _ in messages):
        raise Refused("messages", f"{model.name} is a base model and knows no system prompt; leave "
                                  "it out or ask a tuned model")
    return prompted(messages, model.tokenizer, model.tuned)


class Asking:
    """One HTTP request's choices on their way: `n` answers to each prompt."""

    def __init__(self, engine: Engine, model: Model, want: Dials, prompts: list[np.ndarray],
                 chat: bool):
        self.model, self.want, self.prompts, self.chat = model, want, prompts, chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex[:24]}"
        self.created = int(time.time())
        loop, self.news = asyncio.get_running_loop(), asyncio.Queue()
        seed = random.getrandbits(31) if want.seed is None else want.seed % SEEDS
        reader = (functools.partial(read, tokenizer=model.tokenizer) if chat and model.tuned
                  else model.tokenizer.decode)
        self.answers, self.requests, self.logprobs = [], [], []
        self.left = len(prompts) * want.n
        for number in range(len(prompts) * want.n):
            def told(part: Any, number: int = number) -> None:
                loop.call_soon_threadsafe(self.news.put_nowait, (number, part))

            self.answers.append(Answer(model.tokenizer, reader, want.stop, want.logprobs))
            self.requests.append(Request(model.name, prompts[number // want.n], want.count,
                                         want.temperature, want.top_p, seed + number % want.n,
                                         told, bool(want.logprobs)))
            self.logprobs.append([])
        try:
            for request in self.requests:
                engine.ask(request)
        except BadInput as refused:
            raise Refused("messages" if chat else "prompt", str(refused),
                          "context_length_exceeded") from None

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta, bool]]]:
        """Yield what has come, (answer, what was added, whether it ended), until all have ended.

        Leaving early cancels the rest.
        """
        try:
            while self.left:
                come = [await self.news.get()]
                while not self.news.empty():
                    come.append(self.news.get_nowait())
                yield [(number, self._added(number, part), part is None) for number, part in come]
        finally:
            for request in self.requests:
                request.cancelled = True

    def _added(self, number: int, part: Part | None | Exception) -> Delta:
        answer, request = self.answers[number], self.requests[number]
        if isinstance(part, Exception):
            raise part
        if part is None:
            self.left -= 1
            return Delta(answer.finish(), [])
        if answer.reason is not None:
            return Delta("", [])
        new = answer.add(part)
        self.logprobs[number] += new.logprobs
        request.cancelled = answer.reason is not None
        return new

    async def whole(self, http: Http) -> dict[str, Any]:
        """Wait for all answers and give them in one."""
        async for _ in self.deltas():
            if await http.is_disconnected():
                break
        choices = []
        for number, answer in enumerate(self.answers):
            choice = {"index": number, "finish_reason": answer.reason,
                      "logprobs": self._logprobs(self.logprobs[number])}
            choices.append({**choice, "message": {"role": "assistant", "content": answer.text,
                                                  "refusal": None}} if self.chat else
                           {**choice, "text": answer.text})
        return {**self._head("chat.completion" if self.chat else "text_completion"),
                "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Give server-sent events: each delta as it comes, the reasons, usage where asked for."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        if self.chat:
            for number in range(len(self.answers)):
                first = {"role": "assistant", "content": ""}
                yield _event({**head, "choices": [{"index": number, "finish_reason": None,
                                                   "delta": first}]})
        try:
            async for come in self.deltas():
                rows = [self._chunk(*row) for number, (text, logprobs), ended in come for row in (
                    [(number, text, logprobs, None)] * bool(text or logprobs)
                    + [(number, "", [], self.answers[number].reason)] * ended)]
                told = [_event({**head, "choices": [row]}) for row in rows]
                if not self.left and self.want.usage:
                    told.append(_event({**head, "choices": [], "usage": self._usage()}))
                if said := "".join(told) + "data: [DONE]\n\n" * (not self.left):
                    yield said
        except Exception as fault:
            yield _event({"error": {"message": f"the model failed: {fault}",
                                    "type": "server_error", "param": None, "code": None}})

    def _chunk(self, number, text, logprobs, reason) -> dict[str, Any]:
        told = {"index": number, "finish_reason": reason,
                "logprobs": self._logprobs(logprobs) if logprobs else None}
        if self.chat:
            return {**told, "delta": {"content": text} if text else {}}
        return {**told, "text": text}

    def _logprobs(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.want.logprobs is None:
            return None
        if self.chat:
            return {"content": rows, "refusal": None}
        return {"tokens": [r["token"] for r in rows],
                "token_logprobs": [r["logprob"] for r in rows],
                "top_logprobs": [{t["token"]: t["logprob"] for t in r["top_logprobs"]}
                                 for r in rows]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def _usage(self) -> dict[str, int]:
        read_, made = sum(map(len, self.prompts)), sum(len(a.ids) for a in self.answers)
        return {"prompt_tokens": read_, "completion_tokens": made, "total_tokens": read_ + made}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
