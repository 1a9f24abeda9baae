"""Data is a function: batch(tokens, seed, t) depends on its arguments only.

Window i of an epoch is number permute(i) of the stream's disjoint windows; the permutation is a
Feistel network with cycle walking, so nothing is shuffled, stored or restored. Every window is
seen once an epoch, and a resumed run needs the step number alone.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from tinylm.config import BadInput


class Batch(NamedTuple):
    """What a loss reads: rows of T + 1 tokens, the weight of each of the T predictions."""

    tokens: Int[Array, "B T1"]
    weights: Float[Array, "B T"]
    segments: Int[Array, "B T1"] | None = None


def windows(tokens: np.ndarray, T: int) -> int:
    """Count the disjoint windows of T predictions; BadInput if there is none."""
    count = (len(tokens) - 1) // T
    if count < 1:
        raise BadInput(f"the split holds {len(tokens)} tokens and a window of T={T} needs {T + 1}; "
                       "bring more text or choose a smaller T")
    return count


def batch(tokens: np.ndarray, seed: int, t: int, rows: int, T: int) -> Batch:
    """Give step t's rows: windows t*rows .. t*rows + rows - 1 of an endless shuffled sequence."""
    window = order(windows(tokens, T), seed, t, rows)
    picked = tokens[window[:, None] * T + np.arange(T + 1)[None, :]].astype(np.int32)
    return Batch(picked, np.ones((rows, T), np.float32))


def order(count: int, seed: int, t: int, rows: int) -> np.ndarray:
    """Give the numbers t*rows .. t*rows + rows - 1 of 0..count-1 shuffled anew each epoch."""
    epochs, inside = np.divmod(np.arange(t * rows, (t + 1) * rows), count)
    picked = np.empty_like(inside)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        picked[here] = permute(inside[here], count, seed, int(epoch))
    return picked


def permute(index: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Map 0..count-1 one to one onto itself, differently for each (seed, epoch)."""
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.sha256(f"{seed}/{epoch}".encode()).digest(), np.uint64)
    out = _feistel(index.astype(np.uint64), half, keys)
    while (outside := out >= count).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64(2**half - 1)
    left, right = x >> np.uint64(half), x & mask
    for key in keys:
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
    return (left << np.uint64(half)) | right
