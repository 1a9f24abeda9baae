"""A function of one row, of many: over all devices, and on a CPU a row at a time.

Every row of a split is scored, ranked responses are, rollouts are read: a pass forward each, whose
rows do not meet. On a CPU a row's logits stay in the cache where those of a batch do not.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from tinylm import machine
from tinylm.model.decoder import ModelConfig
from tinylm.train import step

AT_ONCE = 16
"""rows that a device is given at once"""

One = Callable[[ModelConfig, Any, Any], Any]


def each(one: One, model: ModelConfig, params: Any, rows: Any) -> Any:
    """Give one(model, params, row) of every row of a tree of arrays, stacked, in numpy.

    `one` and the model name the compiled program, so it is a function of a module.
    """
    count, devices = len(jax.tree.leaves(rows)[0]), jax.device_count()
    at_once = min(AT_ONCE, -(-count // devices)) * devices
    mesh, parts = machine.mesh(devices), []
    score, params = _program(one, model, mesh), step.replicate(mesh, params)
    for at in range(0, count, at_once):
        here = np.minimum(np.arange(at, at + at_once), count - 1)  # the last again to the end
        parts.append(score(params, jax.tree.map(operator.itemgetter(here), rows)))
    return jax.tree.map(lambda *a: np.concatenate([_host(p) for p in a])[:count], *parts)


@functools.cache
def _program(one: One, model: ModelConfig, mesh: jax.sharding.Mesh) -> Callable[[Any, Any], Any]:
    def mine(params: Any, rows: Any) -> Any:
        at_once = None if jax.default_backend() == "cpu" else AT_ONCE  # 1 would compute all cases
        return jax.lax.map(functools.partial(one, model, params), rows, batch_size=at_once)

    # no collective: of many such programs under way at once, those of a CPU may wait for ever
    by_row = PartitionSpec("data")
    return jax.jit(jax.shard_map(mine, mesh=mesh, in_specs=(PartitionSpec(), by_row),
                                 out_specs=by_row, check_vma=False))


def _host(found: jax.Array) -> np.ndarray:
    """Bring what lies on the devices, of all processes, to this one."""
    whole = found.is_fully_addressable
    return np.asarray(found if whole else multihost_utils.process_allgather(found, tiled=True))
