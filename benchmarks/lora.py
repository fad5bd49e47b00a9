"""Low-rank adapters against full fine-tuning, with time and memory; prints one JSON line.

    JAX_PLATFORMS=cpu python benchmarks/lora.py [--seeds 0 1 2] [--steps 600] [--more 300]

For each seed, a small byte-level decoder learns Python code of the standard library. It is then trained on other text, the
manual in `pydoc_data/topics.py`, from one checkpoint and for equally many steps: once all parameters, and once adapters beside
the frozen base. The gap is the difference of the held-out loss on that text between the base and full fine-tuning. `closed` is
the share of the gap that adapters close. Bytes are arguments and temporaries of the compiled step; seconds are the median of a
step.
"""

import argparse
import inspect
import json
import pathlib
import pydoc_data.topics
import statistics
import tempfile
from typing import Any

import jax
from rich.console import Console

from transformer.config import AdapterConfig, Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.optimizers.adamw import AdamW
from transformer.runs.recipe import make_run
from transformer.runs.scoring import evaluate
from transformer.runs.train import train
from transformer.schedules.cosine import CosineSchedule
from transformer.training.writers import read_jsonl

CODE = 1_500_000
RATES = {"base": 3e-3, "full": 1e-3, "adapters": 4e-3}


def make_config(folder: pathlib.Path, name: str, text: str, steps: int, seed: int, rank: int) -> Config:
    """A run on a text of the folder, in a directory of its own."""
    heads, network = AttentionConfig(num_heads=4), FeedForwardConfig(hidden_dim=384, gated=True)
    base = "" if name == "base" else str(folder / "base")
    adapted = name == "adapters"
    return Config(
        model=ModelConfig(num_layers=2, embed_dim=128, pattern=(BlockConfig(heads, network),), scan_layers=True),
        data=DataConfig(
            source=(str(folder / text),),
            sequence_length=128,
            batch_size=16,
            shuffle_seed=seed,
            data_dir=str(folder / "data"),
        ),
        adapter=AdapterConfig(rank=rank, alpha=float(rank)) if adapted else AdapterConfig(),
        optimizer=AdamW(learning_rate=RATES[name], weight_decay=0.0, schedule=CosineSchedule(warmup_steps=steps // 20)),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(
            steps=steps, seed=seed, init_from=base, eval_every=0, checkpoint_every=0, sample_length=0, log_every=20
        ),
        workdir=str(folder / name),
    )


def measure(config: Config, quiet: Console) -> dict[str, Any]:
    """Train, and measure the step."""
    run = make_run(config)
    shapes = run.config.objective.batch_shapes(run.config)
    memory = run.runner.lower(run.state, shapes).compile().memory_analysis()
    loss = train(config, console=quiet).metrics["loss"]
    rows = [row for row in read_jsonl(pathlib.Path(config.workdir) / "metrics.jsonl") if "tokens_per_second" in row]
    tokens = config.data.batch_size * config.data.sequence_length
    return {
        "loss": loss,
        "trained": sum(x.size for x in jax.tree.leaves(run.state.params)),
        "step_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
        "seconds": statistics.median(tokens / row["tokens_per_second"] for row in rows),
    }


def one_seed(seed: int, steps: int, more: int, rank: int) -> dict[str, Any]:
    """The base, and both ways of training it on."""
    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        library = sorted(pathlib.Path(inspect.getfile(json)).parents[1].glob("*.py"))
        (folder / "code.txt").write_text("".join(path.read_text(errors="replace") for path in library)[:CODE])
        (folder / "manual.txt").write_text("\n".join(pydoc_data.topics.topics.values()))
        train(make_config(folder, "base", "code.txt", steps, seed, rank), console=quiet)
        frozen = evaluate(
            folder / "base", split="validation", source=(str(folder / "manual.txt"),), data_dir=str(folder / "data")
        )["loss"]
        found = {
            name: measure(make_config(folder, name, "manual.txt", more, seed, rank), quiet)
            for name in ("full", "adapters")
        }
    closed = (frozen - found["adapters"]["loss"]) / (frozen - found["full"]["loss"])
    return {"seed": seed, "frozen": frozen, "closed": closed, **found}


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of the base")
    parser.add_argument("--more", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    seeds = [one_seed(seed, options.steps, options.more, options.rank) for seed in options.seeds]
    print(json.dumps({"rank": options.rank, "least_closed": min(seed["closed"] for seed in seeds), "seeds": seeds}))


if __name__ == "__main__":
    main()
