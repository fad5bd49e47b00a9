"""Prepares a model and its parameters for the fastest decoding on their platform."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from transformer.layers.embedding import Embed
from transformer.layers.linear import Linear
from transformer.layers.scan_params import loop_params
from transformer.models.decoder import Decoder
from transformer.ops.panels import Panels, panel_width
from transformer.ops.quantized import Quantized
from transformer.types import PyTree


def loop_model(model: Decoder, params: PyTree) -> tuple[Decoder, PyTree]:
    """Turn a scanned model into a loop on a CPU or GPU, where a scan copies a layer's parameters and cache in every step."""
    if not (model.config.scan_layers and _platform(params) in ("cpu", "gpu")):
        return model, params
    config = dataclasses.replace(model.config, scan_layers=False)
    return model.clone(config=config), jax.jit(loop_params)(params)


def prepare(model: Decoder, params: PyTree, batch_size: int) -> PyTree:
    """Parameters for faster decoding of `batch_size` rows by `model.apply`, with the same logits.

    On a CPU, `Panels` replace kernels. On a GPU, kernels are cast to the model's type once, since each step would cast them
    again. Prepare the parameters again when they change. On other platforms, and for many rows on a CPU, the result is `params`
    itself.
    """
    platform, made = _platform(params), {}
    if platform == "cpu" and panel_width(batch_size) > 0:
        made = _cut(model, params, batch_size)
        made = _in_large_pages(made) if made else {}
    if platform == "gpu" and model.config.dtype != model.config.param_dtype:
        made = _cast(model, params)
    return unflatten_dict({**flatten_dict(params), **made}) if made else params


class DecodingModel:
    """A model and its parameters on the device, prepared for decoding; the latest prepared parameters are kept."""

    def __init__(self, model: Decoder, params: PyTree) -> None:
        self.model, params = loop_model(model, params)
        self.params = jax.tree.map(jnp.asarray, params)
        self._prepared: dict[int, PyTree] = {}

    def prepared(self, num_rows: int) -> PyTree:
        """The parameters for the fastest decoding of this number of rows."""
        if num_rows not in self._prepared:
            self._prepared = {num_rows: prepare(self.model, self.params, num_rows)}
        return self._prepared[num_rows]


@functools.partial(jax.jit, static_argnames=("model", "batch_size"))
def _cut(model: Decoder, params: PyTree, batch_size: int) -> dict[tuple[str, ...], Panels]:
    """The multiplied parameters by path, each cut into panels by its layer."""
    flat: Any = flatten_dict(params)
    owners = _multiplied(model, params, batch_size)
    return {path: owner.cut(flat[path], panel_width(batch_size)) for path, owner in owners.items()}


@functools.partial(jax.jit, static_argnames="model")
def _cast(model: Decoder, params: PyTree) -> dict[tuple[str, ...], Any]:
    """The multiplied parameters by path, in the model's type."""
    flat: Any = flatten_dict(params)
    return {path: flat[path].astype(owner.runtime.dtype) for path, owner in _multiplied(model, params, 1).items()}


def _multiplied(model: Decoder, params: PyTree, batch_size: int) -> dict[tuple[str, ...], Linear | Embed]:
    """The layers of the parameters that a decoding step multiplies, by the parameter's path."""
    owners: dict[tuple[str, ...], Linear | Embed] = {}

    def look(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        if isinstance(module, Linear) and method == "__call__":
            owners[*module.path, "kernel"] = module
        if isinstance(module, Embed) and method == "attend":
            owners[*module.path, "embedding"] = module
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        tokens_B1 = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
        jax.eval_shape(lambda params, tokens: model.apply({"params": params}, tokens), params, tokens_B1)
    flat: Any = flatten_dict(params)
    return {path: owner for path, owner in owners.items() if not _is_light(flat[path], owner)}


def _is_light(kernel: Any, owner: Linear | Embed) -> bool:
    """Whether a kernel takes less memory than one of the model's type (`models.light`); such a kernel is not copied."""
    return isinstance(kernel, Quantized) or kernel.dtype.itemsize < jnp.dtype(owner.runtime.dtype).itemsize


def _in_large_pages(tree: PyTree) -> PyTree:
    """Copy the arrays into one block of memory with pages of 2 MB, which NumPy requests from Linux.

    XLA does not request them: reading 42 MB of panels from its pages of 4 KB takes 1.3 times as long.
    """
    leaves, structure = jax.tree.flatten(tree)
    alignment = 64  # XLA copies arrays with a smaller alignment
    ends = np.cumsum([-(-leaf.nbytes // alignment) * alignment for leaf in leaves])
    memory = np.empty(int(ends[-1]) + alignment, np.uint8)
    memory = memory[-memory.ctypes.data % alignment :]
    placed = []
    for leaf, end in zip(leaves, ends, strict=True):
        start = end - -(-leaf.nbytes // alignment) * alignment
        array = memory[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        array[...] = leaf
        placed.append(jax.device_put(array, leaf.sharding, may_alias=True))
    return jax.tree.unflatten(structure, placed)


def _platform(params: PyTree) -> str:
    """Platform of the parameters' devices (host arrays: JAX's default device); empty if the devices differ in platform."""
    leaf = jax.tree.leaves(params)[0]
    devices = leaf.devices() if isinstance(leaf, jax.Array) else {jax.devices()[0]}
    platforms = {device.platform for device in devices}
    return platforms.pop() if len(platforms) == 1 else ""
