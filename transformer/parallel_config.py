"""How a step is distributed over devices and processes, as a frozen dataclass, validated on construction."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from transformer.validation import Settings, require, require_at_least

SHARES_STATE = {"mesh": True, "pmap": False}
"""Whether devices may share the state of a run, by strategy; `parallel.strategies` has the classes that run them."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig(Settings):
    """How the step is distributed over devices."""

    strategy: Literal["mesh", "pmap"] = "mesh"
    """jit over a mesh (the default), or pmap (data parallelism only)."""
    data: int = -1
    """Groups of devices; each reads its part of the batch and holds one copy of the state. -1 means all remaining devices."""
    fsdp: int = 1
    """Devices that share the state, each with its own rows of the batch (fully sharded data parallelism)."""
    tensor: int = 1
    """Devices that share heads, hidden units and the vocabulary, for the same rows."""
    context: int = 1
    """Devices that share the positions of each row; next_token only."""
    expert: int = 1
    """Devices that share the experts, each with its own rows of the batch."""
    dcn: int = 1
    """Slices (groups of devices with a fast network inside) that share the batch over the data-centre network."""
    coordinator: str = ""
    """HOST:PORT of process 0, which listens there without authentication, or auto; empty starts several processes only if the
    environment names them (Cloud TPU, SLURM, Open MPI, JAX_COORDINATOR_ADDRESS)."""
    num_processes: int = 0
    """With HOST:PORT: number of processes of the run; 0 takes it from the environment."""
    process_id: int = -1
    """With HOST:PORT: this process's number, from 0; -1 takes it from the environment."""
    start_timeout: int = 300
    """Seconds that processes wait for each other at the start."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "start_timeout")
        require(
            self.coordinator not in ("", "auto") or (self.num_processes, self.process_id) == (0, -1),
            "parallel.num_processes and process_id need parallel.coordinator=HOST:PORT, got "
            f"{self.num_processes} and {self.process_id} with {self.coordinator!r}.",
        )
        require(
            self.coordinator in ("", "auto")
            or re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+):\d+", self.coordinator) is not None,
            f"parallel.coordinator must be HOST:PORT or auto (an IPv6 address in brackets), got {self.coordinator!r}.",
        )
        require(
            self.num_processes == 0 or self.process_id < self.num_processes,
            f"parallel.process_id must be below num_processes={self.num_processes}, got {self.process_id}.",
        )
        sizes = self.sizes
        require(
            all(size >= 1 or size == -1 for size in sizes.values()),
            f"The axes of ParallelConfig must be at least 1, or -1 for the remaining devices, got {sizes}.",
        )
        spread = [name for name, size in sizes.items() if name != "data" and size != 1]
        require(
            self.shares_state or not spread,
            f"parallel.strategy=pmap has data parallelism only, got {spread}; set strategy=mesh, or leave them at 1.",
        )

    def unused(self) -> Mapping[str, str]:
        """Settings of several processes, if there is one."""
        alone = (
            {} if self.coordinator else {"start_timeout": "several processes (parallel.coordinator, which may be auto)"}
        )
        if self.coordinator in ("", "auto"):
            alone |= dict.fromkeys(("num_processes", "process_id"), "parallel.coordinator=HOST:PORT")
        return alone

    @property
    def shares_state(self) -> bool:
        """Whether devices may share the state of a run; otherwise each has a copy."""
        return SHARES_STATE[self.strategy]

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis of the mesh. `data=0`, found in older configs, means -1."""
        names = ("dcn", "fsdp", "expert", "context", "tensor")
        return {"data": self.data or -1, **{name: getattr(self, name) for name in names}}
