"""Many responses to each prompt with their gold scores: what preferences are drawn from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinylm.config import BadInput
from tinylm.evaluate import suite
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.preferences import Ranked
from tinylm.text.tasks import Task
from tinylm.text.tokenizer import Tokenizer
from tinylm.train.rollout import Rollout


class Pool(NamedTuple):
    """R responses to each of N tasks."""

    tokens: np.ndarray  # int32[N, R, T + 1]
    mask: np.ndarray  # float32[N, R, T]
    ended: np.ndarray  # float32[N, R]
    leaked: np.ndarray  # float32[N, R]
    gold: np.ndarray  # float32[N, R]

    @property
    def rollout(self) -> Rollout:
        """All responses in rows, those to a task side by side."""
        flat = (a.reshape(-1, *a.shape[2:]) for a in self[:4])
        return Rollout(*flat)


def sampled(model: ModelConfig, params: Params, tokenizer: Tokenizer, chosen: Sequence[Task],
            responses: int, budget: int, gold: suite.Gold, seed: int = 0) -> Pool:
    """Sample responses to those tasks that fit, at temperature 1, and score them."""
    chosen, prompts = suite.fitting(model, chosen, tokenizer, budget)
    prompts = [p for p in prompts for _ in range(responses)]
    rolled = suite.joined(suite.answered(model, params, prompts, budget, seed, 1.0), len(prompts))
    owners = [task for task in chosen for _ in range(responses)]
    scores = suite.golds(owners, suite.texts(rolled, tokenizer), rolled.ended, gold)
    shape = (len(chosen), responses)
    return Pool(*(a.reshape(*shape, *a.shape[1:]) for a in rolled), scores.reshape(shape))


def split(pool: Pool, heldout: float) -> tuple[Pool, Pool]:
    """Hold out the last share of the tasks, at least one on either side."""
    count = len(pool.gold)
    if count < 2:
        raise BadInput(f"{count} task cannot be split into training and held-out; sample 2 or more")
    cut = min(count - 1, max(1, round(count * (1 - heldout))))
    return Pool(*(a[:cut] for a in pool)), Pool(*(a[cut:] for a in pool))


def labelled(pool: Pool, sharpness: float, seed: int = 0) -> tuple[Ranked, float]:
    """Draw a preference for every pair of a prompt, with p = sigmoid(sharpness x gap of gold).

    Also give the accuracy that a judge who knows the gold scores has on such labels (mean of
    max(p, 1 - p)), which no reward model should exceed. Infinite sharpness has no noise; ties of
    gold are then left out.
    """
    gap = pool.gold[:, :, None] - pool.gold[:, None, :]
    with np.errstate(invalid="ignore"):
        p = 1 / (1 + np.exp(-np.clip(np.nan_to_num(sharpness * gap), -60, 60)))
    above = np.triu(np.ones(gap.shape[1:], bool), 1)[None]
    counted = above & ((gap != 0) | np.isfinite(sharpness))
    coin = np.random.default_rng(seed).random(p.shape) < p
    first = (counted & coin).astype(np.float32)
    other = (counted & ~coin).astype(np.float32).transpose(0, 2, 1)
    ceiling = float(np.maximum(p, 1 - p)[counted].mean()) if counted.any() else 1.0
    kept = (first + other).sum((1, 2)) > 0
    if not kept.any():
        raise BadInput(f"the responses to all {len(kept)} tasks are equally good, so there is "
                       "nothing to prefer; choose a family that the model solves in part")
    return Ranked(pool.tokens[kept], pool.mask[kept], (first + other)[kept]), ceiling
