"""A linear map between named axes."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from transformer.layers.adapters import LORA_A, LORA_B
from transformer.layers.runtime import Runtime, with_axes
from transformer.ops.panels import Panels, cut_panels, panel_product
from transformer.ops.quantized import Quantized
from transformer.types import PyTree


def stored(module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]) -> PyTree:
    """A parameter of a module: initialised, given, or the form by which `generation.prepare` or `models.light` replaced it."""
    if module.has_variable("params", name):
        given = module.get_variable("params", name)
        if isinstance(given, Panels | Quantized):
            return given
    return module.param(name, initializer, shape, module.runtime.param_dtype)


def kernel_product(
    module: nn.Module,
    inputs: Float[Array, "..."],
    kernel: Float[Array, "..."] | Panels | Quantized,
    num_contracted: int,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """Contract the last axes of the inputs with the first of the kernel, by the runtime's `dot_general` or by panels."""
    first = inputs.ndim - num_contracted
    if isinstance(kernel, Panels):
        rows_ND = inputs.reshape(-1, math.prod(inputs.shape[first:]))
        out_NF = panel_product(rows_ND, kernel.panels, math.prod(kernel.features), dtype)
        return out_NF.reshape(*inputs.shape[:first], *kernel.features)
    if isinstance(kernel, Quantized):
        # A conversion that depends on the inputs: XLA would convert all kernels before a loop of decoding, and hold them whole.
        first_input = inputs.reshape(-1)[0]
        values = jnp.where(first_input == first_input, kernel.values, jnp.zeros_like(kernel.values))
        values = values.astype(module.runtime.dtype)  # exact, in bfloat16 and float16 too
        out = kernel_product(module, inputs, values, num_contracted, jnp.float32)
        scales = kernel.scales.reshape(kernel.scales.shape[num_contracted:])
        return (out * scales.reshape((1,) * first + scales.shape)).astype(dtype)
    kernel = kernel.astype(module.runtime.dtype)
    dimensions = ((tuple(range(first, inputs.ndim)), tuple(range(num_contracted))), ((), ()))
    return module.runtime.dot_general(inputs, kernel, dimensions, preferred_element_type=jnp.dtype(dtype))


class Linear(nn.Module):
    """`y = x · kernel (+ bias)`. The kernel keeps its axes separate: (embed, heads, head_dim) for a query.

    Leading axes are not folded here: folding a batch axis and a sequence axis that are sharded over different mesh axes would
    gather both. `ops.dense_cpu`, passed as `dot_general`, folds them where it is faster.

    Attributes:
        features: sizes of the output axes.
        axes: logical names of the kernel's axes, input axes first; their number beyond `features` is the number of contracted
            input axes.
        use_bias: add a learned offset to the output.
        init_scale: multiplies the standard deviation of the initial kernel.
        output_dtype: type of the result, if not the runtime's.
        runtime: types, initialisation and `dot_general`.

    Example:
        >>> import jax
        >>> layer = Linear(features=(2, 4), axes=("embed", "heads", "head_dim"))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))
        >>> y.shape
        (1, 3, 2, 4)
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False
    init_scale: float = 1.0
    output_dtype: DTypeLike | None = None
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contract the last axes of `inputs` with the first of the kernel."""
        num_inputs = len(self.axes) - len(self.features)
        contracted = inputs.shape[-num_inputs:]
        init = self.runtime.initializer(math.prod(contracted), self.axes, self.init_scale)
        kernel = stored(self, "kernel", init, (*contracted, *self.features))
        dtype = jnp.dtype(self.output_dtype or self.runtime.dtype)
        inputs = inputs.astype(self.runtime.dtype)
        out = kernel_product(self, inputs, kernel, num_inputs, dtype)
        if self.use_bias:
            init = with_axes(nn.initializers.zeros, self.axes[num_inputs:])
            bias = self.param("bias", init, self.features, self.runtime.param_dtype).astype(dtype)
            out = out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)
        if self.runtime.adapter.adapts("/".join((*self.path, "kernel"))):
            out = out + self._adapted(inputs, num_inputs, dtype)
        return out

    def _adapted(self, inputs: Float[Array, "..."], num_inputs: int, dtype: Any) -> Float[Array, "..."]:
        """The adapter's addition to the output; its parameters are float32 for any kernel type, and B is initially zero."""
        adapter, contracted = self.runtime.adapter, inputs.shape[-num_inputs:]
        init = nn.initializers.normal(1.0 / math.sqrt(math.prod(contracted)))
        first = with_axes(init, (*self.axes[:num_inputs], "rank"))
        second = with_axes(nn.initializers.zeros, ("rank", *self.axes[num_inputs:]))
        lora_a = self.param(LORA_A, first, (*contracted, adapter.rank), jnp.float32)
        lora_b = self.param(LORA_B, second, (adapter.rank, *self.features), jnp.float32)
        if adapter.dropout > 0 and self.has_rng("dropout"):  # losses pass this key in training only
            inputs = nn.Dropout(adapter.dropout, deterministic=False)(inputs)
        low = kernel_product(self, inputs, lora_a, num_inputs, self.runtime.dtype)
        return kernel_product(self, low, lora_b, 1, dtype) * adapter.scale

    @nn.nowrap
    def cut(self, kernel: Float[Array, "..."], width: int) -> Panels:
        """A kernel of this layer in panels of so many columns, for `generation.prepare`."""
        matrix_DF = kernel.astype(self.runtime.dtype).reshape(-1, math.prod(self.features))
        return Panels(cut_panels(matrix_DF, width), self.features)
