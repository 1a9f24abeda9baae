"""Which runs of a sweep train together as one population: a pure function of the list and limits.

Runs of one program are sorted by length and cut into packs of equal size, so that the longest are
together; a short last pack is padded. Nothing is refilled: a lane whose run is over stays idle.
"""

import dataclasses

from tinylm.laws.accounting import activation_bytes
from tinylm.machine import Plan
from tinylm.stages.pretrain import PretrainConfig, counts

MOST = 64
"""members of a population on an accelerator, unless fewer fit"""
STATE = 24
"""bytes a parameter: weights, two moments, gradient, its sum over micro-batches, and the update"""


def pack(runs: dict[str, PretrainConfig], plans: dict[str, Plan], most: int,
         memory: float) -> tuple[list[list[str]], dict[str, Plan]]:
    """Give the packs, most FLOPs of a member first, and every run's plan with its pack's size.

    `most` members at once at most, of what fits `memory` bytes of one device. A run that is alone
    with its program keeps its plan.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(runs, key=lambda n: (-runs[n].flops, n)):
        alone = runs[name].kind != "pretrain"  # trunks and branches start and end apart
        groups.setdefault(name if alone else runs[name].program, []).append(name)
    packs, sized = [], {}
    for names in groups.values():
        plan = fitting(runs[names[0]], plans[names[0]], min(most, len(names)), memory)
        count = -(-len(names) // plan.population)  # equal packs: as little padding as can be
        plan = dataclasses.replace(plan, population=-(-len(names) // count))
        cut = range(0, len(names), plan.population)
        packs += [names[i : i + plan.population] for i in cut]
        sized.update(dict.fromkeys(names, plan))
    return sorted(packs, key=lambda p: -runs[p[0]].flops), sized


def fitting(config: PretrainConfig, plan: Plan, most: int, memory: float) -> Plan:
    """Give the plan with the largest population, then micro-batch, that fits a device; else alone.

    The micro-batch divides the rows as the plan's does and is never larger.
    """
    share = config.rows // plan.devices
    tried = (dataclasses.replace(plan, population=size, micro=micro)
             for size in range(most, 1, -1) for micro in range(plan.micro, 0, -1)
             if share % micro == 0)
    return next((p for p in tried if held_bytes(config, p) <= memory), plan)


def held_bytes(config: PretrainConfig, plan: Plan) -> float:
    """Estimate what a device holds: states, two chunks of batches, a micro-batch's way back.

    Activations are those of a 16-bit step, doubled: ours are float32 between the products. One
    after the other, members hold them in turn.
    """
    shape, tokens = config.model.shape, plan.micro * config.model.T
    lanes = plan.population if plan.vmap else 1
    batches = 2 * 8 * plan.chunk * config.batch / plan.devices
    return (plan.population * (STATE * sum(counts(config.model).values()) + batches)
            + lanes * 2 * activation_bytes(shape, tokens))


def idle(packs: list[list[str]], runs: dict[str, PretrainConfig], plans: dict[str, Plan]) -> float:
    """Give the share of the lanes' FLOPs that no run uses: padding, and runs that ended early."""
    held = sum(plans[p[0]].population * max(runs[n].flops for n in p) for p in packs)
    return 1 - sum(c.flops for c in runs.values()) / held
