"""The base of kernels for one platform, and programs that differ by platform."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax

from transformer.model_kinds import AttentionBackend, AttentionCall
from transformer.ops.first_order import first_order

# Number of queries, and of keys, from which on `auto` takes the platform's kernel. A block of 512 by 512 occupies a TPU's matrix
# unit for about 0.35 µs, the overhead of one step of a kernel's grid. Below, blocks are smaller and XLA's fusions as fast.
_FUSED_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class FusedBackend(AttentionBackend):
    """One kernel for each pass, with first derivatives only."""

    platform: ClassVar[str]
    """Its platform."""

    def kernel(self, call: AttentionCall) -> jax.Array:
        """`compute`, with the kernel's own gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define kernel().")

    def compute(self, call: AttentionCall) -> jax.Array:
        """The kernel; a second derivative raises an error that names the remedy."""
        return first_order(lambda *given: self.kernel(AttentionCall._make((*given, *call[4:]))))(*call[:4])

    def refusal(self, call: AttentionCall) -> str:
        """Also arrays with varying mesh axes tracked by JAX: a kernel does not declare how its output varies."""
        query = call.query_BTHK
        if isinstance(query, jax.Array) and jax.typeof(query).manual_axis_type.varying:
            return "arrays that jax.shard_map follows over the mesh (give it check_vma=False)"
        return super().refusal(call)

    def preferred(self, call: AttentionCall, platform: str) -> bool:
        """True on its platform, for sequences that are long enough."""
        return platform == self.platform and min(call.query_BTHK.shape[1], call.key_BSGK.shape[1]) >= _FUSED_LENGTH


def by_platform(call: AttentionCall, **backends: AttentionBackend) -> jax.Array:
    """The result of one backend per platform, chosen when the program is lowered; `default` serves unnamed platforms."""

    def branch(backend: AttentionBackend) -> Callable[..., jax.Array]:
        return lambda *operands: backend.compute(AttentionCall._make((*operands, *call[5:])))

    return jax.lax.platform_dependent(*call[:5], **{name: branch(backend) for name, backend in backends.items()})
