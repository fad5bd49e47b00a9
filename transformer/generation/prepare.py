"""A model and its parameters in the form that decodes fastest on the platform they are on."""

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
    """On a CPU or GPU a scanned model as a loop: a scan copies a layer's parameters and cache in every step."""
    if not (model.config.scan_layers and _platform(params) in ("cpu", "gpu")):
        return model, params
    config = dataclasses.replace(model.config, scan_layers=False)
    return model.clone(config=config), jax.jit(loop_params)(params)


def prepare(model: Decoder, params: PyTree, batch_size: int) -> PyTree:
    """Parameters with which `model.apply` decodes `batch_size` rows faster, to the same logits.

    On a CPU `Panels` stand for kernels. On a GPU kernels have the type that they are multiplied in: a step reads each once, and
    would cast it each time. Another tree, to be made anew when the parameters change; elsewhere, and for many rows on a CPU,
    it is `params` itself.
    """
    platform, made = _platform(params), {}
    if platform == "cpu" and panel_width(batch_size) > 0:
        made = _cut(model, params, batch_size)
        made = _in_large_pages(made) if made else {}
    if platform == "gpu" and model.config.dtype != model.config.param_dtype:
        made = _cast(model, params)
    return unflatten_dict({**flatten_dict(params), **made}) if made else params


class DecodingModel:
    """A model and its parameters on the device, as they decode fastest; prepared parameters of the latest call are kept."""

    def __init__(self, model: Decoder, params: PyTree) -> None:
        self.model, params = loop_model(model, params)
        self.params = jax.tree.map(jnp.asarray, params)
        self._prepared: dict[int, PyTree] = {}

    def prepared(self, num_rows: int) -> PyTree:
        """The parameters that decode this number of rows fastest."""
        if num_rows not in self._prepared:
            self._prepared = {num_rows: prepare(self.model, self.params, num_rows)}
        return self._prepared[num_rows]


@functools.partial(jax.jit, static_argnames=("model", "batch_size"))
def _cut(model: Decoder, params: PyTree, batch_size: int) -> dict[tuple[str, ...], Panels]:
    """The multiplied parameters by their paths, each cut by the layer whose it is."""
    flat: Any = flatten_dict(params)
    owners = _multiplied(model, params, batch_size)
    return {path: owner.cut(flat[path], panel_width(batch_size)) for path, owner in owners.items()}


@functools.partial(jax.jit, static_argnames="model")
def _cast(model: Decoder, params: PyTree) -> dict[tuple[str, ...], Any]:
    """The multiplied parameters by their paths, in the model's type."""
    flat: Any = flatten_dict(params)
    return {path: flat[path].astype(owner.runtime.dtype) for path, owner in _multiplied(model, params, 1).items()}


def _multiplied(model: Decoder, params: PyTree, batch_size: int) -> dict[tuple[str, ...], Linear | Embed]:
    """The layer of each parameter that a step of decoding multiplies with, by the parameter's path."""
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
    """Whether a kernel was made to take less memory than one of the model's type (`models.light`): no copy is made of it."""
    return isinstance(kernel, Quantized) or kernel.dtype.itemsize < jnp.dtype(owner.runtime.dtype).itemsize


def _in_large_pages(tree: PyTree) -> PyTree:
    """The same arrays in one piece of memory, for which NumPy asks Linux for pages of 2 MB.

    XLA asks for none: reading 42 MB of panels from its pages of 4 KB takes 1.3 times as long.
    """
    leaves, structure = jax.tree.flatten(tree)
    alignment = 64  # of what XLA takes over without copying it
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
    """Of the devices that hold parameters (those of the host: where JAX would put them); empty if they differ."""
    leaf = jax.tree.leaves(params)[0]
    devices = leaf.devices() if isinstance(leaf, jax.Array) else {jax.devices()[0]}
    platforms = {device.platform for device in devices}
    return platforms.pop() if len(platforms) == 1 else ""
