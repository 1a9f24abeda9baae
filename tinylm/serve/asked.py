"""What a client asked for, read strictly: each field typed and bounded, none ignored in silence."""

from dataclasses import dataclass
from typing import Any

from tinylm.config import BadInput

UNUSED = {"logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
          "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
          "parallel_tool_calls": (False, True), "tools": ([],), "tool_choice": ("none", "auto"),
          "response_format": ({"type": "text"},), "echo": (False,), "suffix": ("",),
          "best_of": (1,), "user": (), "safety_identifier": (), "prompt_cache_key": ()}
"""fields that clients send and that change nothing here, with the values that may come besides
null; none: any text"""
CHAT = ("messages", "max_completion_tokens", "top_logprobs")
COMPLETION = ("prompt",)
BOTH = ("model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "seed",
        "stop", "logprobs")


class Refused(BadInput):
    """A field that cannot be; `param` names it."""

    def __init__(self, param: str, words: str, code: str | None = None, status: int = 400):
        super().__init__(words)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Dials:
    """How to answer; defaults are OpenAI's but for a temperature that suits small models."""

    model: str
    count: int
    temperature: float
    top_p: float
    n: int
    stream: bool
    usage: bool
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    """likeliest tokens given beside each token; None: no log-probabilities"""


def dials(body: dict[str, Any], chat: bool) -> Dials:
    """Read the common fields of a request."""
    known = (*BOTH, *(CHAT if chat else COMPLETION))
    for name, value in body.items():
        if name not in known and not _unused(name, value):
            raise Refused(name, f"{name} is not supported here; leave it out", "unsupported")
    top = body.get("top_logprobs" if chat else "logprobs")
    given = _flag(body, "logprobs") if chat else top is not None
    if top is not None and not given:
        raise Refused("top_logprobs", "top_logprobs is given with logprobs true only")
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if (not isinstance(stops, list) or len(stops) > 4
            or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stops)):
        raise Refused("stop", "stop is a string of 1 to 100 characters, or up to four of them")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refused("stream_options", "stream_options is an object that holds include_usage")
    count = _number(body, "max_completion_tokens", int, 1, 1e6, None) if chat else None
    return Dials(_text(body, "model"), count or _number(body, "max_tokens", int, 1, 1e6, 10**6),
                 _number(body, "temperature", float, 0, 10, 0.8),
                 max(1e-6, _number(body, "top_p", float, 0, 1, 1.0)),
                 _number(body, "n", int, 1, 16, 1),
                 _flag(body, "stream"), _flag(options, "include_usage"),
                 _number(body, "seed", int, -2**63, 2**63 - 1, None), tuple(stops),
                 None if not given else _number({"n": top}, "n", int, 0, 5, 0,
                                                "top_logprobs" if chat else "logprobs"))


def _unused(name: str, value: Any) -> bool:
    """Say whether a field may come with this value and change nothing."""
    kept = UNUSED.get(name)
    return kept is not None and (value is None or (
        any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in kept)
        if kept else isinstance(value, str)))


def messages(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Read a talk: system (or developer), user and assistant in turn, the user last."""
    talk = body.get("messages")
    if not isinstance(talk, list) or not 1 <= len(talk) <= 1000:
        raise Refused("messages", "messages is a list of 1 to 1000 objects with role and content")
    out = []
    for n, message in enumerate(talk):
        where = f"messages[{n}]"
        if not isinstance(message, dict):
            raise Refused(where, f"{where} is an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise Refused(f"{where}.role", f"{where}.role={role!r} is not system, user, assistant")
        if isinstance(content, list):
            if not all(isinstance(c, dict) and c.get("type") == "text"
                       and isinstance(c.get("text"), str) for c in content):
                raise Refused(f"{where}.content", f"{where}.content holds something besides text")
            content = "".join(c["text"] for c in content)
        if not isinstance(content, str):
            raise Refused(f"{where}.content", f"{where}.content is no text")
        out.append(("system" if role == "developer" else role, content))
    if out[-1][0] != "user":
        raise Refused("messages", "the last message is the user's")
    return out


def prompts(body: dict[str, Any]) -> list[str]:
    """Read one prompt or up to 64, as text."""
    given = body.get("prompt", "")
    given = [given] if isinstance(given, str) else given
    if (not isinstance(given, list) or not 1 <= len(given) <= 64
            or not all(isinstance(p, str) for p in given)):
        raise Refused("prompt", "prompt is a text, or a list of 1 to 64 texts")
    return given


def _text(body: dict[str, Any], name: str) -> str:
    if not isinstance(body.get(name), str):
        raise Refused(name, f"{name} is missing or no text")
    return body[name]


def _flag(body: dict[str, Any], name: str) -> bool:
    if not isinstance(body.get(name), bool | None):
        raise Refused(name, f"{name} is true or false")
    return bool(body.get(name))


def _number(body: dict[str, Any], name: str, kind: type, low: float, high: float, default: Any,
            param: str = "") -> Any:
    value = body.get(name)
    if value is None:
        return default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (kind is int and value != int(value)):
        whole = "a whole number " if kind is int else ""
        raise Refused(param or name, f"{param or name}={value!r} is not {whole}within "
                                     f"{low:g}..{high:g}")
    return kind(value)
