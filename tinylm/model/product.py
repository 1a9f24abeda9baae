"""Products of activations with parameters: in float32, or of operands rounded to bfloat16.

A plan may give float32's to oneDNN (tinylm/native), which takes turned operands as they lie.
A bfloat16 product rounds its two operands and adds up in float32, and so do both of its gradients,
which are written out here because XLA's CPU multiplies them fast in one order only.
An accelerator, which waits for memory more than for products, rounds the sums too, but for logits
and the gradients of parameters: a tenth less time a step of a 124M model on an H200
(by hand: experiments/LOG.md).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from tinylm import machine
from tinylm.native import library

FULL = jnp.dtype("float32")


@dataclass(frozen=True)
class Arithmetic:
    """How a model computes."""

    dtype: jnp.dtype = FULL
    """what operands are rounded to"""
    onednn: bool = False
    """float32 products by oneDNN where XLA can call it (else, and elsewhere, XLA's own)"""
    native: bool = False
    """norms, gates, attention and a narrow head's loss by our C, likewise"""


def product(spec: str, x: Float[Array, "B T ..."], w: Float[Array, "..."],
            by: Arithmetic, logits: bool = False) -> Float[Array, "B T ..."]:
    """Give einsum(spec, x, w), float32; bfloat16 rounds x, w and the gradient coming in.

    `spec` has the form "bt<x's axes>,<w's axes>->bt<the others of w>". `logits` are never rounded.
    """
    called = by.onednn and by.dtype == FULL and can_call(library.PRODUCTS)
    return _called(spec, x, w) if called else _product(spec, by.dtype, logits, x, w)


def added(spec: str, a: Array, b: Array, kind: jnp.dtype = FULL) -> Array:
    """Give einsum(spec, a, b) of sums of `kind`, as float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=kind).astype(FULL)


def can_call(names: tuple[str, ...]) -> bool:
    """Tell whether these functions of tinylm/native can be called here."""
    return jax.default_backend() == "cpu" and all(
        library.register(machine.cache(), name) for name in names)


def named(by: Arithmetic, *names: str) -> tuple[str, ...]:
    """Name the functions of tinylm/native that multiply operands of this type."""
    return names if by.dtype == FULL else tuple(f"bf16_{name}" for name in names)


def foreign(name: str, results: Any, *given: Array) -> Any:
    """Call a function of tinylm/native; `results` are of float32 and have the shapes to give."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, FULL), results)
    return jax.ffi.ffi_call(f"tinylm_{name}", shapes, vmap_method="sequential")(*given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _called(spec: str, x: Array, w: Array) -> Array:
    return _called_forward(spec, x, w)[0]


def _called_forward(spec, x, w):
    left, right, head = _matrices(spec, x, w)
    y = _call("right_turned" if head else "plain", left, right)
    return y.reshape(*x.shape[:2], *(w.shape[:1] if head else w.shape[x.ndim - 2:])), (x, w)


def _called_backward(spec, kept, dy):
    x, w = kept
    left, right, head = _matrices(spec, x, w)
    dy = dy.reshape(len(left), -1)
    dx = _call("plain" if head else "right_turned", dy, right)
    dw = _call("left_turned", *((dy, left) if head else (left, dy)))
    return dx.reshape(x.shape), dw.reshape(w.shape)


_called.defvjp(_called_forward, _called_backward)


def _matrices(spec: str, x: Array, w: Array) -> tuple[Array, Array, bool]:
    """Give x as [B T, summed], w as [summed, others], or as [others, summed] where it is a head."""
    summed = math.prod(x.shape[2:])
    head = _head(spec)
    return x.reshape(-1, summed), w if head else w.reshape(summed, -1), head


def _head(spec: str) -> bool:
    x_axes, w_axes, _ = spec.replace("->", ",").split(",")
    return w_axes[0] not in x_axes


def _call(way: str, a: Array, b: Array) -> Array:
    shape = a.shape[way == "left_turned"], b.shape[way != "right_turned"]
    return foreign(way, jax.ShapeDtypeStruct(shape, FULL), a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(spec: str, dtype: jnp.dtype, logits: bool, x: Array, w: Array) -> Array:
    return _forward(spec, dtype, logits, x, w)[0]


def _forward(spec, dtype, logits, x, w):
    x, w = x.astype(dtype), w.astype(dtype)
    return (added if logits else _result)(spec, x, w), (x, w)


def _backward(spec, dtype, logits, kept, dy):
    (x, w), dy = kept, dy.astype(dtype)
    x_axes, w_axes, y_axes = spec.replace("->", ",").split(",")
    dx = _result(f"{y_axes},{w_axes}->{x_axes}", dy, w)
    if _head(spec):  # its gradient's rows are long
        return dx, added(f"{y_axes[2:]}bt,{x_axes}->{w_axes}", _turn(dy), x)
    if dtype == FULL:
        return dx, added(f"{x_axes},{y_axes}->{w_axes}", x, dy)
    return dx, added(f"{x_axes[2:]}bt,{y_axes}->{w_axes}", _turn(x), dy)


_product.defvjp(_forward, _backward)


def _turn(a: Array) -> Array:
    """Bring the axes (batch, time) to the end; on a CPU in memory too.

    XLA's CPU has a fast bfloat16 product only where the summed axis of the left operand lies
    innermost; left to itself it takes the turn as a view and multiplies at float32's rate: 95
    instead of 180 GFLOP/s of one core at 256 x 384 x 1024. In float32 it is slow where rows are a
    long power of two, whose columns share the same lines of the cache: 21 instead of 66 at
    256 x 64 x 1024 without AVX-512 (by hand: experiments/LOG.md).
    """
    B, T, *rest = a.shape

    def in_memory(flat):
        return with_layout_constraint(flat.T, Layout((0, 1)))

    flat = jax.lax.platform_dependent(a.reshape(B * T, math.prod(rest)), cpu=in_memory,
                                      default=jnp.transpose)
    return flat.reshape(*rest, B, T)


def _result(spec: str, a: Array, b: Array) -> Array:
    """Give a product that an accelerator rounds to bfloat16 where its operands are."""
    if a.dtype == FULL:
        return added(spec, a, b)
    return jax.lax.platform_dependent(
        a, b, cpu=functools.partial(added, spec),
        default=functools.partial(added, spec, kind=jnp.dtype("bfloat16")))
