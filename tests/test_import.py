"""The layers can be had without the trainer: a ten-line script pulls in neither data, checkpoints nor command line."""

import subprocess
import sys
import textwrap

SCRIPT = """
import sys, jax, jax.numpy as jnp
from transformer import Attention, AttentionConfig, Block, BlockConfig, Decoder, FeedForward, FeedForwardConfig, ModelConfig
x = jnp.ones((2, 8, 16))
for layer in (Attention(AttentionConfig(num_heads=2)), FeedForward(FeedForwardConfig()), Block(BlockConfig())):
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert y.shape == x.shape
logits, _ = Decoder(ModelConfig(vocab_size=7)).init_with_output(jax.random.key(0), jnp.ones((2, 8), jnp.int32))
assert logits.shape == (2, 8, 7)
heavy = {"grain", "tensorflow_datasets", "orbax", "tokenizers", "tensorboardX", "tensorflow", "optax"}
print(sorted(heavy & set(sys.modules)))
"""

TIMER = """
import time, flax.linen
start = time.perf_counter()
import transformer
print(time.perf_counter() - start)
"""


def run(script):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], text=True, capture_output=True, timeout=120, check=True
    )
    return result.stdout.strip()


def test_layers_import_nothing_of_the_trainer():
    assert run(SCRIPT) == "[]"


def test_import_adds_little_to_flax():
    assert min(float(run(TIMER)) for _ in range(3)) < 1.5
