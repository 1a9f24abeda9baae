"""What a model would say after each of its layers, and from where on it says its answer."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax

from tinylm.look.tuned import Maps
from tinylm.model.capture import Insides, filled, lens
from tinylm.model.decoder import ModelConfig, Params


class Depth(NamedTuple):
    """The logit lens of one text: depth 0 is the embedding, depth l the stream after block l."""

    ids: Int[np.ndarray, "L1 T k"]
    """the likeliest next tokens, best first"""
    p: Float[np.ndarray, "L1 T k"]
    """their probabilities"""
    rank: Int[np.ndarray, "L1 T"]
    """the place, from 0, of the token that the whole model puts first"""
    agree: Float[np.ndarray, "L1"]
    """share of the positions whose first token is the whole model's"""
    nats: Float[np.ndarray, "L1"]
    """KL of the whole model's prediction from this one, mean over the positions"""


def depth(config: ModelConfig, params: Params, inside: Insides, k: int = 5,
          maps: Maps | None = None) -> Depth:
    """Read every depth of a captured text as the last one is read, or through its tuned map."""
    final = log_softmax(np.asarray(inside.logits, np.float64), axis=-1)
    answer = final.argmax(-1)
    found = []
    for stream in maps(inside.stream) if maps else inside.stream:
        logits = lens(config, params, filled(stream, config.T))[: len(stream)]
        said = log_softmax(np.asarray(logits, np.float64), axis=-1)
        best = np.argsort(-said, axis=-1, kind="stable")[:, :k]
        rank = (said > np.take_along_axis(said, answer[:, None], 1)).sum(-1)
        found.append((best, np.exp(np.take_along_axis(said, best, 1)), rank, (rank == 0).mean(),
                      (np.exp(final) * (final - said)).sum(-1).mean()))
    return Depth(*map(np.array, zip(*found, strict=True)))


def settled(found: Depth) -> Int[np.ndarray, "T"]:
    """Give the first depth from which on the model's answer stays first, each position."""
    wrong = found.rank > 0
    last = len(wrong) - 1 - np.argmax(wrong[::-1], axis=0)  # the last depth that says another
    return np.where(wrong.any(axis=0), last + 1, 0)
