"""One pure step for every stage: micro-batched, data-parallel, accumulation weighted by tokens."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from tinylm.config import BadInput
from tinylm.model.decoder import Params
from tinylm.train.losses import Loss
from tinylm.train.optim import Hyper, rate

Metrics = dict[str, Array]


class State(NamedTuple):
    """All that a run carries from step to step: plain arrays."""

    params: Params
    opt: Any
    hyper: Hyper
    step: Int[Array, ""]


Step = Callable[[State, Any], tuple[State, Metrics]]


def start(params: Params, tx: optax.GradientTransformation, hyper: Hyper) -> State:
    """Give the state before the first step."""
    return State(params, tx.init(params), hyper, jnp.zeros((), jnp.int32))


def make_step(loss: Loss, tx: optax.GradientTransformationExtraArgs, mesh: jax.sharding.Mesh,
              micro: int, skip: bool = False) -> Step:
    """Build step(state, batch) -> (state, metrics).

    With `skip` a step whose loss or gradient is not finite changes nothing but the count of steps;
    its metrics are NaN but for `skipped`, which is 1 there and 0 elsewhere.

    Every device takes its share of the batch's rows, `micro` at a time; gradients are of the sum
    of the losses and are divided once by the total weight, so neither micro-batches nor devices
    change what is computed (only the order of the additions).
    """

    one = jax.jit(jax.value_and_grad(loss, has_aux=True))  # jitted: traced once for both its uses

    def gradients(params: Params, batch: Any) -> tuple[Params, Metrics]:
        groups = jax.tree.map(lambda a: a.reshape(-1, micro, *a.shape[1:]), batch)

        def add(total, group):
            (_, sums), grads = one(params, group)
            return jax.tree.map(jnp.add, total, (grads, sums)), None

        first = jax.tree.map(lambda a: a[0], groups)
        (_, sums), grads = jax.eval_shape(one, params, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, sums))
        total, _ = jax.lax.scan(add, zeros, groups)
        return jax.lax.psum(total, "data")

    everywhere, by_row = PartitionSpec(), PartitionSpec("data")
    split = jax.shard_map(gradients, mesh=mesh, in_specs=(everywhere, by_row),
                          out_specs=everywhere, check_vma=False)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        grads, sums = split(state.params, batch)
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt = tx.update(grads, state.opt, state.params, hyper=state.hyper, step=state.step)
        metrics = {k: v / weight for k, v in sums.items() if k != "weight"}
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["lr"] = rate(state.hyper, state.step)
        params = optax.apply_updates(state.params, updates)
        after = State(params, opt, state.hyper, state.step + 1)
        return passed_by(state, after, metrics) if skip else (after, metrics)

    return step


def passed_by(state: State, after: State, metrics: Metrics) -> tuple[State, Metrics]:
    """Go on from `after` where all metrics are finite, else from `state`, a step further."""
    sound = functools.reduce(jnp.logical_and, [jnp.isfinite(v) for v in metrics.values()])
    kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), after,
                        state._replace(step=after.step))
    return kept, {**{k: jnp.where(sound, v, jnp.nan) for k, v in metrics.items()},
                  "skipped": 1.0 - sound}


def make_chunk(step: Step) -> Callable[[State, Any, int], tuple[State, Metrics]]:
    """Compile chunk(state, batches, n): the first n of the stacked batches, one step each.

    n is an argument, not a shape, so one program serves every length; metrics come back stacked.
    """

    def chunk(state: State, batches: Any, n: Int[Array, ""]) -> tuple[State, Metrics]:
        first = jax.tree.map(lambda a: a[0], batches)
        size = jax.tree.leaves(batches)[0].shape[0]
        shapes = jax.eval_shape(step, state, first)[1]
        log = {k: jnp.zeros((size, *s.shape), s.dtype) for k, s in shapes.items()}

        def body(i, carry):
            state, log = carry
            state, metrics = step(state, jax.tree.map(lambda a: a[i], batches))
            return state, {k: log[k].at[i].set(v) for k, v in metrics.items()}

        return jax.lax.fori_loop(0, n, body, (state, log))

    return jax.jit(chunk, donate_argnums=0)


def place(mesh: jax.sharding.Mesh, batches: Any, rows: int = 1) -> Any:
    """Put stacked host batches on the mesh, their axis number `rows` over the data axis.

    They are [steps, rows, ...], a population's [steps, members, rows, ...]. With several processes
    each passes its own rows.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * rows, "data"))
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)),
                        batches)


def by_row(mesh: jax.sharding.Mesh) -> Callable[[Any], jax.Array]:
    """Give what puts an array on the mesh, its first axis over the data axis."""
    return functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))


def replicate(mesh: jax.sharding.Mesh, state: Any) -> Any:
    """Put a state, or parameters, on every device of the mesh."""
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def check_rows(rows: int, devices: int, micro: int) -> None:
    """Refuse a batch that does not divide into the plan's devices and micro-batches."""
    if rows % (devices * micro):
        raise BadInput(f"{rows} sequences a step do not divide by {devices} devices x "
                       f"{micro} a micro-batch; choose a multiple of {devices * micro}")
