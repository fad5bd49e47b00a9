"""A linear map between named axes."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.ops.panels import Panels, cut_panels, panel_product

DotGeneral = Callable[..., jax.Array]
"""A function with the signature of `jax.lax.dot_general`."""


_named = contextvars.ContextVar("named", default=False)


@contextlib.contextmanager
def named_axes() -> Iterator[None]:
    """Within, `init` gives each parameter with the logical names of its axes (`nn.LogicallyPartitioned`)."""
    before = _named.set(True)
    try:
        yield
    finally:
        _named.reset(before)


def normal_initializer(std: float, fan_in: int, scale: float = 1.0) -> nn.initializers.Initializer:
    """Normal with standard deviation `scale * std`, a `std` of 0 meaning 1 / sqrt(fan_in)."""
    return nn.initializers.normal(scale * (std or 1.0 / math.sqrt(fan_in)))


def with_axes(initializer: nn.initializers.Initializer, axes: tuple[str | None, ...]) -> Any:
    """The initializer of a parameter, which carries logical axis names within `named_axes`, and is a plain array elsewhere."""
    return nn.with_logical_partitioning(initializer, axes) if _named.get() else initializer


def stored(module: Any, name: str, initializer: Any, shape: tuple[int, ...]) -> Any:
    """A parameter of a module: made, given, or in the panels that `generation.prepare` put in its place."""
    if module.has_variable("params", name):
        given = module.get_variable("params", name)
        if isinstance(given, Panels):
            return given
    return module.param(name, initializer, shape, module.param_dtype)


def kernel_product(
    module: Any, inputs: Float[Array, "..."], kernel: Float[Array, "..."] | Panels, num_contracted: int, dtype: Any
) -> Float[Array, "..."]:
    """Contract the last axes of the inputs with the first of the kernel, by `module.dot_general` or with panels."""
    first = inputs.ndim - num_contracted
    if isinstance(kernel, Panels):
        rows_ND = inputs.reshape(-1, math.prod(inputs.shape[first:]))
        out_NF = panel_product(rows_ND, kernel.panels, math.prod(kernel.features), dtype)
        return out_NF.reshape(*inputs.shape[:first], *kernel.features)
    kernel = kernel.astype(module.dtype)
    dimensions = ((tuple(range(first, inputs.ndim)), tuple(range(num_contracted))), ((), ()))
    return module.dot_general(inputs, kernel, dimensions, preferred_element_type=jnp.dtype(dtype))


class Linear(nn.Module):
    """`y = x · kernel (+ bias)`, where the kernel keeps its axes apart: (embed, heads, head_dim) for a query.

    Leading axes are not folded here: folding a batch and a sequence that are sharded over different mesh axes would gather
    both. `ops.dense_cpu`, given as `dot_general`, folds them where it pays.

    Attributes:
        features: sizes of the output axes.
        axes: logical names of the kernel's axes, those of the input first; how many there are beyond `features` says
            how many axes of the input are contracted.
        use_bias: add a learned offset to the output.
        init_std: standard deviation of the initial kernel; 0 means 1 / sqrt(fan_in).
        init_scale: multiplies it.
        dtype: of the operands and the result.
        output_dtype: of the result, if not `dtype`.
        param_dtype: of the parameters.
        dot_general: replaces `jax.lax.dot_general`.

    Example:
        >>> layer = Linear(features=(2, 4), axes=("embed", "heads", "head_dim"))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))
        >>> y.shape
        (1, 3, 2, 4)
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False
    init_std: float = 0.0
    init_scale: float = 1.0
    dtype: Any = jnp.float32
    output_dtype: Any = None
    param_dtype: Any = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contract the last axes of `inputs` with the first of the kernel."""
        num_inputs = len(self.axes) - len(self.features)
        contracted = inputs.shape[-num_inputs:]
        init = normal_initializer(self.init_std, math.prod(contracted), self.init_scale)
        kernel = stored(self, "kernel", with_axes(init, self.axes), (*contracted, *self.features))
        dtype = jnp.dtype(self.output_dtype or self.dtype)
        out = kernel_product(self, inputs.astype(self.dtype), kernel, num_inputs, dtype)
        if self.use_bias:
            init = with_axes(nn.initializers.zeros, self.axes[num_inputs:])
            bias = self.param("bias", init, self.features, self.param_dtype).astype(dtype)
            out = out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)
        return out

    @nn.nowrap
    def cut(self, kernel: Float[Array, "..."], width: int) -> Panels:
        """A kernel of this layer in panels of so many columns, for `generation.prepare`."""
        matrix_DF = kernel.astype(self.dtype).reshape(-1, math.prod(self.features))
        return Panels(cut_panels(matrix_DF, width), self.features)
