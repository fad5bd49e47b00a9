"""The environment of `benchmarks/device.py`: device, driver, versions, and the speed of plain operations."""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pathlib
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
from device_report import Report, seconds_of

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    *("flax", "optax", "orbax-checkpoint", "numpy", "torch", "triton", "transformers", "pytest"),
)


def run(report: Report) -> None:
    """A line about the machine, and its speed of products and copies."""
    found = describe_environment()
    before = [line for line in report.lines("environment") if line["part"] == "environment"]
    if not before or any(before[-1].get(name) != value for name, value in found.items()):
        report.emit("environment", **found)
    size = 256 if report.tiny else 8192
    for dtype, precision in (("bfloat16", "default"), ("float32", "default"), ("float32", "highest")):
        report.run(f"matmul {dtype} {precision}", functools.partial(measure_product, size, dtype, precision), needs=2)
    report.run("copy", functools.partial(measure_copy, 2**20 if report.tiny else 2**30), needs=2)
    report.run("dispatch", measure_dispatch, needs=1)


def describe_environment() -> dict[str, Any]:
    """The first line of the results."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "devices": len(jax.devices()),
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_gb": round((device.memory_stats() or {}).get("bytes_limit", 0) / 1e9, 1),
        "nvidia_smi": nvidia_smi(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "cudnn": cudnn_version(),
        "plugins": [name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(name)],
        "source": digest_source(),
    }


def version_of(package: str) -> str | None:
    """Of an installed package; None of another."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def nvidia_smi() -> str | None:
    """Name, memory, driver, highest clock and power limit; None without the tool."""
    query = "name,memory.total,driver_version,clocks.max.sm,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cudnn_version() -> int | None:
    """The number of the cuDNN that JAX has loaded; JAX has no public function for it."""
    try:
        versions = importlib.import_module("jax._src.lib").cuda_versions
        return None if versions is None else versions.cudnn_get_version()
    except Exception:
        return None


def digest_source() -> str:
    """A hash of the sources of package and benchmarks, which identifies their results."""
    root, digest = pathlib.Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted([*(root / "transformer").rglob("*.py"), *(root / "benchmarks").glob("device*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def measure_product(size: int, dtype: str, precision: str) -> dict[str, Any]:
    """TFLOP/s of products of square matrices."""
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(functools.partial(jnp.dot, precision=precision))
    seconds, _ = seconds_of(lambda: product(matrix, matrix).block_until_ready, calls=10)
    return {"size": size, "tflops": round(2 * size**3 / seconds / 1e12, 2)}


def measure_copy(elements: int) -> dict[str, Any]:
    """TB/s of reading and writing float32 numbers."""
    array = jnp.ones(elements, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds, _ = seconds_of(lambda: copy(array).block_until_ready, calls=5)
    return {"bytes": array.nbytes, "tb_per_s": round(2 * array.nbytes / seconds / 1e12, 3)}


def measure_dispatch() -> dict[str, Any]:
    """Microseconds of a call with almost no computation."""
    array, add = jnp.ones(8), jax.jit(lambda x: x + 1)
    seconds, _ = seconds_of(lambda: add(array).block_until_ready, calls=200)
    return {"us": round(seconds * 1e6, 1)}
