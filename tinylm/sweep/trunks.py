"""Let runs of one shape share their warmup and stable phase: a trunk, and a branch a horizon.

A lone run of S steps spends S; its branch spends the decay's share of S, and one trunk serves all
horizons within REACH. The price is one rate and one warmup, those of the horizons' geometric mean.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tinylm.config import BadInput, identity
from tinylm.stages.pretrain import Parent, PretrainConfig

REACH = 4.0
"""the longest horizon of a trunk over its shortest, at most"""


def shared(runs: Sequence[PretrainConfig],
           rule: Callable[[float], float]) -> list[PretrainConfig]:
    """Turn runs that differ in nothing but horizon and rate into trunks and branches.

    `rule` gives the rate by tokens. A run that shares with no other stays as it is.
    """
    if any(c.optim.decay >= 1 for c in runs):
        raise BadInput("decay=1 leaves no stable phase to share; choose a decay below 1 or leave "
                       "trunks out")

    def alike(c: PretrainConfig) -> str:
        return identity(replace(c.unbranched, optim=replace(c.unbranched.optim, lr=1.0)))

    out = []
    for _, same in itertools.groupby(sorted(runs, key=lambda c: (alike(c), -c.steps)), alike):
        left = list(same)
        while left:  # from the longest: what it shares is worth most
            group = [c for c in left if c.steps * REACH >= left[0].steps]
            left = left[len(group):]
            out += _family(group, rule) if len({c.steps for c in group}) > 1 else group
    return out


def saved(runs: Sequence[PretrainConfig]) -> float:
    """Give the share of FLOPs that trunks save against training every run alone."""
    alone = sum(c.flops for c in runs if c.kind != "trunk")
    return 1.0 - sum(c.spent for c in runs) / alone


def _family(group: list[PretrainConfig], rule: Callable[[float], float]) -> list[PretrainConfig]:
    longest = group[0]
    middle = math.exp(sum(math.log(c.steps) for c in group) / len(group))
    warmup = longest.optim.warmup_steps or max(1, round(longest.optim.warmup * middle))
    optim = replace(longest.optim, lr=rule(middle * longest.batch), warmup_steps=warmup)
    leave = {c.steps: math.floor(c.steps - max(1.0, optim.decay * c.steps)) for c in group}
    trunk = replace(longest, optim=replace(optim, decay=0.0), steps=max(leave.values()),
                    branches=tuple(sorted(set(leave.values()))))
    return [trunk, *(replace(c, optim=optim, parent=Parent(identity(trunk), leave[c.steps]))
                     for c in group)]
