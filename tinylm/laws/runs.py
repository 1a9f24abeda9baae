"""A table of finished runs: from anybody's CSV, checked, with what was dropped said."""

import csv
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinylm import files
from tinylm.config import BadInput
from tinylm.laws.accounting import six_nd

SIZES = ("params", "tokens", "flops")
NAMES = {"params": ("params", "N", "Model Size"), "tokens": ("tokens", "D"),
         "flops": ("flops", "C", "Training FLOP", "budget"), "loss": ("loss",),
         "sigma": ("sigma",), "unique": ("unique",)}


PER_PARAM, PER_SIX_ND = (1e-3, 1e6), (1e-2, 1e2)
"""median tokens a parameter, and FLOPs over 6ND, beyond which a column is of another unit"""
LEAST = 1000.0
"""params or tokens of a run below which its table may count in millions"""
MOST_KINDS = 9
"""of a column of words, beyond which it names runs and does not sort them"""


class Runs(NamedTuple):
    """A table of finished runs: counts, and the loss in nats per token."""

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    sigma: np.ndarray | None = None  # run-to-run standard deviation of the loss, nats
    unique: np.ndarray | None = None  # different tokens seen; more tokens than that are repeats

    def keep(self, mask) -> "Runs":
        """Give the runs at a mask or at indices."""
        return Runs(*(None if column is None else column[mask] for column in self))


