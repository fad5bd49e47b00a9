"""What kernels made for one platform have in common, and programs that differ by platform."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax

from transformer.model_kinds import AttentionBackend, AttentionCall
from transformer.ops.first_order import first_order

# Queries, and keys, from which on `auto` takes the kernel made for the platform. A block of 512 by 512 keeps a TPU's matrix unit
# busy for about the 0.35 µs that a step of a kernel's grid costs beside; below, blocks are smaller and XLA's fusions as good.
_FUSED_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class FusedBackend(AttentionBackend):
    """One kernel for each pass, with first derivatives only."""

    platform: ClassVar[str]
    """That it is made for."""

    def kernel(self, call: AttentionCall) -> jax.Array:
        """`compute`, with the derivative that it has."""
        raise NotImplementedError(f"{type(self).__name__} must define kernel().")

    def compute(self, call: AttentionCall) -> jax.Array:
        """The kernel; a second derivative is refused in words."""
        return first_order(lambda *given: self.kernel(AttentionCall._make((*given, *call[4:]))))(*call[:4])

    def refusal(self, call: AttentionCall) -> str:
        """Also arrays whose variation over a mesh JAX follows: a kernel does not say how its output varies."""
        query = call.query_BTHK
        if isinstance(query, jax.Array) and jax.typeof(query).manual_axis_type.varying:
            return "arrays that jax.shard_map follows over the mesh (give it check_vma=False)"
        return super().refusal(call)

    def preferred(self, call: AttentionCall, platform: str) -> bool:
        """On its platform, for sequences that are long enough."""
        return platform == self.platform and min(call.query_BTHK.shape[1], call.key_BSGK.shape[1]) >= _FUSED_LENGTH


def by_platform(call: AttentionCall, **backends: AttentionBackend) -> jax.Array:
    """What the backend of the platform computes that a program is lowered for (`default` for those without a name)."""

    def branch(backend: AttentionBackend) -> Callable[..., jax.Array]:
        return lambda *operands: backend.compute(AttentionCall._make((*operands, *call[5:])))

    return jax.lax.platform_dependent(*call[:5], **{name: branch(backend) for name, backend in backends.items()})
