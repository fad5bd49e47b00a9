"""A `dot_general` for dense layers whose gradient is fast on XLA:CPU, and unchanged elsewhere."""

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
"""Name of the results, for `jax.checkpoint_policies.save_only_these_names`."""


def dot_general(
    lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """Stands in for `lax.dot_general` in dense layers, with a gradient that suits a CPU.

    For activations `(..., K)` times weights `(K, ...)`, contracting the last axes of `lhs` with the first of `rhs`:

    * the weight gradient folds the leading axes into one: a product that contracts two axes (batch and time) is
      compiled with materialised transposes, at about half the speed;
    * 16-bit operands are multiplied into float32 and then rounded: the fast bfloat16 kernel has a float32 result only
      (otherwise both operands are converted to float32 first);
    * the 16-bit weight gradient `lhs.T @ grad` gets a `lhs.T` that exists in memory: the fast kernel reads a transposed
      left operand at half speed, and XLA folds a plain transposition back into the product.

    What is special to the CPU stands behind `lax.platform_dependent`: elsewhere nothing is folded, so that axes sharded apart
    stay apart. The guard is that narrow on purpose: XLA inlines it late, and activations that pass through it are
    rounded to 16 bits in memory instead of inside a fusion (measured: a step takes 1.2 times as long).

    Other products go to `lax.dot_general` as they are. Forward-mode derivatives (`jax.jvp`) are not available, and
    `jax.shard_map` needs `check_vma=False`; so a trainer injects it, and no layer has it by default.

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
    )
    if not is_dense:
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)
    product = _dense(contracted, precision, jnp.dtype(preferred_element_type or lhs.dtype), lhs, rhs)
    # Inside a custom gradient, a policy of `jax.checkpoint` sees no product that it could keep.
    return checkpoint_name(product, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense(contracted: int, precision: Any, dtype: Any, lhs: Array, rhs: Array) -> Array:
    """The product over the last `contracted` axes of `lhs`, rounded to `dtype`."""
    product = _product(lhs, rhs, range(lhs.ndim - contracted, lhs.ndim), range(contracted), precision)
    if lhs.dtype != jnp.float32 and dtype == jnp.float32:
        # Not rounded, a result that XLA lays out column by column, because a transposition follows, has no CPU kernel in
        # jaxlib 0.10.2 and fails at run time ("Unsupported element type for DotThunk::Execute").
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
    """Row-major order, so that a transposition is carried out and not folded away."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
