"""Preferences from a user's JSONL: a prompt and its responses, best to worst, split by prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm import files
from tinylm.config import BadInput, digest
from tinylm.text.chat import render, written
from tinylm.text.lines import Refused, parsed, turns
from tinylm.text.tokenizer import END, PAD, Tokenizer

SHAPES = ('{"prompt": "..." or "messages": [...], and either "chosen": "...", "rejected": "..." '
          'or "responses": [best, ..., worst]}')


class Preference(NamedTuple):
    """A conversation that waits for an answer, and two or more answers, best to worst."""

    messages: tuple[tuple[str, str], ...]
    responses: tuple[str, ...]


class Ranked(NamedTuple):
    """Prompts with responses as ids: one row a response, the rows of a prompt side by side."""

    tokens: np.ndarray  # int32[prompts, R, T + 1]: prompt, response, <|end|>, padding
    mask: np.ndarray  # float32[prompts, R, T]: 1 where tokens[.., t + 1] is the response's
    wins: np.ndarray  # float32[prompts, R, R]: 1 where response i is preferred to j

    @property
    def id(self) -> str:
        """Hash the ranking: 16 hex digits."""
        return digest([files.sha256_of(np.ascontiguousarray(a)) for a in self])[:16]


def ranked(preferences: Sequence[Preference], tokenizer: Tokenizer,
           T: int) -> tuple[Ranked, int]:
    """Lay preferences out in rows of at most T + 1 ids, best response first.

    Also count those left out because no two of their responses fit. BadInput if none is left.
    """
    kept = []
    for one in preferences:
        asked = render(one.messages, tokenizer, prompt=True)[0]
        said = [np.append(written(text, tokenizer), END) for text in one.responses]
        if len(said := [ids for ids in said if len(asked) + len(ids) <= T + 1]) > 1:
            kept.append((asked, said))
    if not kept:
        raise BadInput(f"no two responses to any of {len(preferences)} prompts fit T={T} tokens; "
                       "bring shorter ones or a model of larger T")
    most = max(len(said) for _, said in kept)
    longest = max(len(asked) + len(ids) for asked, said in kept for ids in said)
    tokens = np.full((len(kept), most, longest), PAD, np.int32)
    mask = np.zeros((len(kept), most, longest - 1), np.float32)
    wins = np.zeros((len(kept), most, most), np.float32)
    for n, (asked, said) in enumerate(kept):
        for r, ids in enumerate(said):
            end = len(asked) + len(ids)
            tokens[n, r, :end] = np.concatenate([asked, ids])
            mask[n, r, len(asked) - 1: end - 1] = 1
        wins[n, :len(said), :len(said)] = np.triu(np.ones((len(said), len(said))), 1)
    return Ranked(tokens, mask, wins), len(preferences) - len(kept)


def read_jsonl(path: Path, refused: list[Refused] | None = None) -> list[Preference]:
    """Read one preference a line.

    BadInput names file, line and reason for anything else, which joins `refused` if there is one.
    """
    return parsed(path, lambda row, where: Preference(_messages(row, where),
                                                      _responses(row, where)), refused)


def split(preferences: Sequence[Preference],
          heldout: float) -> tuple[list[Preference], list[Preference]]:
    """Hold out whole prompts in the order of their hashes until the share of rows is reached.

    Prompts that differ in case or white space alone are one, so none is on both sides. BadInput
    for a share outside 0..1 or fewer than two prompts.
    """
    if not 0 < heldout < 1:
        raise BadInput(f"heldout={heldout} is not a share of the rows; choose one such as 0.1")
    groups: dict[str, list[int]] = {}
    for n, one in enumerate(preferences):
        asked = [[role, " ".join(text.casefold().split())] for role, text in one.messages]
        groups.setdefault(digest(asked), []).append(n)
    if len(groups) < 2:
        raise BadInput(f"{len(preferences)} preferences are about {len(groups)} prompt, and one "
                       "must be held out; bring at least 2 different prompts")
    held: set[int] = set()
    for _, group in sorted(groups.items())[:-1]:
        if held and len(held) + len(group) > heldout * len(preferences):
            break
        held |= set(group)
    return ([p for n, p in enumerate(preferences) if n not in held],
            [p for n, p in enumerate(preferences) if n in held])


def _messages(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    if ("prompt" in row) == ("messages" in row):
        found = "both prompt and messages" if "prompt" in row else "neither prompt nor messages"
        raise BadInput(f"{where} has {found}; write {SHAPES}")
    if "prompt" in row:
        return (("user", _text(row["prompt"], "prompt", where)),)
    messages = turns(row, where)
    if messages[-1][0] != "user":
        raise BadInput(f"{where} messages end with role {messages[-1][0]!r}; end with the user's, "
                       "which the responses answer")
    return messages


def _responses(row: dict[str, Any], where: str) -> tuple[str, ...]:
    keys = set(row) - {"prompt", "messages"}
    if keys == {"chosen", "rejected"}:
        found = tuple(_text(row[k], k, where) for k in ("chosen", "rejected"))
    elif keys == {"responses"}:
        listed = row["responses"]
        if not isinstance(listed, list) or len(listed) < 2:
            raise BadInput(f"{where} has no list of 2 or more responses; write {SHAPES}")
        found = tuple(_text(t, f"response {n}", where) for n, t in enumerate(listed, 1))
    else:
        raise BadInput(f"{where} has the fields {', '.join(sorted(row)) or 'of nothing'}; "
                       f"write {SHAPES} and nothing else")
    if len(set(found)) < len(found):
        raise BadInput(f"{where} prefers a response to itself; delete the repeated one")
    return found


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if isinstance(value, str) else f"a {type(value).__name__}"
        raise BadInput(f"{where} {name} is {kind}; give it text")
    return value
