"""Accelerators with their makers' data, and the topology names that their compilers accept."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

from jax.experimental import topologies
from jax.experimental.topologies import TopologyDescription

from transformer.training.hardware import published_peak_flops
from transformer.types import UserError
from transformer.validation import require

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, in JAX's sense."""

    package: ClassVar[str]
    """The package that contains its compiler."""

    kind: str
    """Its name in JAX."""
    memory_bytes: float
    """High-bandwidth memory that the compiler lets a program use, in bytes."""
    memory_bandwidth: float
    """Memory bandwidth, bytes per second."""
    link_bandwidth: float
    """Bandwidth of one link to a neighbour, in one direction, bytes per second."""
    torus_dims: int
    """Dimensions of the torus, with two links each; 0 for a switch that connects every device by one link."""
    network_bandwidth: float
    """Bandwidth to devices of other slices, bytes per second."""
    per_chip: int = 1
    """Devices per chip (hours are counted by chip)."""

    @property
    def peak_flops(self) -> float:
        """bfloat16 operations per second."""
        return published_peak_flops(self.kind)

    def describe(self, name: str, shape: str, num_slices: int) -> TopologyDescription:
        """JAX's description of a topology of these devices.

        Args:
            name: of the topology, with its shape.
            shape: the part of the name after the colon.
            num_slices: number of slices of this shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must define describe().")


_HOST_CHIPS = 4
"""Chips of one TPU host, as the compiler assumes: two by two."""


@dataclasses.dataclass(frozen=True)
class TPU(Chip):
    """TPU devices, in slices that form a torus."""

    package = 'libtpu (pip install -e ".[plan]")'

    options: tuple[tuple[str, str], ...] = ()
    """Name in the compiler's topologies."""

    def describe(self, name: str, shape: str, num_slices: int) -> TopologyDescription:
        """One slice or several; a slice smaller than a host counts as a smaller host."""
        slices: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
        sizes = [int(size) for size in shape.split("x") if size.isdigit()]
        if 0 < math.prod(sizes) < _HOST_CHIPS:
            slices["chips_per_host_bounds"] = (*sizes, *(1,) * (3 - len(sizes)))
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **slices, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class GPU(Chip):
    """GPUs, in nodes with a switch."""

    package = "JAX's CUDA plugin (pip install 'jax[cuda12]')"

    target: str = ""
    """Properties of the device that XLA's compiler cannot query when it is absent."""

    def describe(self, name: str, shape: str, num_slices: int) -> TopologyDescription:
        """The given number of devices."""
        del num_slices
        name, _, _ = name.partition(":")
        require(shape.isdigit(), f"The shape of {name} is a number of devices, got {shape!r}; for example {name}:8.")
        return topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=f"1x1x{shape}", target_config=self.target
        )


_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# From the makers' data sheets (two devices share a TPU7x's links) and, for links and networks, from Austin et al. 2025, "How to
# Scale Your Model", chapter 2.
CHIPS = {
    # The two cores of a v4 are one device.
    "v4": TPU("TPU v4", 30.75 * GIB, 1.2e12, 4.5e10, 3, 6.25e9, options=(("chip_config_name", "megacore"),)),
    "v5e": TPU("TPU v5 lite", 15.75 * GIB, 8.1e11, 4.5e10, 2, 3.1e9),
    "v5p": TPU("TPU v5", 95.73 * GIB, 2.8e12, 9e10, 3, 6.25e9),
    "v6e": TPU("TPU v6 lite", 31.24 * GIB, 1.6e12, 9e10, 2, 1.25e10),
    "tpu7x": TPU("TPU7x", 94.74 * GIB, 3.7e12, 5e10, 3, 1.25e10, per_chip=2),
    "h100": GPU("NVIDIA H100", 80e9, 3.35e12, 4.5e11, 0, 5e10, target=_H100),
}
NODE_DEVICES = 8
"""H100s behind one switch."""
ALIASES = {
    # Accelerator types of Google Cloud; the number counts chips (v5e, v6e) or cores, two per chip (v5p).
    "v5e-256": "v5e:16x16",
    "v6e-256": "v6e:16x16",
    "v5p-512": "v5p:4x8x8",
    "v5p-1024": "v5p:8x8x8",
}


class Topology(NamedTuple):
    """Absent devices for which a program can be compiled."""

    name: str
    chip: Chip
    devices: list[Any]

    @property
    def chips(self) -> float:
        """The number of chips."""
        return len(self.devices) / self.chip.per_chip


def find_topology(name: str, num_slices: int = 1) -> Topology:
    """The devices of a topology: `v5e:4x4`, `v5p:8x8x8`, one chip (`v6e:1x1`), an alias (`v6e-256`), or `h100:8`.

    TPUs need libtpu (`pip install -e ".[plan]"`), H100s JAX's CUDA plugin.

    Args:
        name: of one slice.
        num_slices: number of slices of TPUs, connected by a data-centre network.

    Raises:
        UserError: the name is unknown, or the compiler for it is not installed.
    """
    full = ALIASES.get(name, name)
    kind, _, shape = full.partition(":")
    require(
        kind in CHIPS and shape != "",
        f"A topology must be KIND:SHAPE with a kind of {', '.join(CHIPS)}, such as v5e:4x4 or h100:8, or one of "
        f"{', '.join(ALIASES)}; got {name!r}.",
    )
    try:
        description = CHIPS[kind].describe(full, shape, num_slices)
    except UserError:
        raise
    except Exception as error:
        needed = CHIPS[kind].package
        raise UserError(f"Topology {name!r} needs the compiler in {needed}, or has no such shape: {error}.") from error
    return Topology(full, CHIPS[kind], list(description.devices))
