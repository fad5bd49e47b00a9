"""Kernels with a first derivative only: a second one raises an error with a remedy."""

from collections.abc import Callable
from typing import Any

import jax


@jax.custom_jvp
def _guarded(operands: Any) -> Any:
    return operands


@_guarded.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "Fused attention has first derivatives in reverse mode only; for second ones set implementation='xla' (in a model "
        "AttentionConfig.implementation)."
    )


def first_order(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(query, key, value, mask)` with its own gradient; differentiating that gradient raises an error."""

    @jax.custom_vjp
    def run(query: Any, key: Any, value: Any, mask: Any) -> Any:
        return kernel(query, key, value, mask)

    def forward(query: Any, key: Any, value: Any, mask: Any) -> Any:
        return jax.vjp(lambda *operands: kernel(*operands, mask), *_guarded((query, key, value)))

    def backward(pull_back: Any, gradient: Any) -> Any:
        return *pull_back(_guarded(gradient)), None

    run.defvjp(forward, backward)
    return run