def read_csv(path: Path, only: dict[str, str] | None = None,
             columns: dict[str, str] | None = None, said: list[str] | None = None) -> Runs:
    """Read runs with params, tokens, flops (two suffice, by 6ND) and loss, maybe sigma, unique.

    Fields lie between commas, semicolons or tabs, as in the header. `only` keeps the rows whose
    columns have the given texts; `columns` names the columns that have other names than NAMES
    knows; `said` gets a line on which columns were read. A bad row raises BadInput by file:line.
    """
    files.refuse_device(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()  # not sought back: a pipe cannot be
            table = csv.reader(itertools.chain([first], file),
                               delimiter=max(",;\t", key=first.count))
            header = [name.strip() for name in next(table, [])]
            at = _places(path, header, columns or {}, only or {})
            keys = [(header.index(k), v) for k, v in (only or {}).items()]
            rows, kept = [], [set() for _ in header]
            for row in table:
                if any(row[len(header):]):
                    raise BadInput(f"{path}:{table.line_num} has {len(row)} fields and the header "
                                   f"{len(header)}; write numbers without commas or in quotes")
                row = [field.strip() for field in row]
                if any(row) and all(i < len(row) and row[i] == v for i, v in keys):
                    for kinds, text in zip(kept, row, strict=False):
                        if len(kinds) < MOST_KINDS:
                            kinds.add(text)
                    rows.append((table.line_num,
                                 [row[i] if i < len(row) else None for i in at.values()]))
    except (OSError, UnicodeDecodeError, csv.Error) as bad:
        raise BadInput(f"{path} cannot be read ({str(bad)[:200]}); give a CSV of runs") from None
    if not rows:
        raise BadInput(f"{path} has no runs{f' with {only}' if only else ''}; give at least one")
    lines, cells = zip(*rows, strict=True)
    got = {key: _column(path, lines, texts, header[at[key]])
           for key, texts in zip(at, zip(*cells, strict=True), strict=True)}
    read = [f"{key} from {header[place]!r}" for key, place in at.items()]
    if "params" not in got:
        read.append("params as FLOPs / 6 tokens")
        got["params"] = got["flops"] / six_nd(1, got["tokens"])
    if "tokens" not in got:
        read.append("tokens as FLOPs / 6 params")
        got["tokens"] = got["flops"] / six_nd(got["params"], 1)
    if "flops" not in got:
        read.append("FLOPs as 6 params tokens")
    runs = Runs(**{"flops": six_nd(got["params"], got["tokens"]), **got})
    _check_units(path, runs, ", ".join(read))
    if said is not None:
        said.append("read " + ", ".join(read) + "".join(
            f", only where {name} is {value}" for name, value in (only or {}).items()))
        if runs.params.min() < LEAST or runs.tokens.min() < LEAST:
            said.append(f"params from {runs.params.min():.3g} and tokens from "
                        f"{runs.tokens.min():.3g}: if these are millions, so is every size here")
        said += [f"not told apart: {name} {', '.join(sorted(kinds))} (--where {name}=... keeps one)"
                 for i, (name, kinds) in enumerate(zip(header, kept, strict=True))
                 if i not in at.values() and 1 < len(kinds) < MOST_KINDS
                 and not all(_is_number(text) for text in kinds if text)]
    return runs


def _check_units(path, runs, read):
    """Refuse a table whose sizes cannot all be counts, such as parameters in millions."""
    for name, values, (low, high) in (
            ("tokens a parameter", runs.tokens / runs.params, PER_PARAM),
            ("FLOPs over 6 x params x tokens", runs.flops / six_nd(runs.params, runs.tokens),
             PER_SIX_ND)):
        if not low <= (middle := float(np.median(values))) <= high:
            raise BadInput(f"{path}: the median of {name} is {middle:.3g}, not within {low:g} to "
                           f"{high:g} ({read}); give counts, not millions, or name other columns")


def distinct(runs: Runs) -> Runs:
    """Drop rows that repeat an earlier one in every number; seeds differ in loss and stay."""
    rows = np.stack([column for column in runs if column is not None], axis=1)
    return runs.keep(np.sort(np.unique(rows, axis=0, return_index=True)[1]))


def drop_worst(runs: Runs, count: int) -> Runs:
    """Drop the runs of the `count` largest losses; the rest keep their order."""
    if not 0 <= count < len(runs.loss):
        raise BadInput(f"{count} of {len(runs.loss)} runs cannot be dropped; drop fewer")
    return runs.keep(np.sort(np.argsort(runs.loss, kind="stable")[:len(runs.loss) - count]))


def check_values(**columns) -> None:
    """Refuse (BadInput) a column with a number that is not finite and above 0, by its place."""
    for name, column in columns.items():
        bad = ~(np.isfinite(column) & (column > 0))
        if bad.any():
            at = int(bad.argmax())
            raise BadInput(f"{name}[{at}] is {column[at]}; it must be finite and above 0, "
                           "drop that run")


def _places(path, header, columns, only):
    """Give the place in a row of each quantity that the table has; words in any case."""
    for name in (*columns.values(), *only):
        if name not in header:
            raise BadInput(f"{path} has no column {name!r}; it has {', '.join(header)}")
    low = [_any_case(name) for name in header]
    at = {}
    for key, names in NAMES.items():
        names, among = ([columns[key]], header) if key in columns else (names, low)
        found = [among.index(k) for k in (n if key in columns else _any_case(n) for n in names)
                 if k in among]
        if found and among.count(among[found[0]]) > 1:
            raise BadInput(f"{path} has two columns {header[found[0]]!r}; rename one, or name one "
                           f"with --{key}-col")
        if found:
            at[key] = found[0]
    if "loss" not in at or sum(size in at for size in SIZES) < 2:
        raise BadInput(f"{path} has columns {', '.join(header)}; it needs loss and two of "
                       "params, tokens, flops; name yours with --loss-col, --params-col, ...")
    return at


def _any_case(name):
    return name if len(name) == 1 else name.lower()


def _column(path, lines, texts, name):
    try:
        values = np.array(texts, dtype=float)
        bad = ~((values > 1e-100) & (values < 1e100))  # whose squares are numbers too
        remedy = "a number above 0 and below 1e100"
    except ValueError:
        bad, remedy = np.array([not _is_number(text) for text in texts]), "a number"
        texts = [repr(text) for text in texts]
    if bad.any():
        i = int(bad.argmax())
        raise BadInput(f"{path}:{lines[i]} has {name}={texts[i]}; give {remedy} or drop the row")
    return values


def _is_number(text):
    try:
        return not math.isnan(float(text or "nan"))
    except ValueError:
        return False
