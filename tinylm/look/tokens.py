"""Text cut into pieces: for a terminal, for a page, and by how often each piece occurs."""

import html
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from rich.text import Text

from tinylm.look.page import shown
from tinylm.text.shards import Dataset
from tinylm.text.tokenizer import HALF, Tokenizer

COLOURS = ("#cfe8fa", "#fde9c2", "#cdeedd", "#f6dcea")  # the page's c0 to c3


class Piece(NamedTuple):
    """One token of a text."""

    id: int
    text: str
    """what it stands for, white space made visible"""


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Piece]:
    """Name the pieces of encoded text."""
    return [Piece(int(i), shown(tokenizer.piece(int(i)))) for i in ids]


def coloured(cut: list[Piece], ids: bool = False) -> Text:
    """Draw pieces side by side, each on a ground of its own, with their ids where asked for."""
    out = Text()
    for n, piece in enumerate(cut):
        out.append(piece.text, style=f"black on {COLOURS[n % len(COLOURS)]}")
        if ids:
            out.append(f"{piece.id} ", style="dim")
    return out


def spans(cut: list[Piece]) -> str:
    """Draw pieces as HTML; a piece's id shows where a pointer rests on it."""
    return "".join(f'<span class="c{n % len(COLOURS)}" title="{piece.id}">'
                   f"{html.escape(piece.text)}</span>" for n, piece in enumerate(cut))


class Frequencies(NamedTuple):
    """How often each id occurs in the training tokens, most frequent first."""

    ids: np.ndarray  # int64[V]
    counts: np.ndarray  # int64[V]


def frequencies(data: Dataset) -> Frequencies:
    """Count the training tokens of a prepared text."""
    counts = np.bincount(data.train, minlength=data.V)
    order = np.argsort(-counts, kind="stable")
    return Frequencies(order, counts[order])


def bytes_per_token(data: Dataset) -> dict[str, dict[str, float]]:
    """Give each part's UTF-8 bytes a token, by split; a document's first id counts as a token."""
    return {split: {part: c["bytes"] / c["tokens"] for part, c in parts.items() if c["tokens"]}
            for split, parts in data.facts["counts"].items()}


def unused(found: Frequencies) -> int:
    """Count the learnt pieces and half-bytes that never occur in the training tokens."""
    return int(((found.counts == 0) & (found.ids >= HALF)).sum())

