"""Compares the speed of this checkout with a stored commit; exits with status 1 if a time is 10 % longer.

    python benchmarks/gate.py [--base COMMIT_OR_DIRECTORY] [--only import help] [--rounds 7] [--limit 1.1]

The base is the commit in `benchmarks/gate_base.txt`, unless one is given; git writes its files into a temporary folder. Each
round times both versions, in alternating order: `import transformer`, `transformer --help`, the reading of a config, a training
step on a CPU, and greedy decoding of one row and of eight. A time counts as longer if both the minimum over the rounds and the
median of the ratios are. It is then measured again, in up to three times as many rounds, so that one busy moment does not fail
the gate. Prints one JSON line.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = ROOT / "benchmarks" / "gate_base.txt"
STARTS = {
    "import": ["-c", "import transformer"],
    "help": ["-m", "transformer", "--help"],
    "config": [
        "-c",
        "from transformer.cli.arguments import parse_config; "
        "parse_config(['configs/shakespeare_char_cpu.py', '--optimizer.learning-rate', '0.001'], command='gate')",
    ],
}
COMPUTED = ("step", "decode_1", "decode_8")
# Runs in a process of each checkout: it compiles all, then times one of them for each line that it reads.
WORKER = """
import sys, time
import jax, numpy as np
from transformer.config import Config, DataConfig
from transformer.generation.generate import Generator
from transformer.generation.sampling import SamplingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.parallel_config import ParallelConfig
from transformer.parts import StandIn, Steps
from transformer.training.hardware import keep_freed_memory
from transformer.types import Batch

keep_freed_memory()
model = ModelConfig(
    vocab_size=65, max_length=128, num_layers=4, embed_dim=256, pattern=(BlockConfig(AttentionConfig(num_heads=4)),)
)
shape = (8, 128)
config = Config(model=model, data=DataConfig(sequence_length=128, batch_size=8), parallel=ParallelConfig(data=1))
made = Steps(config, StandIn(65))
state = made.init_state()
tokens = np.random.default_rng(0).integers(0, 65, (2, *shape), dtype=np.int32)
ones = np.ones(shape, np.int32)
positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
batch = made.runner.place_batch(Batch(tokens[0], tokens[1], ones.astype(np.float32), ones, positions))
generator = Generator(made.parts.model, jax.tree.map(np.asarray, state.params))

def step():
    global state
    state, found = made.runner.step(state, batch)
    jax.block_until_ready((state, found))

def decode(rows):
    generator.generate(tokens[0][:rows, :16], max_new_tokens=64, sampling=SamplingConfig(temperature=0))

work = {"step": step, "decode_1": lambda: decode(1), "decode_8": lambda: decode(8)}
print("ready", flush=True)
for line in sys.stdin:
    run, times = work[line.strip()], []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    print(min(times[1:]), flush=True)  # the first may compile, or prepare parameters
