"""Verbs that let a finished run speak: sample, chat."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from tinylm.config import BadInput
from tinylm.look import progress
from tinylm.model import generate
from tinylm.text.chat import prompted, read
from tinylm.text.tokenizer import BOS, Tokenizer
from tinylm.train import checkpoint
from tinylm.verbs import models

Said = list[tuple[str, str]]
"""role and message of each turn"""


def sample(target: Positional[Path], prompt: str = "", count: int = 100, seed: int = 0,
           temperature: float = 0.8, text: Path | None = None) -> None:
    """Continue a text with a finished run, streaming to stdout.

    Args:
        target: folder of the run
        prompt: the text to continue
        count: new tokens at most
        seed: of the draws
        temperature: 0 takes the likeliest token each time
        text: the prepared folder of the run, where it has moved
    """
    config, _, learnt = models.opened(target, text)
    ids = np.concatenate([[BOS], learnt.encode(prompt)])
    _stream(checkpoint.final_params(target, config), config, learnt.decode, ids, count, seed,
            temperature)


def chat(target: Positional[Path], prompt: str = "", system: str = "", seed: int = 0,
         temperature: float = 0.8, text: Path | None = None) -> None:
    """Talk to a base or chat checkpoint; an empty line or end of input leaves.

    A base checkpoint continues the talk as plain lines; a tuned one gets the template.

    Args:
        target: folder of the run
        prompt: one message, instead of a talk
        system: a system prompt, for tuned checkpoints
        seed: of the draws
        temperature: 0 takes the likeliest token each time
        text: the prepared folder of the run, where it has moved
    """
    config, _, learnt = models.opened(target, text)
    params = checkpoint.final_params(target, config)
    tuned = models.tuned(target)
    if system and not tuned:
        raise BadInput(f"{target} is a base run and knows no system prompt; leave --system out or "
                       "talk to a tuned run")
    told = functools.partial(read, tokenizer=learnt) if tuned else learnt.decode
    said: Said = []
    for turn, message in enumerate([prompt] if prompt else _typed()):
        said.append(("user", message))
        ids, said = rendered(said, system, learnt, config.T, tuned)
        try:
            answer = _stream(params, config, told, ids, config.T, seed + turn, temperature)
        except BadInput as refusal:
            if prompt:
                raise
            progress.say(f"error: {refusal}")
            said.pop()
            continue
        said.append(("assistant", answer))


def rendered(said: Said, system: str, learnt: Tokenizer, T: int,
             tuned: bool) -> tuple[np.ndarray, Said]:
    """Render the talk, forgetting its oldest turns until half the context is left to answer."""
    head = [("system", system)] if system else []
    while True:
        ids = prompted([*head, *said], learnt, tuned)
        if len(ids) <= T // 2 or len(said) == 1:
            return ids, said
        said = said[2:]


def _typed() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _stream(params, config, told, ids, count, seed, temperature) -> str:
    made, shown = [], ""
    for part in generate.stream(config, params, ids, count, seed, temperature):
        made += part.tolist()
        whole = told(made)
        sure = whole.rstrip("\ufffd")  # the end may be inside a character
        print(sure[len(shown):], end="", flush=True)
        shown = sure
    print(flush=True)
    return shown
