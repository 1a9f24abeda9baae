"""A function of a row, of many rows: the same for every number of rows, and without waiting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import machine
from tinylm.model.decoder import ModelConfig
from tinylm.train import rowwise

MODEL = ModelConfig(D=8, L=1, H=1)


class Row(NamedTuple):
    tokens: np.ndarray
    weight: np.ndarray


def summed(model, params, row):
    return {"sum": (row.tokens * params).sum() * row.weight, "row": row.tokens * model.D}


@pytest.mark.parametrize("count", [1, 3, 4, 64, 67, 130])
def test_every_row_is_answered_in_its_place_however_many_there_are(count):
    rng = np.random.default_rng(count)
    rows = Row(rng.normal(size=(count, 5)).astype(np.float32), rng.random(count, np.float32))
    params = np.arange(5, dtype=np.float32)
    found = rowwise.each(summed, MODEL, params, rows)
    np.testing.assert_allclose(found["sum"], rows.tokens @ params * rows.weight, rtol=1e-5,
                               atol=1e-6)
    np.testing.assert_array_equal(found["row"], rows.tokens * MODEL.D)


def test_devices_share_the_rows_and_none_waits_for_another():
    mesh = machine.mesh(jax.device_count())
    program = rowwise._program(summed, MODEL, mesh)
    rows = Row(jnp.ones((8, 5)), jnp.ones(8))
    found = program(jnp.ones(5), rows)["row"]
    assert [part.data.shape for part in found.addressable_shards] == [(2, 5)] * 4
    said = program.lower(jnp.ones(5), rows).compile().as_text()
    assert not [word for word in ("all-gather", "all-reduce", "collective") if word in said]
