"""What attention heads do: the habits of each, and one weight worked out by hand."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from tinylm.config import BadInput
from tinylm.model.capture import Insides, capture
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.tokenizer import FIRST


class Habits(NamedTuple):
    """Mean attention weights of each head, between 0 and 1, on sequences that repeat themselves.

    From 2209.11895: the weight on the token before, on the first token, and in the repeat on what
    followed the token's last occurrence. Such heads let a model go on with what it has seen.
    """

    previous: Float[np.ndarray, "L H"]
    first: Float[np.ndarray, "L H"]
    induction: Float[np.ndarray, "L H"]
    nats: Float[np.ndarray, "2"]
    """nats a token in the first half, which nothing foretells, and in its repeat"""


def habits(config: ModelConfig, params: Params, seed: int = 0, count: int = 8) -> Habits:
    """Measure the heads on `count` sequences of random learnt pieces, each said twice."""
    if config.T < 4:
        raise BadInput(f"a context of T={config.T} has no room for a sequence said twice; look at "
                       "a model with T=4 or more")
    half = config.T // 2
    drawn = np.random.default_rng(seed).integers(min(FIRST, config.V - 1), config.V, (count, half))
    weights, nats = [], []
    for row in np.concatenate([drawn, drawn], axis=1):
        inside = capture(config, params, row)
        weights.append(np.asarray(inside.weights, np.float64))
        nats.append(surprise(np.asarray(inside.logits, np.float64), row))
    mean, nats = np.mean(weights, axis=0), np.mean(nats, axis=0)
    at = np.arange(half, 2 * half - 1)
    return Habits(np.diagonal(mean, -1, 2, 3).mean(-1), mean[:, :, 1:, 0].mean(-1),
                  mean[:, :, at, at - half + 1].mean(-1),
                  np.array([nats[: half - 1].mean(), nats[half:].mean()]))


def surprise(logits: Float[np.ndarray, "T V"],
             tokens: Integer[np.ndarray, "T"]) -> Float[np.ndarray, "T-1"]:
    """Give -log p of every token but the first, nats."""
    most = logits.max(-1)
    logz = most + np.log(np.exp(logits - most[:, None]).sum(-1))
    return (logz - np.take_along_axis(logits, np.roll(tokens, -1)[:, None], 1)[:, 0])[:-1]


class Worked(NamedTuple):
    """One attention weight from its query and key: weight = exp(score) / total."""

    q: Float[np.ndarray, "K"]
    k: Float[np.ndarray, "K"]
    v: Float[np.ndarray, "K"]
    dot: float
    score: float
    """dot / sqrt(K)"""
    total: float
    """the sum of exp(score) over every key that the query may see"""
    weight: float
    """as the model computed it"""


def worked(inside: Insides, layer: int, head: int, t: int, s: int) -> Worked:
    """Work out how much token t takes from token s <= t, all counted from 0."""
    group = head * inside.k.shape[1] // inside.weights.shape[1]
    q = np.asarray(inside.q[layer, t, head], np.float64)
    keys = np.asarray(inside.k[layer, group, : t + 1], np.float64)
    scores = keys @ q / math.sqrt(len(q))
    return Worked(q, keys[s], np.asarray(inside.v[layer, group, s], np.float64), float(keys[s] @ q),
                  float(scores[s]), float(np.exp(scores).sum()),
                  float(inside.weights[layer, head, t, s]))


def sharpest(inside: Insides) -> tuple[int, int, int, int]:
    """Find the head that looks back most sharply and its largest weight: layer, head, t, s.

    Weights on the token itself and on the first token, where a head looks that needs nothing, do
    not count.
    """
    back = np.tril(np.asarray(inside.weights, np.float64), -1)
    back[..., 0] = 0
    layer, head = np.unravel_index(back.max(-1).mean(-1).argmax(), back.shape[:2])
    t, s = np.unravel_index(back[layer, head].argmax(), back.shape[2:])
    return int(layer), int(head), int(t), int(s)
