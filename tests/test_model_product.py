"""Products: rounded operands, float32 sums, the fast program on a CPU, and oneDNN's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import machine
from tinylm.model.product import Arithmetic, product
from tinylm.native import library

SHAPES = {"btd,dnk->btnk": ((3, 5, 8), (8, 2, 4), (3, 5, 2, 4)),
          "bthk,hkd->btd": ((3, 5, 2, 4), (2, 4, 8), (3, 5, 8)),
          "btd,df->btf": ((3, 5, 8), (8, 6), (3, 5, 6)),
          "btd,vd->btv": ((3, 5, 8), (7, 8), (3, 5, 7))}
HALF = Arithmetic(jnp.dtype("bfloat16"))
CALLED = pytest.param(Arithmetic(onednn=True), marks=pytest.mark.skipif(
    not library.onednn(machine.cache()), reason="needs oneDNN and a C compiler"))


@pytest.mark.parametrize("by", [HALF, Arithmetic(), CALLED])
@pytest.mark.parametrize("spec", SHAPES)
def test_values_and_gradients_are_sums_of_operands_of_that_type(spec, by):
    def low(a):
        return np.asarray(a.astype(by.dtype), np.float64)

    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in SHAPES[spec])
    y, back = jax.vjp(lambda x, w: product(spec, x, w, by), x, w)
    dx, dw = back(dy)
    x_axes, w_axes, y_axes = spec.replace("->", ",").split(",")
    expected = (np.einsum(spec, low(x), low(w)),
                np.einsum(f"{y_axes},{w_axes}->{x_axes}", low(dy), low(w)),
                np.einsum(f"{x_axes},{y_axes}->{w_axes}", low(x), low(dy)))
    for got, wanted in zip((y, dx, dw), expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6)


def test_float32_operands_are_not_rounded():
    x, w = jnp.full((1, 1, 2), 1 + 2**-12), jnp.full((2, 3), 1 - 2**-12)
    assert product("btd,df->btf", x, w, Arithmetic())[0, 0, 0] == 2 * (1 - 2**-24)
    assert product("btd,df->btf", x, w, HALF)[0, 0, 0] == 2


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout is a CPU's")
def test_all_three_products_have_the_form_that_a_cpu_multiplies_fast():
    def loss(x, w):
        return jnp.sum(product("btd,df->btf", x, w, HALF) ** 2)

    x, w = jnp.ones((2, 64, 96)), jnp.ones((96, 80))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w).compile().as_text()
    dots = re.findall(r" dot\((\S+), (\S+)\), lhs_contracting_dims={(\d)}", text)
    assert len(dots) == 3
    for left, right, summed in dots:
        (kind, innermost), (other, _) = (
            re.findall(re.escape(name) + r" = (\w+)\[.*?\]{(\d)", text)[0]
            for name in (left, right))
        assert (kind, other, innermost) == ("bf16", "bf16", summed)
