"""What a step is worth: parameters and operations, of experts only those that a token goes to."""

import pathlib

import jax
import numpy as np

from transformer import parts
from transformer.cli.arguments import load_config
from transformer.config import Config, DataConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.parts import Parts, StandIn, count_parameters
from transformer.training.flops import step_flops
from transformer.types import Batch

MIXTRAL = str(pathlib.Path(__file__).parent.parent / "configs" / "moe_8x7b.py")


def make(config):
    return Parts(config, StandIn(config.model.vocab_size))


def test_mixtral_has_as_many_parameters_as_published():
    made = make(Config(model=load_config(MIXTRAL).model))
    params = made.shapes
    assert count_parameters(params) == 46_702_792_704
    # Jiang et al. 2024, section 2: a token uses 13 billion of them; in products, all but an embedding and 65 norms.
    token = jax.ShapeDtypeStruct((1, 1), np.int32)
    batch = Batch(token, token, jax.ShapeDtypeStruct((1, 1), np.float32), token, token)
    used = made.count_step(batch).products / 6
    assert used + 32_000 * 4096 + 65 * 4096 == 12_879_925_248
    block = jax.tree.map(lambda leaf: leaf.shape, params["decoder"]["blocks"]["block_0"])
    assert block["feed_forward"] == {
        "router": {"kernel": (32, 4096, 8)},
        "up": {"kernel": (32, 8, 4096, 14_336)},
        "gate": {"kernel": (32, 8, 4096, 14_336)},
        "down": {"kernel": (32, 8, 14_336, 4096)},
    }
    assert block["attention"]["key"]["kernel"] == (32, 4096, 8, 128)


def test_work_is_counted_once_a_shape_and_for_all_processes(monkeypatch):
    model = ModelConfig(vocab_size=7, num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=2)),))
    config = Config(model=model, data=DataConfig(sequence_length=6, batch_size=6))
    traced = []
    monkeypatch.setattr(parts, "step_flops", lambda *a: traced.append(a) or step_flops(*a))
    work = make(config).measure_work(parts=2)

    def batch(length):
        ids, weights = (np.zeros((3, length), dtype) for dtype in (np.int32, np.float32))
        return Batch(ids, ids, weights, ids, ids)

    # Embedding (tied: a product), projections, feed-forward; and the 21 pairs of a causal row.
    per_token = 7 * 8 + 4 * 8 * 8 + 2 * 8 * 32
    assert work(batch(6)) == work(batch(6)) == (36, 36 * 6 * per_token + 6 * 12 * 8 * 21)
    assert work(batch(3)) == (18, 18 * 6 * per_token + 6 * 12 * 8 * 6)
    assert len(traced) == 2
