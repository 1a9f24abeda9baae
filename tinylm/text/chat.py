"""The chat template: messages to ids and a loss mask, strict reading, and packing into rows.

    <|bos|> [<|system|> S <|end|>] (<|user|> U <|end|> <|assistant|> A <|end|>)+

Ids are built from ids: the text between control ids is encoded as ordinary text, so no message can
forge a turn. A message stands behind a space: its first word then has the ids that it has within a
sentence, and to repeat a word is to repeat its ids. The loss covers what the assistant says and its
<|end|>, nothing else.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm.config import BadInput
from tinylm.text.corpora import Document
from tinylm.text.lines import Refused, check_roles, parsed, turns
from tinylm.text.tokenizer import ASSISTANT, BOS, END, PAD, SYSTEM, USER, Tokenizer

Messages = Sequence[tuple[str, str]]
ROLE = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
OPEN_ROWS = 32


class Packed(NamedTuple):
    """Conversations laid side by side in rows of T + 1 tokens."""

    tokens: np.ndarray  # int32[rows, T + 1], filled with <|pad|>
    mask: np.ndarray  # float32[rows, T]: 1 where predicting tokens[:, t + 1] at t is supervised
    segments: np.ndarray  # int32[rows, T + 1]: 0 for pad, then 1, 2, ... by conversation in the row
    dropped: int  # conversations left out because no supervised turn fits


def render(messages: Messages, tokenizer: Tokenizer,
           prompt: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Give ids (int32) and loss mask (float32) of one conversation.

    With `prompt`, the last message is the user's and <|assistant|> follows it, so that the model
    continues as the assistant. A prompt's ids are the beginning of the longer conversation's ids.
    """
    check_roles(messages, "the conversation")
    if prompt and messages[-1][0] != "user":
        raise BadInput(f"the prompt ends with role {messages[-1][0]!r}; end with a user message")
    ids, mask = [np.array([BOS], np.int32)], [np.zeros(1, np.float32)]
    for role, text in messages:
        said = written(text, tokenizer)
        ids.append(np.concatenate([[ROLE[role]], said, [END]]).astype(np.int32))
        mask.append(np.full(len(said) + 2, role == "assistant", np.float32))
        mask[-1][0] = 0
    if prompt:
        ids.append(np.array([ASSISTANT], np.int32))
        mask.append(np.zeros(1, np.float32))
    return np.concatenate(ids), np.concatenate(mask)


def prompted(messages: Messages, tokenizer: Tokenizer, tuned: bool) -> np.ndarray:
    """Give the ids of a talk to answer: by the template for a tuned model, else as plain lines."""
    if tuned:
        return render(messages, tokenizer, prompt=True)[0]
    text = "\n".join(said for _, said in messages) + "\n"
    return np.concatenate([[BOS], tokenizer.encode(text)])


def written(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Give the ids (int32) of a message's text, behind a space unless it is empty."""
    return tokenizer.encode(text and f" {text}")


def read(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """Give the text of a message's ids: `read(written(text))` is the text."""
    return tokenizer.decode(ids).removeprefix(" ")


def read_jsonl(path: Path,
               refused: list[Refused] | None = None) -> list[tuple[tuple[str, str], ...]]:
    """Read conversations, one {"messages": [{"role", "content"}, ...]} a line, ending in an answer.

    BadInput names file, line and reason for anything else, which joins `refused` if there is one.
    """
    def talk(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
        messages = turns(row, where)
        if messages[-1][0] != "assistant":
            raise BadInput(f"{where} ends with role {messages[-1][0]!r}; "
                           "end with an assistant message")
        return messages

    return parsed(path, talk, refused)


def windows(ids: np.ndarray, mask: np.ndarray, T: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut a long conversation into ones of at most T + 1 tokens, each opening with <|bos|>.

    Cuts lie after answers; an exchange that alone is longer than a row is left out.
    """
    out, start = [], 1
    ends = _answers(mask)
    while start < len(ids) and len(ends):
        fits = ends[ends <= start + T]
        end = int(fits[-1] if len(fits) else ends[0])
        if len(fits):
            out.append((np.append(ids[:1], ids[start:end]), np.append(mask[:1], mask[start:end])))
        start, ends = end, ends[ends > end]
    return out


def pack(rendered: Iterable[tuple[np.ndarray, np.ndarray]], T: int,
         most: float = math.inf) -> Packed:
    """Pack rendered conversations into rows of T + 1 tokens, each into the fullest that has room.

    A conversation longer than a row keeps its whole turns from the start, up to the last answer
    that fits (`windows` keeps the rest too); one without any is dropped and counted. Only the last
    32 rows are looked at. The first `most` rows are given, and no conversation is read that could
    not lie in them.
    """
    if T < 1:
        raise BadInput(f"T={T} leaves no token to predict; choose at least 1")
    dropped, space = 0, list[int]()  # tokens left in each row
    placed: list[tuple[int, slice, np.ndarray, np.ndarray]] = []
    for ids, mask in rendered:
        ends = _answers(mask)
        kept = int(max(ends[ends <= T + 1], default=0))
        if kept == 0:
            dropped += 1
            continue
        first = max(0, len(space) - OPEN_ROWS)
        row = min((r for r in range(first, len(space)) if space[r] >= kept),
                  key=space.__getitem__, default=len(space))
        if row == len(space):
            space.append(T + 1)
        start = T + 1 - space[row]
        placed.append((row, slice(start, start + kept), ids[:kept], mask[:kept]))
        space[row] -= kept
        if len(space) >= most + OPEN_ROWS:
            break
    rows = int(min(len(space), most))
    tokens = np.full((rows, T + 1), PAD, np.int32)
    supervised = np.zeros((rows, T + 1), np.float32)
    segments = np.zeros_like(tokens)
    for row, here, ids, mask in placed:
        if row < rows:
            tokens[row, here], supervised[row, here] = ids, mask
            segments[row, here] = segments[row].max() + 1
    return Packed(tokens, supervised[:, 1:], segments, dropped)


def _answers(mask: np.ndarray) -> np.ndarray:
    """Give, for each answer, the count of tokens up to its end."""
    return np.flatnonzero((mask > 0) & (np.append(mask[1:], 0) == 0)) + 1


def conversations(documents: Sequence[Document], tokenizer: Tokenizer,
                  T: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Render the documents' conversations to `windows`; where none fits, neighbouring pieces.

    Text without any turn then at least teaches the template: one piece asks, the next answers.
    """
    found = False
    for document in documents:
        for part in windows(*render(document.messages, tokenizer), T) if document.messages else ():
            found = True
            yield part
    for document in [] if found else documents:
        pieces = [piece for line in re.split(r"\n+|(?<=[.!?]) ", document.text)
                  for piece in _pieces(line, tokenizer, max(1, T // 4)) if piece.strip()]
        for a, b in zip(pieces[::2], pieces[1::2], strict=False):
            yield render([("user", a), ("assistant", b)], tokenizer)


def _pieces(line: str, tokenizer: Tokenizer, most: int) -> Iterator[str]:
    """Halve a line until no part has more than `most` tokens or is one character."""
    if len(line) < 2 or len(line) <= 8 * most and len(tokenizer.encode(line)) <= most:
        yield line
    else:
        for half in (line[:len(line) // 2], line[len(line) // 2:]):
            yield from _pieces(half, tokenizer, most)
