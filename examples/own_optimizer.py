"""A user-defined optimizer and learning-rate schedule: momentum, and a decay by steps.

    python examples/own_optimizer.py                                           # trains for a moment, and prints the rates
    transformer train examples/own_optimizer.py --optimizer.momentum 0.8 --optimizer.schedule.stairs 3 --training.steps 500

Each class is a kind. Its fields are settings and flags, beside the settings of all optimizers and schedules (weight decay and
groups, warm-up and restarts). Other configs can use them after an import of this file: `--optimizer.kind heavy_ball`.
"""

import dataclasses
import json
import pathlib
import tempfile

import jax.numpy as jnp
import optax

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, Schedule
from transformer.runs.train import train
from transformer.validation import require_at_least, require_range


@OPTIMIZERS.register
@dataclasses.dataclass(frozen=True)
class HeavyBall(Optimizer):
    """Gradient descent with momentum (Polyak 1964)."""

    kind = "heavy_ball"

    momentum: float = 0.9
    """Decay of the velocity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, 1, "momentum")

    def rule(self):
        """Gradient in, direction of ascent out."""
        return optax.trace(self.momentum)


@SCHEDULES.register
@dataclasses.dataclass(frozen=True)
class Stairs(Schedule):
    """Halve the learning rate at even distances."""

    kind = "stairs"

    stairs: int = 4
    """Number of parts with a constant learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "stairs")

    def decay(self, count, steps):
        """The share of the peak after `count` of so many steps."""
        return 0.5 ** jnp.floor(self.stairs * count / steps)


def get_config() -> Config:
    """A small run."""
    return Config(
        model=ModelConfig(num_layers=2, embed_dim=32, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(sequence_length=32, batch_size=8),
        optimizer=HeavyBall(learning_rate=0.5, schedule=Stairs(stairs=3), weight_decay=0.0),
        training=TrainingConfig(steps=12, log_every=1, sample_length=0),
    )


def main() -> None:
    """Train for twelve steps, and print the learning rates."""
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        (folder / "text.txt").write_text("to be or not to be, that is the question. " * 200)
        config = get_config()
        data = dataclasses.replace(config.data, source=(str(folder / "text.txt"),), data_dir=str(folder / "data"))
        train(dataclasses.replace(config, data=data, workdir=str(folder / "run")))
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        rates = [row["learning_rate"] for row in rows if row["split"] == "train"]
        print("learning rates:", *rates)


if __name__ == "__main__":
    main()
