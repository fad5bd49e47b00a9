"""Trees of parameters with low-rank adapters: split into frozen and trained parts, joined again, and merged."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from transformer.types import PyTree

LORA_A, LORA_B = "lora_a", "lora_b"
"""The parameters of an adapter, stored beside the `kernel` that they adapt."""
HEADS = ("classifier", "pooler", "pooling")
"""Parts of a model that are fully trained together with adapters: the head of a classifier."""


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """`(frozen, trained)`: the base, and the adapters with `HEADS`. A model without adapters gives `((), params)`.

    Example:
        >>> split({"query": {"kernel": 1, "lora_a": 2, "lora_b": 3}})
        ({'query': {'kernel': 1}}, {'query': {'lora_a': 2, 'lora_b': 3}})
        >>> split({"query": {"kernel": 1}})
        ((), {'query': {'kernel': 1}})
    """
    adapters = _chosen(params, adapters=True)
    if not adapters:
        return (), params
    body = {name: part for name, part in params.items() if name not in HEADS}
    return _chosen(body, adapters=False), adapters | {name: params[name] for name in HEADS if name in params}


def _chosen(params: PyTree, *, adapters: bool) -> PyTree:
    """The nested dictionary, either with the adapters only or without them; empty parts are left out."""
    found = {}
    for name, part in params.items():
        if isinstance(part, dict):
            part = _chosen(part, adapters=adapters)
            if part:
                found[name] = part
        elif (name in (LORA_A, LORA_B)) == adapters:
            found[name] = part
    return found


def join(frozen: PyTree, trained: PyTree) -> PyTree:
    """The inverse of `split`."""
    if not isinstance(frozen, dict):
        return trained
    both = {name: join(frozen[name], trained[name]) for name in frozen if name in trained}
    return {**frozen, **trained, **both}


def merge(params: PyTree, scale: float, dtype: DTypeLike | None = None) -> PyTree:
    """Parameters of the model without adapters: `kernel + scale · A · B`, computed in float32.

    Args:
        params: the parameters, with adapters.
        scale: `AdapterConfig.scale`.
        dtype: type of the merged kernels; None keeps each kernel's type.
    """
    if not isinstance(params, dict):
        return params
    if LORA_A in params:
        rest = {name: x for name, x in params.items() if name not in (LORA_A, LORA_B)}
        return rest | {"kernel": _merged(params["kernel"], params[LORA_A], params[LORA_B], scale, dtype)}
    return {name: merge(part, scale, dtype) for name, part in params.items()}


def _merged(kernel: Any, lora_a: Any, lora_b: Any, scale: float, dtype: Any) -> Any:
    def product(lora_a: Any, lora_b: Any) -> Any:
        return jnp.tensordot(lora_a, lora_b, 1, precision=jax.lax.Precision.HIGHEST)

    # In a scanned stack, all three arrays have a leading axis of layers.
    multiply = product if lora_a.ndim + lora_b.ndim - 2 == kernel.ndim else jax.vmap(product)
    added = scale * multiply(lora_a.astype(jnp.float32), lora_b.astype(jnp.float32))
    return (kernel.astype(jnp.float32) + added).astype(dtype or kernel.dtype)
