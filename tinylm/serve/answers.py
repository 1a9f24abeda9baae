"""One answer as it grows: text that is sure, stop strings, log-probabilities, why it ended."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tinylm.serve.engine import Part
from tinylm.text.tokenizer import FIRST, HALF, Tokenizer

Reason = Literal["stop", "length"]


class Delta(NamedTuple):
    """What a turn added that can no longer change."""

    text: str
    logprobs: list[dict[str, Any]]
    """of the turn's tokens, if asked: token, logprob (nats), bytes, the likeliest in its place"""


class Answer:
    """The text of a request's tokens, up to and without a stop string or the end of the turn.

    `top` is how many likeliest tokens are told beside each; None: no log-probabilities at all.
    """

    def __init__(self, tokenizer: Tokenizer, read: Callable[[Sequence[int]], str],
                 stops: Sequence[str], top: int | None):
        self.tokenizer, self.read, self.stops, self.top = tokenizer, read, stops, top
        self.ids: list[int] = []
        self.text = ""
        self.reason: Reason | None = None

    def add(self, part: Part) -> Delta:
        """Take a turn's tokens; `reason` is set where they end the answer."""
        self.ids += part.tokens.tolist()
        if self.ids and self.ids[-1] < HALF:  # control ids come last and end the answer
            self.reason = "stop"
        return self._told(part)

    def finish(self) -> str:
        """Give what was held back: a half-spelt character, or the beginning of a stop string."""
        if self.reason is not None:
            return ""
        self.reason, before = "length", len(self.text)
        self.text = self.read(self.ids)
        return self.text[before:]

    def _told(self, part: Part) -> Delta:
        whole = self.read(self.ids)
        at = [n for n in (whole.find(stop, max(0, len(self.text) - len(stop) + 1))
                          for stop in self.stops) if n >= 0]
        if at:
            self.reason, sure = "stop", whole[:min(at)]
        else:
            sure = whole if self.reason else whole.rstrip("\ufffd")
            held = 0 if self.reason else max((n for stop in self.stops for n in range(1, len(stop))
                                              if sure.endswith(stop[:n])), default=0)
            sure = sure[:len(sure) - held]
        new, self.text = sure[len(self.text):], max(self.text, sure, key=len)
        asked = zip(*part, strict=True) if self.top is not None else ()
        return Delta(new, [self._logprob(*row) for row in asked])

    def _logprob(self, token: int, logp: float, top: np.ndarray, top_logp: np.ndarray):
        best = [self._named(int(i), float(p)) for i, p in zip(top, top_logp, strict=True)]
        return {**self._named(int(token), float(logp)), "top_logprobs": best[:self.top]}

    def _named(self, token: int, logp: float) -> dict[str, Any]:
        name = self.tokenizer.piece(token)
        said = list(name.encode("utf-8", "replace")) if token >= FIRST else None
        return {"token": name, "logprob": logp, "bytes": said}
