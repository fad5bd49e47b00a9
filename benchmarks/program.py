"""The training step of a config, compiled for absent hardware: launches, traffic, memory, kernels, in one JSON line.

    JAX_PLATFORMS=cpu python benchmarks/program.py configs/gpt2_124m.py --topology h100:1 --rows 16
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 python benchmarks/program.py configs/gpt2_124m.py \
        --topology v5e:2x2 --rows 64

Needs the compiler of the hardware, `pip install -e ".[cuda12]"` or `".[plan]"`. Without a GPU, XLA uses its own kernels
(Triton's) for all products. With a GPU it measures kernels, and most are cuBLAS's;
`XLA_FLAGS=--xla_gpu_enable_triton_gemm=false` gives that program.
"""

import argparse
import dataclasses
import json
import os
import time

import jax

from transformer.cli.arguments import load_config
from transformer.parallel.mesh import make_mesh
from transformer.parts import StandIn, Steps, resolve
from transformer.planning.chips import find_topology
from transformer.planning.program import read_program


def main() -> None:
    """Compile the step and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/, or FILE:VARIANT")
    parser.add_argument("--topology", default="h100:1", help="name of the hardware, as for `transformer plan`")
    parser.add_argument(
        "--rows", type=int, default=0, help="rows of a batch, without micro-batches; 0 means the config's number"
    )
    parser.add_argument("--whole", action="store_true", help="rows of one document (data.pack=False)")
    parser.add_argument("--text", default="", help="a file for the compiled program")
    options = parser.parse_args()
    config = load_config(options.config)
    if options.rows:
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, batch_size=options.rows),
            optimizer=dataclasses.replace(config.optimizer, accumulate_steps=1),
        )
    if options.whole:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, pack=False))
    vocabulary = StandIn(config.model.vocab_size)
    topology = find_topology(options.topology)
    steps = Steps(resolve(config, vocabulary), vocabulary, make_mesh(config.parallel.sizes, topology.devices))
    start = time.perf_counter()
    compiled = steps.runner.lower(steps.state, config.objective.batch_shapes(config)).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if options.text:
        with open(options.text, "w") as file:
            file.write(text)
    program = read_program(text)
    line = {
        "benchmark": "program",
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "config": os.path.basename(options.config),
        "topology": options.topology,
        "rows": config.data.batch_size,
        "packed": config.data.pack,
        "launches": round(program.launches),
        "traffic_gb": round(program.traffic_bytes / 1e9, 2),
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "argument_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "custom_calls": {name: round(count) for name, count in program.kernels.items()},
        "compile_seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
