"""The same pure step over P members of one shape, their states stacked on a leading axis.

A member is live while step < hyper.steps. One that is not is left as it is, to the bit, while the
rest goes on. One whose loss or gradient is not finite is left as it was before that step, with a
horizon of 0. Metrics of steps not taken are NaN.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tinylm.train.step import Metrics, State, Step


def make_step(step: Step, vmap: bool) -> Step:
    """Build step(states, batches) over members: side by side, or one after the other.

    One after the other a member that is not live costs nothing; side by side it costs the same.
    """

    def one(state: State, batch: Any) -> tuple[State, Metrics]:
        def advance() -> tuple[State, Metrics]:
            after, metrics = step(state, batch)
            sound = jnp.isfinite(metrics["nats_per_token"]) & jnp.isfinite(metrics["grad_norm"])
            sound |= metrics.get("skipped", 0.0) > 0
            return jax.tree.map(lambda new, old: jnp.where(sound, new, old), after,
                                over(state)), metrics

        def hold() -> tuple[State, Metrics]:
            return state, jax.tree.map(lambda m: jnp.full(m.shape, jnp.nan, m.dtype),
                                       jax.eval_shape(step, state, batch)[1])

        return jax.lax.cond(state.step < state.hyper.steps, advance, hold)

    if vmap:
        return jax.vmap(one)
    return lambda states, batches: jax.lax.map(lambda pair: one(*pair), (states, batches))


def stack(states: Sequence[State], size: int) -> State:
    """Stack members' states, padded to `size` with the last one, never live."""
    padding = [over(states[-1])] * (size - len(states))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states, *padding)


def member(states: State, index: int) -> State:
    """Take one member's state out of the stack."""
    return jax.tree.map(lambda a: a[index], states)


def over(state: State) -> State:
    """Give the state with its horizon behind it."""
    return state._replace(hyper=state.hyper._replace(steps=jnp.zeros_like(state.hyper.steps)))
