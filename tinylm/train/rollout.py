"""Responses sampled from a policy, laid out as the rows that a loss reads.

A row is prompt, response, padding; its mask is 1 where the next token is the response's, up to and
with the control id that ends it. Log-probabilities are read off the same rows by the full forward
pass (`measured`), at the sampler's temperature and over the whole vocabulary, so that what the loss
compares with is what it computes; a test holds them to the cached decoder's own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinylm.config import BadInput
from tinylm.model import generate
from tinylm.model.decoder import ModelConfig, Params, rebuild
from tinylm.text.tokenizer import END, PAD
from tinylm.train import losses, rewards, rowwise


class Rollout(NamedTuple):
    """Prompts with sampled responses, on the host."""

    tokens: Int[np.ndarray, "B T1"]
    """prompt, response, padding"""
    mask: Float[np.ndarray, "B T"]
    """1 where tokens[:, t + 1] is the response's"""
    ended: Float[np.ndarray, "B"]
    """1 where the response closed its turn with <|end|>"""
    leaked: Float[np.ndarray, "B"]
    """1 where another control id ended it: a role inside a turn"""

    @property
    def responses(self) -> list[np.ndarray]:
        """Give each response's ids, without the control id that ended it."""
        rows = [row[1:][own > 0] for row, own in zip(self.tokens, self.mask, strict=True)]
        return [ids[:-1] if len(ids) and ids[-1] < generate.CONTROL else ids for ids in rows]


Judge = Callable[[Rollout, np.ndarray], np.ndarray]
"""scores of a rollout's responses to the prompts of these numbers, [B]"""


class Measured(NamedTuple):
    """What a model says of a rollout's responses, [B, T] each; 0 where the mask is."""

    logp: Array
    kl: Array
    """exact, of the model from the reference, nats"""
    ref: Array
    """log-probability under the reference"""
    entropy: Array


def rollout(config: ModelConfig, params: Params, prompts: Sequence[np.ndarray], width: int,
            budget: int, key: Array, temperature: float = 1.0,
            place: Callable = jnp.asarray) -> Rollout:
    """Sample a response of up to `budget` tokens to each prompt of up to `width` tokens."""
    if width + budget > config.T + 1:
        raise BadInput(f"prompts of {width} and responses of {budget} tokens do not fit the "
                       f"context T={config.T}; lower the budget or leave out long prompts")
    state = generate.prefill(config, params, prompts, width, width + budget, place)
    _, drawn = generate.decode(config, params, state, budget, key, jnp.float32(temperature))
    return laid_out(prompts, np.asarray(drawn), width)


def padded(prompts: Sequence[np.ndarray]) -> int:
    """Give the width that prompts are padded to, so that few widths are compiled."""
    return -(-max(map(len, prompts)) // generate.BUCKET) * generate.BUCKET


def laid_out(prompts: Sequence[np.ndarray], drawn: Int[np.ndarray, "B N"], width: int) -> Rollout:
    """Put responses behind their prompts; what follows a control id is padding."""
    B, budget = drawn.shape
    tokens = np.full((B, width + budget), PAD, np.int32)
    mask = np.zeros((B, width + budget - 1), np.float32)
    ended, leaked = np.zeros(B, np.float32), np.zeros(B, np.float32)
    for b, (prompt, row) in enumerate(zip(prompts, drawn, strict=True)):
        stops = np.flatnonzero(row < generate.CONTROL)
        said = row[: stops[0] + 1] if len(stops) else row
        tokens[b, : len(prompt)] = prompt
        tokens[b, len(prompt): len(prompt) + len(said)] = said
        mask[b, len(prompt) - 1: len(prompt) - 1 + len(said)] = 1
        ended[b] = len(stops) and said[-1] == END
        leaked[b] = len(stops) and said[-1] != END
    return Rollout(tokens, mask, ended, leaked)


def measured(config: ModelConfig, params: Params, ref: Params, rolled: Rollout,
             temperature: float = 1.0) -> Measured:
    """Read log-probabilities, exact KL to the reference and entropy off the full forward pass."""
    return rowwise.each(_measured, config, (params, ref, jnp.float32(temperature)),
                        (rolled.tokens, rolled.mask))


def _measured(config: ModelConfig, given: tuple[Params, Params, Array],
              row: tuple[Array, Array]) -> Measured:
    (*models, temperature), (tokens, mask) = given, jax.tree.map(lambda a: a[None], row)
    both = [rebuild(config, of) for of in models]
    own, other = (of.ending() for of in both)

    def read(x: Array, y: Array, targets: Array) -> Measured:
        logits, others = own(x) / temperature, other(y) / temperature
        return Measured(losses.token_logp(logits, targets), rewards.exact_kl(logits, others),
                        losses.token_logp(others, targets), rewards.entropy(logits))

    states = (of.states(tokens[:, :-1], mixed=True) for of in both)
    found = losses.where_counted(read, mask, *states, tokens[:, 1:])
    return Measured(*(of[0] for of in found))
