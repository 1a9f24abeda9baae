"""Zero-shot grammar: does a model give the good sentence of a minimal pair the higher probability?

The format is BLiMP's (Warstadt et al., 1912.00582): .jsonl files, or a .zip of them, one paradigm a
file, a line an object with `sentence_good` and `sentence_bad`. Chance is one half.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.config import BadInput
from tinylm.evaluate.suite import rate
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text import lines
from tinylm.text.tokenizer import BOS, PAD, Tokenizer
from tinylm.train import losses, rowwise

KEYS = ("sentence_good", "sentence_bad")
LARGEST = 100_000_000
"""bytes that a file inside a .zip may unpack to"""
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
"""what reading a damaged, encrypted or odd .zip raises"""

Pair = tuple[str, str]


def read(path: Path) -> dict[str, list[Pair]]:
    """Read pairs by paradigm; BadInput names file, line and reason for anything else."""
    path = Path(path)
    if path.suffix != ".zip":
        return {path.stem: lines.parsed(path, _pair)}
    try:
        with zipfile.ZipFile(path) as packed:
            names = sorted(n for n in packed.namelist() if n.endswith(".jsonl")
                           and not Path(n).name.startswith("."))
            if twice := len(names) - len({Path(n).stem for n in names}):
                raise BadInput(f"{path} holds {twice} paradigms twice by name; rename the files")
            found = {Path(n).stem: _unpacked(packed, n, f"{path}:{n}") for n in names}
    except OSError as bad:
        raise BadInput(f"{path} cannot be read ({bad.strerror}); check its name") from None
    except BROKEN as bad:
        raise BadInput(f"{path} is no .zip ({bad}); give .jsonl files or a .zip of them") from None
    if not found:
        raise BadInput(f"{path} holds no .jsonl file; give BLiMP's .zip or .jsonl files")
    return found


def scored(model: ModelConfig, params: Params, tokenizer: Tokenizer,
           pairs: dict[str, list[Pair]]) -> dict[str, Any]:
    """Give the share of pairs won, by paradigm and as the mean over them, with 95% intervals.

    Pairs longer than the context are left out and counted; equal probabilities count half.
    """
    right, lost = {}, 0
    for name, some in pairs.items():
        ids = [[np.concatenate([[BOS], tokenizer.encode(text)]) for text in pair] for pair in some]
        fit = [pair for pair in ids if max(map(len, pair)) <= model.T + 1]
        lost += len(ids) - len(fit)
        if fit:
            right[name] = _won(model, params, fit)
    if not right:
        raise BadInput(f"none of {lost} pairs fits T={model.T} tokens; choose a larger model")
    rates = {name: rate(won) for name, won in right.items()}
    return {"paradigms": rates, "mean": float(np.mean([r["rate"] for r in rates.values()])),
            "all": rate(np.concatenate(list(right.values()))), "too_long": lost}


def _won(model: ModelConfig, params: Params, ids: list[list[np.ndarray]]) -> np.ndarray:
    width = -(-max(len(row) for pair in ids for row in pair) // 16) * 16 + 1
    tokens = np.full((len(ids), 2, width), PAD, np.int32)
    mask = np.zeros((*tokens.shape[:2], width - 1), np.float32)
    for n, pair in enumerate(ids):
        for side, row in enumerate(pair):
            tokens[n, side, : len(row)] = row
            mask[n, side, : len(row) - 1] = 1
    good, bad = rowwise.each(losses.of_row, model, params, (tokens, mask)).T
    return (np.sign(good - bad) + 1) / 2


def _unpacked(packed: zipfile.ZipFile, name: str, where: str) -> list[Pair]:
    if packed.getinfo(name).file_size > LARGEST:
        raise BadInput(f"{where} unpacks to more than {LARGEST:,} bytes; give smaller files")
    return lines.parsed_text(packed.read(name).decode("utf-8", "replace"), where, _pair)


def _pair(row: dict[str, Any], where: str) -> Pair:
    if not all(isinstance(text := row.get(k), str) and text.strip() for k in KEYS):
        raise BadInput(f"{where} lacks the texts {' and '.join(KEYS)}; write both")
    good, bad = (row[k] for k in KEYS)
    return good, bad
