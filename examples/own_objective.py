"""A user-defined objective with its own metric: a loss with a confidence penalty (Pereyra et al. 2017).

    python examples/own_objective.py                                           # trains for a moment, and loads the run
    transformer train examples/own_objective.py --objective.beta 0.2 --training.steps 500

One file has all parts. The settings have the flag `--objective.beta` beside the flags of next-token prediction. The loss has an
additional term, and the statistic `entropy` becomes a metric of every row. Import this file before loading such a run.
"""

import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.objectives.next_token import NextToken
from transformer.runs.saved import load
from transformer.runs.train import train
from transformer.validation import require_at_least


@OBJECTIVES.register
@dataclasses.dataclass(frozen=True)
class ConfidencePenalty(NextToken):
    """Cross-entropy of the next token, minus the entropy of the prediction."""

    kind = "confidence_penalty"

    beta: float = 0.1
    """Weight of the entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "beta")

    def loss(self, model, vocabulary, params, carry, batch, key, train):
        """Sums over targets: `loss`, `weight`, `entropy`, and `objective`, which is minimised."""
        logits_BTV = model.apply(
            {"params": params},
            batch.inputs,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            train=train,
            rngs={"dropout": key} if train else {},
        )
        log_probability_BTV = jax.nn.log_softmax(logits_BTV)
        entropy = -jnp.sum(jnp.exp(log_probability_BTV) * log_probability_BTV, axis=-1)
        nll = -jnp.take_along_axis(log_probability_BTV, batch.targets[..., None], axis=-1)[..., 0]
        sums = {"loss": nll, "entropy": entropy, "objective": nll - self.beta * entropy}
        statistics = {name: jnp.sum(value * batch.weights) for name, value in sums.items()}
        statistics["weight"] = jnp.sum(batch.weights)
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))


def get_config() -> Config:
    """A small run."""
    return Config(
        model=ModelConfig(num_layers=2, embed_dim=32, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(sequence_length=32, batch_size=8),
        objective=ConfidencePenalty(beta=0.3),
        training=TrainingConfig(steps=20, sample_length=0),
    )


def main() -> None:
    """Train for twenty steps, and load the run."""
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        (folder / "text.txt").write_text("to be or not to be, that is the question. " * 200)
        config = get_config()
        data = dataclasses.replace(config.data, source=(str(folder / "text.txt"),), data_dir=str(folder / "data"))
        reached = train(dataclasses.replace(config, data=data, workdir=str(folder / "run")))
        print("metrics:", ", ".join(reached.metrics))
        print("loaded:", load(folder / "run").config.objective)


if __name__ == "__main__":
    main()
