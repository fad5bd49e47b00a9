"""What the CPU's matrix products do to the program of a TPU: nothing; prints one JSON line.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 python benchmarks/tpu_program.py

Needs no TPU, only its compiler (`pip install -e ".[plan]"`). The training step of `benchmarks/train_step.py` is compiled for
four chips of a v5e, with and without `training.cpu_kernels`, and the copies, transposes and products of the two optimised
programs are counted.
"""

import argparse
import json
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from train_step import make_config

from transformer.parallel.mesh import make_mesh
from transformer.parts import StandIn, Steps
from transformer.types import Batch

OPERATIONS = ("copy", "transpose", "convolution", "dot", "fusion", "all-reduce", "all-gather")


def compile_step(devices: list[Any], *, cpu_kernels: bool, dtype: str) -> Any:
    """The step, compiled for absent devices."""
    config = make_config(dtype, cpu_kernels, "auto")
    mesh = make_mesh(devices=devices)
    steps = Steps(config, StandIn(config.model.vocab_size), mesh)
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(shape, np.float32), tokens, tokens)
    return steps.runner.lower(steps.state, batch).compile()


def count(compiled: Any) -> dict[str, int]:
    """Operations of the optimised program, and the memory it needs beside its arguments."""
    text = compiled.as_text()
    counts = {name: len(re.findall(rf" {name}\(", text)) for name in OPERATIONS}
    return {**counts, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


def main() -> None:
    """Compile both and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="TPU topology")
    parser.add_argument("--dtype", default="bfloat16", help="compute type")
    options = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    with_kernels, without = (
        count(compile_step(devices, cpu_kernels=choice, dtype=options.dtype)) for choice in (True, False)
    )
    print(
        json.dumps(
            {
                "benchmark": "tpu_program",
                "jax": jax.__version__,
                "topology": options.topology,
                "dtype": options.dtype,
                "cpu_kernels": with_kernels,
                "plain": without,
            }
        )
    )


if __name__ == "__main__":
    main()
