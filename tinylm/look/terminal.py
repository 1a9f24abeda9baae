"""Views drawn for a terminal with rich: tables, shaded heatmaps, coloured pieces."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.look.depth import Depth, settled
from tinylm.look.heads import Habits, Worked
from tinylm.look.next_word import Next
from tinylm.look.page import shown
from tinylm.text.tokenizer import Tokenizer

out = Console()
if not out.is_terminal:
    out = Console(width=120)


def show(*what: object) -> None:
    """Print views to stdout; a text that is not to be wrapped stays a line a line."""
    for one in what:
        out.print(one, markup=False, highlight=False, crop=False,
                  soft_wrap=isinstance(one, Text) and bool(one.no_wrap))


def svg(title: str) -> str:
    """Give what was shown while `out.record` was set, as an SVG file that fetches nothing."""
    return re.sub(r"@font-face \{[^}]*\}", "", out.export_svg(title=title))


def next_words(found: dict[str, list[Next]], tokenizer: Tokenizer) -> Table:
    """Draw candidates side by side, a column a predictor, with counts where it counts."""
    drawn = Table()
    for name in found:
        drawn.add_column(name, overflow="fold")
    for row in range(max(map(len, found.values()), default=0)):
        cells = []
        for each in found.values():
            one = each[row] if row < len(each) else None
            cells.append(Text("" if one is None else f"{one.p:6.1%} {name_of(tokenizer, one.id)}"
                              + (f"  ({one.count:,} times)" if one.count else "")))
        drawn.add_row(*cells)
    return drawn


def name_of(tokenizer: Tokenizer, id: int) -> str:
    """Name an id, white space made visible."""
    return shown(tokenizer.piece(int(id)))


def heatmap(weights: np.ndarray, words: Sequence[str]) -> Text:
    """Draw one head's weights [T, T]: a row is a token reading, its shades what it reads."""
    wide = max(map(cell_len, words))
    cell = "  " if 2 * len(words) + 2 * wide + 12 <= out.width else " "
    drawn = Text(no_wrap=True)
    for t, row in enumerate(weights):
        drawn.append(" " * (wide - cell_len(words[t])) + words[t] + " ")
        for w in row[: t + 1]:
            shade = round(255 - 215 * float(w))
            drawn.append(cell, style=f"on rgb({shade},{shade},255)")
        most = int(row[: t + 1].argmax())
        drawn.append(f" {row[most]:.2f} of {words[most]}\n", style="dim")
    return drawn


def worked(one: Worked, names: tuple[str, str], seen: int) -> Table:
    """Write one weight's arithmetic out: vectors, product, score, exponential, share."""
    K, most = len(one.q), min(len(one.q), 8)
    drawn = Table(title=f"“{names[0]}” reads “{names[1]}”: q·k = {one.dot:.4f}, / √{K} = "
                        f"{one.score:.4f}, exp = {math.exp(one.score):.5g}, / {one.total:.5g} over "
                        f"{seen} keys = {math.exp(one.score) / one.total:.4f} (the model: "
                        f"{one.weight:.4f})", title_justify="left")
    drawn.add_column(f"first {most} of {K}")
    for n in range(most):
        drawn.add_column(str(n + 1), justify="right", overflow="fold")
    for label, row in (("query", one.q), ("key", one.k), ("product", one.q * one.k),
                       ("value", one.v)):
        drawn.add_row(label, *(f"{x:+.3f}" for x in row[:most]))
    return drawn


def habits(found: Habits) -> Table:
    """Draw every head's habits, the strongest of each marked."""
    first, again = found.nats
    drawn = Table(title=f"random pieces said twice: {first:.2f} nats a token, {again:.2f} in the "
                        "repeat", title_justify="left")
    for column in ("layer", "head", "token before", "first token", "induction"):
        drawn.add_column(column, justify="right", overflow="fold")
    scores = (found.previous, found.first, found.induction)
    for layer, head in np.ndindex(found.previous.shape):
        drawn.add_row(str(layer + 1), str(head + 1), *(
            Text(f"{s[layer, head]:.3f}", style="bold" if s[layer, head] == s.max() else "")
            for s in scores))
    return drawn


def depths(found: Depth, words: Sequence[str], tokenizer: Tokenizer) -> Table:
    """Draw each position's likeliest next token by depth; bold where it is the final answer."""
    drawn = Table(title="likeliest next token after each layer", title_justify="left")
    drawn.add_column("after", overflow="fold")
    for n, (agree, nats) in enumerate(zip(found.agree, found.nats, strict=True)):
        drawn.add_column(f"{n or 'embedding'}\n{agree:.0%} agree\n{nats:.2f} nats", overflow="fold")
    drawn.add_column("settled at", justify="right")
    for t, depth in enumerate(settled(found)):
        drawn.add_row(Text(words[t]), *(
            Text(f"{name_of(tokenizer, found.ids[l, t, 0])} {found.p[l, t, 0]:.0%}",
                 style="bold" if found.rank[l, t] == 0 else "dim")
            for l in range(len(found.ids))), str(depth))
    return drawn


def growth(rows: list[dict[str, Any]]) -> list[Table]:
    """Draw what grows with compute, a row a run or checkpoint: habits, loss by position, by
    frequency.
    """
    groups = {"by_position": "nats a token by the number of tokens read, at most",
              "by_frequency": "nats a token by its occurrences in training, at most"}
    name = next(iter(rows[0]))
    flat = [{k: v for k, v in row.items() if k not in groups} for row in rows]
    drawn = [_table("", flat)]
    return drawn + [_table(title, [{name: row[name], **{f"{g['at_most']:,}": g["nats"]
                                                        for g in row[key]}} for row in rows])
                    for key, title in groups.items()]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    drawn = Table(title=title or None, title_justify="left")
    for column in rows[0]:
        drawn.add_column(column.replace("_", " "), justify="right", overflow="fold")
    for row in rows:
        drawn.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return drawn
