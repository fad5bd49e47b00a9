"""How the modules of a model compute: types, initial weights, `dot_general`, and sharding; passed as one object."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transformer.adapter_config import AdapterConfig
from transformer.model_config import ModelConfig
from transformer.ops.losses import Summarize, summarize
from transformer.ops.recompute import stored
from transformer.parallel.rules import Sharding

DotGeneral = Callable[..., jax.Array]
"""A function with the signature of `jax.lax.dot_general`."""

_named = contextvars.ContextVar("named", default=False)


@contextlib.contextmanager
def named_axes() -> Iterator[None]:
    """In this context, `init` returns each parameter with the logical names of its axes (`nn.LogicallyPartitioned`)."""
    before = _named.set(True)
    try:
        yield
    finally:
        _named.reset(before)


def with_axes(initializer: nn.initializers.Initializer, axes: tuple[str | None, ...]) -> nn.initializers.Initializer:
    """The initializer of a parameter: with logical axis names inside `named_axes`, a plain array elsewhere."""
    return nn.with_logical_partitioning(initializer, axes) if _named.get() else initializer


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Settings shared by all modules of a model. A model takes the types and the initialisation from its config.

    Example:
        >>> Runtime(dot_general=jax.lax.dot_general).of(ModelConfig(init_std=0.1)).init_std
        0.1
    """

    dtype: jax.typing.DTypeLike = jnp.float32
    """Type of activations and of the operands of matrix products."""
    param_dtype: jax.typing.DTypeLike = jnp.float32
    """Type of parameters."""
    init_std: float = 0.0
    """Standard deviation of initial kernels and tables; 0 means 1 / sqrt(fan_in)."""
    residual_init_scale: float = 1.0
    """Factor on that standard deviation for the projections back to the residual stream."""
    dot_general: DotGeneral = jax.lax.dot_general
    """The product of linear layers. The default has every derivative; a trainer uses `ops.dense_cpu` or `ops.wide_product`."""
    summarize: Summarize = summarize
    """How a loss reads logits. The default has every derivative; a trainer uses `ops.fused_loss.summarize`."""
    recompute: Callable[[Callable[..., Any]], Callable[..., Any]] = stored
    """Wraps activations and norms: `ops.recompute.stored`, or `recomputed` where reading memory is slower than arithmetic."""
    adapter: AdapterConfig = AdapterConfig()
    """Low-rank adapters of linear layers, selected by the path of their kernel."""
    sharding: Sharding = Sharding()
    """Mesh axes by logical axis. Without rules, the current mesh (`jax.set_mesh`) changes nothing."""

    def of(self, config: ModelConfig) -> "Runtime":
        """This runtime with the types and the initialisation of a model's config."""
        return dataclasses.replace(
            self,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            init_std=config.init_std,
            residual_init_scale=1 / math.sqrt(2 * config.num_layers),
        )

    @property
    def of_heads(self) -> "Runtime":
        """The runtime of parts that are fully trained beside adapters (`adapters.HEADS`): like adapters they are float32."""
        return dataclasses.replace(self, param_dtype=jnp.dtype(jnp.float32)) if self.adapter.rank else self

    def initializer(self, fan_in: int, axes: tuple[str | None, ...], scale: float = 1.0) -> nn.initializers.Initializer:
        """Normal with a standard deviation of `scale * init_std`, for a parameter whose axes have these logical names."""
        return with_axes(nn.initializers.normal(scale * (self.init_std or 1.0 / math.sqrt(fan_in))), axes)

    def parameter(
        self,
        module: nn.Module,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        fan_in: int = 0,
        fill: float | None = None,
    ) -> jax.Array:
        """A parameter of a module, as described in `model_kinds`."""
        init = self.initializer(fan_in, axes) if fill is None else with_axes(nn.initializers.constant(fill), axes)
        return module.param(name, init, shape, self.param_dtype)

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`Sharding.constrain`."""
        return self.sharding.constrain(x, *names)
