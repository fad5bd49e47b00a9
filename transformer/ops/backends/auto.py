"""Auto: a suitable backend for each call and platform."""

import dataclasses

import jax

from transformer.model_kinds import BACKENDS, AttentionBackend, AttentionCall
from transformer.ops.backends.fused import by_platform
from transformer.ops.backends.xla import XLABackend

# The first one is also the default of the other platforms.
_PLATFORMS = ("cpu", "tpu", "cuda")


@BACKENDS.register
@dataclasses.dataclass(frozen=True)
class AutoBackend(AttentionBackend):
    """The first backend that prefers the call and does not refuse it, from the last of the family back to the reference."""

    kind = "auto"
    takes = XLABackend.takes

    def on(self, platform: str, call: AttentionCall) -> AttentionBackend:
        """The choice, from static information (known while tracing)."""
        asked = (BACKENDS.find(name)() for name in reversed(BACKENDS.names))
        return next(backend for backend in asked if backend.preferred(call, platform) and not backend.refusal(call))

    def attend(self, call: AttentionCall) -> jax.Array:
        """One program with a branch for each platform whose backend differs; unused branches are not lowered."""
        chosen = {platform: self.on(platform, call) for platform in _PLATFORMS}
        default = chosen[_PLATFORMS[0]]
        others = {platform: backend for platform, backend in chosen.items() if backend != default}
        # A platform switch costs residuals and tracing time. It is therefore built only where platforms differ.
        return by_platform(call, default=default, **others) if others else default.compute(call)
