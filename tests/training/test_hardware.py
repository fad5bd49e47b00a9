"""Peaks, operations counted, and memory kept."""

import jax
import pytest

from transformer.training import hardware
from transformer.training.hardware import measured_peak_flops, model_flops, peak_flops, published_peak_flops


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Abacus", 0.0),
    ],
)
def test_published_peaks(kind, expected):
    assert published_peak_flops(kind) == expected


def test_cpu_peak_is_measured_once_for_all_devices():
    peak = peak_flops("float32", 1)
    assert 1e8 < peak < 1e14
    assert peak == peak_flops("float32", 8) == measured_peak_flops("float32")


def test_accelerators_count_by_the_device(monkeypatch):
    class Device:
        platform, device_kind = "gpu", "NVIDIA A100-SXM4-80GB"

    monkeypatch.setattr(hardware.jax, "devices", lambda: [Device()] * 4)
    assert peak_flops("bfloat16", 2) == 2 * 312e12


def test_flops_of_a_token_are_six_n_and_attention():
    """By XLA's own count of a forward pass: twice the weights, and 4 L H K T for scores and values."""
    flops = model_flops(1000, num_layers=2, num_heads=3, head_dim=5, rows=2, length=7)
    assert flops == 14 * (6 * 1000 + 12 * 2 * 3 * 5 * 7)

    def forward(w, q, k, v):
        return jax.numpy.dot(q.reshape(7, 15), w), jax.numpy.einsum(
            "hts,shk->thk", jax.numpy.einsum("thk,shk->hts", q, k), v
        )

    shape = jax.ShapeDtypeStruct((7, 3, 5), "float32")
    cost = (
        jax.jit(forward).lower(jax.ShapeDtypeStruct((15, 15), "float32"), shape, shape, shape).compile().cost_analysis()
    )
    ours = model_flops(225, num_layers=1, num_heads=3, head_dim=5, rows=1, length=7) / 3
    assert cost["flops"] == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_memory_is_kept_before_the_backend_starts_and_on_cpu_only(monkeypatch, backend):
    """A backend's threads take their arenas when it starts: a call after that comes too late."""
    calls = []

    class Library:
        def __init__(self, name):
            self.mallopt = lambda parameter, value: calls.append((parameter, value))

    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware.ctypes, "CDLL", Library)
    monkeypatch.setattr(hardware.jax, "default_backend", lambda: calls.append("backend") or backend)
    hardware.keep_freed_memory()
    start = calls.index("backend")
    assert dict(calls[:start]) == {-4: 0, -1: -1, -8: 1}
    assert dict(calls[start + 1 :]) == ({} if backend == "cpu" else {-4: 65536, -1: 131072, -8: 0})
