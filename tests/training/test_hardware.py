"""Peaks, and memory kept."""

import pytest

from transformer.training import hardware
from transformer.training.hardware import measured_peak_flops, peak_flops, published_peak_flops


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
