"""A `dot_general` for dense layers, with a fast gradient on XLA:CPU and the standard one elsewhere."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

PRODUCT = "dense_product"
"""Name of the results for `jax.checkpoint_policies.save_only_these_names`."""


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: jax.lax.DotDimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Array:
    """Replaces `lax.dot_general` in dense layers, with a gradient that is fast on a CPU.

    It applies to activations `(..., K)` times weights `(K, ...)`: the last axes of `lhs` are contracted with the first axes of
    `rhs`. There are three changes:

    * The weight gradient merges the leading axes into one. XLA compiles a product that contracts two axes (batch and time)
      with materialised transposes, at about half the speed.
    * 16-bit operands give a float32 product, which is then rounded. The fast bfloat16 kernel has only float32 results, and
      XLA would otherwise convert both operands to float32 first.
    * In the 16-bit weight gradient `lhs.T @ grad`, `lhs.T` is stored in memory. The fast kernel reads a transposed left
      operand at half speed, and XLA would merge a plain transposition into the product.

    The code for CPUs is inside `lax.platform_dependent`. On other platforms no axes are merged, and each keeps its sharding.
    It has as little code inside as possible, since XLA inlines it late. Activations that pass through it are rounded to 16 bits
    in memory instead of inside a fusion (measured: a step takes 1.2 times as long).

    Other products use `lax.dot_general` unchanged. Forward-mode derivatives (`jax.jvp`) are not available, and `jax.shard_map`
    needs `check_vma=False`. Therefore the trainer injects this function, and no layer uses it by default.

    Arguments and result are as for `lax.dot_general`.

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
    )
    if not is_dense:
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)
    product = _dense(contracted, precision, jnp.dtype(preferred_element_type or lhs.dtype), lhs, rhs)
    # A policy of `jax.checkpoint` does not see products inside a custom gradient; it sees this name.
    return checkpoint_name(product, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense(contracted: int, precision: Any, dtype: Any, lhs: Array, rhs: Array) -> Array:
    """The product over the last `contracted` axes of `lhs`, rounded to `dtype`."""
    product = _product(lhs, rhs, range(lhs.ndim - contracted, lhs.ndim), range(contracted), precision)
    if lhs.dtype != jnp.float32 and dtype == jnp.float32:
        # If a transposition follows, XLA stores the result in column-major order. In jaxlib 0.10.2, such a product without
        # rounding has no CPU kernel and fails at run time ("Unsupported element type for DotThunk::Execute").
        product = lax.platform_dependent(product, cpu=_in_memory, default=lambda x: x)
    return product.astype(dtype)


def _dense_forward(contracted: int, precision: Any, dtype: Any, lhs: Array, rhs: Array) -> tuple[Array, Any]:
    return _dense(contracted, precision, dtype, lhs, rhs), (lhs, rhs)


def _dense_backward(contracted: int, precision: Any, dtype: Any, saved: Any, grad: Array) -> tuple[Array, Array]:
    del dtype
    lhs, rhs = saved
    grad, leading = grad.astype(lhs.dtype), lhs.ndim - contracted

    def on_cpu(lhs: Array, grad: Array) -> Array:
        lhs = lhs.reshape(math.prod(lhs.shape[:leading]), math.prod(lhs.shape[leading:]))
        grad = grad.reshape(lhs.shape[0], math.prod(grad.shape[leading:]))
        transposed = lhs.T if lhs.dtype == jnp.float32 else _in_memory(lhs.T)
        return _product(transposed, grad, (1,), (0,), precision).reshape(rhs.shape)

    def elsewhere(lhs: Array, grad: Array) -> Array:
        return _product(lhs, grad, range(leading), range(leading), precision)

    lhs_gradient = _product(grad, rhs, range(leading, grad.ndim), range(contracted, rhs.ndim), precision)
    rhs_gradient = lax.platform_dependent(lhs, grad, cpu=on_cpu, default=elsewhere)
    return lhs_gradient.astype(lhs.dtype), rhs_gradient.astype(rhs.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


def _product(
    left: Array, right: Array, left_contract: Sequence[int], right_contract: Sequence[int], precision: Any
) -> Array:
    dimension_numbers = ((tuple(left_contract), tuple(right_contract)), ((), ()))
    return lax.dot_general(left, right, dimension_numbers, precision, preferred_element_type=jnp.float32)


def _in_memory(x: Array) -> Array:
    """Row-major order, so that XLA carries out a transposition instead of merging it into a product."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
