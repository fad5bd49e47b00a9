"""A user-defined model, tokenizer and batches, trained like any run: with metrics, scores, checkpoints and exact resume.

    python examples/own_dataset.py    # a program: no command takes it, since model and data are not in its config

The task is to answer questions such as `3+4=`. Training batches come from a generator of NumPy arrays; validation batches are a
list. The model is a plain linen module with the signature of `transformer.LanguageModel`. The partition metadata of its kernel
shards it over the devices of `parallel.fsdp`. The directory of the run records only the names of these objects. `load` therefore
needs the objects again.
"""

import dataclasses
import pathlib
import tempfile

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from transformer import AdamW, Config, DataConfig, ModelConfig, TrainingConfig, load
from transformer.runs.train import train

LETTERS = "\n0123456789+="
ROWS, LENGTH = 32, 4


class Letters:
    """A tokenizer: the id of a letter is its index in the alphabet."""

    kind = "letters"
    vocab_size = len(LETTERS)
    end_of_text = 0
    token_bytes = np.array([0] + [1] * (len(LETTERS) - 1), np.int32)

    def encode(self, text):
        """Ids of a text."""
        return np.array([LETTERS.index(letter) for letter in text], np.int32)

    def decode(self, ids):
        """Text of ids."""
        return "".join(LETTERS[i] for i in ids if 0 < i < len(LETTERS))

    def save(self, directory):
        """Nothing is stored, since `load` gets the tokenizer again."""


class Recurrent(nn.Module):
    """Logits of the next token at every position, from a recurrent network."""

    features: int = 64

    @nn.compact
    def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None, train=False):
        """The call of `transformer.LanguageModel`; each row has one document, therefore segments are ignored."""
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", None))
        x_BTD = nn.Embed(len(LETTERS), self.features)(tokens_BT)
        x_BTD = nn.RNN(nn.GRUCell(self.features))(x_BTD)
        return nn.Dense(len(LETTERS), kernel_init=kernel)(x_BTD)


def make_batch(generator):
    """Rows such as `3+5=8`; only the answer has weight."""
    a, b = generator.integers(0, 5, (2, ROWS))
    ids = np.stack([Letters().encode(f"{x}+{y}={x + y}") for x, y in zip(a, b, strict=True)])
    weights = np.broadcast_to(np.float32([0, 0, 0, 1]), (ROWS, LENGTH))
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


def endless(seed=0):
    """Training batches."""
    generator = np.random.default_rng(seed)
    while True:
        yield make_batch(generator)


def get_config() -> Config:
    """The config, which has all other settings."""
    return Config(
        model=ModelConfig(vocab_size=len(LETTERS)),
        data=DataConfig(sequence_length=LENGTH, batch_size=ROWS),
        optimizer=AdamW(learning_rate=0.01),
        training=TrainingConfig(steps=100, log_every=50, eval_every=100),
    )


def main() -> None:
    """Train briefly, resume, and answer a question."""
    generator = np.random.default_rng(1)
    held_out = [make_batch(generator) for _ in range(2)]
    with tempfile.TemporaryDirectory() as directory:
        config = dataclasses.replace(get_config(), workdir=str(pathlib.Path(directory) / "sums"))
        for steps in (100, 200):  # the second call resumes: it skips the batches that the first call used
            training = dataclasses.replace(config.training, steps=steps)
            config = dataclasses.replace(config, training=training)
            data = {"train": endless(), "validation": held_out}
            reached = train(config, model=Recurrent(), data=data, tokenizer=Letters())
        run = load(config.workdir, model=Recurrent(), tokenizer=Letters())
        logits_BTV = run.model.apply({"params": run.params}, jnp.asarray([run.tokenizer.encode("3+4=")]))
        print(f"step {reached.step}: 3+4={run.tokenizer.decode([int(jnp.argmax(logits_BTV[0, -1]))])}")


if __name__ == "__main__":
    main()