"""

Pair = tuple[float, float]
"""Seconds of the base and of this checkout in one round."""


def compare(pairs: Sequence[Pair]) -> dict[str, float]:
    """Ratios of this checkout to the base: of the minima, the median of the rounds', and their quartiles.

    >>> compare([(1.0, 1.2), (2.0, 2.2), (1.0, 1.1)])["ratio"]
    1.1
    """
    ratios = sorted(ours / base for base, ours in pairs)
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    base, ours = (min(times) for times in zip(*pairs, strict=True))
    named = {"ratio": ours / base, "median": median, "low": low, "high": high}
    return {name: round(value, 3) for name, value in named.items()} | {"rounds": len(pairs)}


def is_worse(pairs: Sequence[Pair], limit: float) -> bool:
    """Whether this checkout is slower than the limit in both the minimum and the median, which noise seldom changes together."""
    found = compare(pairs)
    return found["ratio"] > limit and found["median"] > limit


def measured(run: Callable[[str], float], rounds: int, limit: float) -> list[Pair]:
    """Pairs of times, `run("base")` and `run("ours")` in alternating order; up to three times the rounds while it looks worse."""
    pairs: list[Pair] = []
    for repeat in range(3):
        for index in range(rounds):
            order = ("base", "ours") if index % 2 == 0 else ("ours", "base")
            seconds = {name: run(name) for name in order}
            pairs.append((seconds["base"], seconds["ours"]))
        if repeat == 2 or not is_worse(pairs, limit):
            break
    return pairs


@contextlib.contextmanager
def checkout(base: str) -> Iterator[pathlib.Path]:
    """The files of a commit in a temporary folder; or a directory as it is."""
    if pathlib.Path(base).is_dir():
        yield pathlib.Path(base).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", ROOT, "archive", base], capture_output=True, check=False)
        if archive.returncode != 0:
            sys.exit(
                f"--base must be a commit of this repository or a directory, got {base!r}: "
                f"{archive.stderr.decode().strip()}; fetch it, or give another."
            )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield pathlib.Path(folder)


def environment(tree: pathlib.Path) -> dict[str, str]:
    """Of a process that takes the package from a checkout, and computes on the CPU."""
    return {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}


def start_up(tree: pathlib.Path, name: str) -> float:
    """Seconds of a process that does one thing and ends."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *STARTS[name]], cwd=tree, env=environment(tree), capture_output=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{name} must end well in {tree}, got status {done.returncode}:\n{done.stderr.decode()[-2000:]}")
    return seconds


class Worker:
    """A process of a checkout with the compiled programs."""

    def __init__(self, tree: pathlib.Path) -> None:
        self.tree = tree
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=tree,
            env=environment(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def seconds(self, name: str) -> float:
        """The fastest of a few repeats."""
        pipe: Any = self.process.stdin
        pipe.write(f"{name}\n")
        pipe.flush()
        return float(self._read())

    def _read(self) -> str:
        pipe: Any = self.process.stdout
        line = pipe.readline()
        if line == "":
            sys.exit(f"The process that computes in {self.tree} ended with status {self.process.wait()}.")
        return line

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def measure(trees: dict[str, pathlib.Path], names: Sequence[str], rounds: int, limit: float) -> dict[str, list[Pair]]:
    """All pairs of times by what was timed."""
    found = {}
    for name in [name for name in names if name in STARTS]:
        for tree in trees.values():
            start_up(tree, name)  # writes bytecode
        found[name] = measured(lambda tree, name=name: start_up(trees[tree], name), rounds, limit)
    if computed := [name for name in names if name in COMPUTED]:
        workers = {name: Worker(tree) for name, tree in trees.items()}
        for name in computed:
            for worker in workers.values():
                worker.seconds(name)  # compiles
            found[name] = measured(lambda tree, name=name: workers[tree].seconds(name), rounds, limit)
        for worker in workers.values():
            worker.close()
    return found


def main() -> None:
    """Compare, print the line, and fail where this checkout is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="", help="commit or directory to compare with")
    parser.add_argument("--ours", type=pathlib.Path, default=ROOT, help="the checkout to compare")
    parser.add_argument("--only", nargs="+", choices=[*STARTS, *COMPUTED], default=[*STARTS, *COMPUTED])
    parser.add_argument("--rounds", type=int, default=7, help="of each, in turn")
    parser.add_argument("--limit", type=float, default=1.1, help="ratio above which it fails")
    options = parser.parse_args()
    base = options.base or BASE.read_text().split()[0]
    with checkout(base) as tree:
        found = measure({"base": tree, "ours": options.ours.resolve()}, options.only, options.rounds, options.limit)
    worse = [name for name, pairs in found.items() if is_worse(pairs, options.limit)]
    result = {name: compare(pairs) for name, pairs in found.items()}
    print(json.dumps({"benchmark": "gate", "base": base, "limit": options.limit, "worse": worse, **result}))
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
