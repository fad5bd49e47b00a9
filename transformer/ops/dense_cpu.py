"""A `dot_general` for dense layers whose forward and backward pass are fast on XLA:CPU, and unchanged elsewhere."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

Product = Callable[[Any, Any], Any]


def dot_general(
    lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """Stands in for `lax.dot_general` in dense layers, with a gradient that suits a CPU.

    For activations `(..., K)` times weights `(K, ...)`, contracting the last axes of `lhs` with the first of `rhs`:

    * the leading axes are folded into one in both passes: a weight gradient that contracts two axes (batch and time)
      is compiled with materialised transposes, at about half the speed;
    * 16-bit operands are multiplied into float32: the fast bfloat16 kernel has a float32 result only (for a bfloat16
      one, both operands are converted to float32 first);
    * the 16-bit weight gradient `lhs.T @ grad` gets a `lhs.T` that exists in memory: the fast kernel reads a
      transposed left operand at half speed, and XLA folds a plain transposition back into the product.

    All of it stands behind `lax.platform_dependent`: on TPU and GPU the compiled program is that of `lax.dot_general` and
    its gradient, so that nothing is folded across sharded axes. Other products go to `lax.dot_general` as they are.
    Forward-mode derivatives (`jax.jvp`) are not available, so a trainer injects it and no layer has it by default.

    Args and result are those of `lax.dot_general`.

    Example:
        >>> lhs, rhs = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
        >>> dot_general(lhs, rhs, (((2,), (0,)), ((), ()))).shape
        (2, 3, 5)
    """
    (lhs_contract, rhs_contract), batch = dimension_numbers
    contracted = len(lhs_contract)
    is_dense = (
        not any(batch)
        and 0 < contracted < min(lhs.ndim, rhs.ndim)
        and tuple(lhs_contract) == tuple(range(lhs.ndim - contracted, lhs.ndim))
        and tuple(rhs_contract) == tuple(range(contracted))
        and lhs.dtype == rhs.dtype
        and lhs.dtype in (jnp.float32, jnp.bfloat16)
        and lhs.size * rhs.size > 0
    )
    plain = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return _dense(plain, contracted, lhs, rhs) if is_dense else plain(lhs, rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(plain: Product, contracted: int, lhs: Array, rhs: Array) -> Array:
    """`plain(lhs, rhs)`, where `contracted` axes are summed over."""

    def cpu(lhs: Array, rhs: Array) -> Array:
        out = jax.eval_shape(plain, lhs, rhs)
        product = _matmul(_fold_last(lhs, contracted), _fold_first(rhs, contracted))
        return product.astype(out.dtype).reshape(out.shape)

    return lax.platform_dependent(lhs, rhs, cpu=cpu, default=plain)


def _dense_forward(plain: Product, contracted: int, lhs: Array, rhs: Array) -> tuple[Array, tuple[Array, Array]]:
    return _dense(plain, contracted, lhs, rhs), (lhs, rhs)


def _dense_backward(plain: Product, contracted: int, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    def cpu(lhs: Array, rhs: Array, grad: Array) -> tuple[Array, Array]:
        x, w = _fold_last(lhs, contracted), _fold_first(rhs, contracted)
        g = grad.reshape(x.shape[0], w.shape[1]).astype(lhs.dtype)
        x_gradient = _matmul(g, w.T)
        w_gradient = _matmul(x.T if x.dtype == jnp.float32 else _in_memory(x.T), g)
        return x_gradient.astype(lhs.dtype).reshape(lhs.shape), w_gradient.astype(rhs.dtype).reshape(rhs.shape)

    def default(lhs: Array, rhs: Array, grad: Array) -> tuple[Array, Array]:
        return jax.vjp(plain, lhs, rhs)[1](grad)

    return lax.platform_dependent(*saved, grad, cpu=cpu, default=default)


_dense.defvjp(_dense_forward, _dense_backward)


def _matmul(left: Array, right: Array) -> Array:
    product = jnp.dot(left, right, preferred_element_type=jnp.float32)
    # A 16-bit product whose result XLA lays out column by column, because a transposition follows, has no CPU kernel in
    # jaxlib 0.10.2 and fails at run time.
    return product if left.dtype == jnp.float32 else _in_memory(product)


def _in_memory(matrix: Array) -> Array:
    """Row-major order, so that a transposition is carried out and not folded away."""
    return with_layout_constraint(matrix, Layout((0, 1)))


def _fold_last(x: Array, count: int) -> Array:
    return x.reshape(math.prod(x.shape[: x.ndim - count]), math.prod(x.shape[x.ndim - count :]))


def _fold_first(x: Array, count: int) -> Array:
    return x.reshape(math.prod(x.shape[:count]), math.prod(x.shape[count:]))
