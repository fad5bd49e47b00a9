"""Auto: for each platform the backend that suits the call."""

import dataclasses

import jax

from transformer.model_kinds import BACKENDS, AttentionBackend, AttentionCall
from transformer.ops.backends.fused import by_platform
from transformer.ops.backends.xla import XLABackend

# The first is what others run too.
_PLATFORMS = ("cpu", "tpu", "cuda")


@BACKENDS.register
@dataclasses.dataclass(frozen=True)
class AutoBackend(AttentionBackend):
    """The first backend that is preferred and refuses nothing, asked from the last of the family to the reference."""

    kind = "auto"
    takes = XLABackend.takes

    def on(self, platform: str, call: AttentionCall) -> AttentionBackend:
        """The choice, from what is known when tracing."""
        asked = (BACKENDS.find(name)() for name in reversed(BACKENDS.names))
        return next(backend for backend in asked if backend.preferred(call, platform) and not backend.refusal(call))

    def attend(self, call: AttentionCall) -> jax.Array:
        """One program with a branch for each platform that differs; others leave no trace in what is lowered."""
        chosen = {platform: self.on(platform, call) for platform in _PLATFORMS}
        default = chosen[_PLATFORMS[0]]
        others = {platform: backend for platform, backend in chosen.items() if backend != default}
        # A switch leaves its marks (residuals, time to trace): only where there is something to choose.
        return by_platform(call, default=default, **others) if others else default.compute(call)
