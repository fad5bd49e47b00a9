"""Peak speed of the hardware in matrix products, and memory and programs kept between steps and runs."""

import ctypes
import functools
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

from transformer.storage import expand

PEAK_FLOPS = {
    # Dense bfloat16, per device as JAX counts them, from the manufacturers' data sheets.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,  # half a chip
    "V100": 125e12,  # float16: it has no bfloat16
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(dtype: str, num_devices: int) -> float:
    """Matrix-product operations per second of `num_devices` devices like this process's; 0 if unknown.

    Args:
        dtype: type of the operands; on a CPU, whose speed is measured, float32 and bfloat16 differ.
        num_devices: devices of all processes.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # The devices of a host share its processor: more of them add no speed.
        return measured_peak_flops(dtype) * jax.process_count()
    return published_peak_flops(device.device_kind) * num_devices


def published_peak_flops(device_kind: str) -> float:
    """Peak of one device from its name in JAX (`NVIDIA H100 80GB HBM3`); 0 if it is not in the table."""
    matches = [name for name in PEAK_FLOPS if name in device_kind]
    return PEAK_FLOPS[max(matches, key=len)] if matches else 0.0


@functools.cache
def measured_peak_flops(dtype: str) -> float:
    """The best of a few plain matrix products, about 0.2 seconds in all; cached for the process."""
    best = 0.0
    for rows, inner, columns in ((1024, 1024, 1024), (2048, 512, 2048), (4096, 384, 1536)):
        left, right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32)).lower(left, right).compile()
        product(left, right).block_until_ready()
        for _ in range(4):
            start = time.perf_counter()
            product(left, right).block_until_ready()
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def keep_freed_memory() -> None:
    """Let glibc keep memory that XLA frees on a CPU: each step allocates its temporaries again, and fresh pages cause faults.

    Call it before JAX starts its backend, whose threads otherwise have their own arenas already: a step of 10M parameters then
    takes a fifth longer. Nothing changes with other backends than a CPU, or on systems other than Linux.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        return
    # Parameters of malloc.h: no mmap for large blocks, never trim, one arena; and the defaults of glibc.
    keep, default = ((-4, 0), (-1, -1), (-8, 1)), ((-4, 65536), (-1, 128 * 1024), (-8, 0))
    for parameter, value in keep:
        mallopt(parameter, value)
    if jax.default_backend() != "cpu":
        for parameter, value in default:
            mallopt(parameter, value)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX's own settings say where, or not to."""
    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = pathlib.Path(expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "transformer" / "compiled"))
