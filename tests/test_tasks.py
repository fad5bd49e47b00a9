"""What a step is worth: parameters and operations, of experts only those that a token goes to."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from transformer.cli.arguments import load_config
from transformer.config import Config, DataConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig, PositionConfig
from transformer.planning.flops import attention_flops, formula_flops
from transformer.tasks import count_parameters, idle_parameters, init_method, init_shapes, make_model, measure_work
from transformer.types import Batch

MIXTRAL = str(pathlib.Path(__file__).parent.parent / "configs" / "moe_8x7b.py")


def abstract_params(config):
    """Shapes of a model's parameters, of which none is made."""
    model = make_model(config)
    tokens = [jax.ShapeDtypeStruct(shape, np.int32) for shape in init_shapes(model)]
    shapes = jax.eval_shape(
        lambda key, *tokens: model.init(key, *tokens, method=init_method(model)), jax.random.key(0), *tokens
    )
    return shapes["params"]


def test_mixtral_has_as_many_parameters_as_published():
    model = load_config(MIXTRAL).model
    params = abstract_params(model)
    assert count_parameters(params) == 46_702_792_704
    # Jiang et al. 2024, section 2: a token uses 13 billion of them.
    assert count_parameters(params) - idle_parameters(model) == 12_879_925_248
    block = jax.tree.map(lambda leaf: leaf.shape, params["decoder"]["blocks"]["block_0"])
    assert block["feed_forward"] == {
        "router": {"kernel": (32, 4096, 8)},
        "up": {"kernel": (32, 8, 4096, 14_336)},
        "gate": {"kernel": (32, 8, 4096, 14_336)},
        "down": {"kernel": (32, 8, 14_336, 4096)},
    }
    assert block["attention"]["key"]["kernel"] == (32, 4096, 8, 128)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_idle_parameters_are_those_of_experts_not_chosen(architecture):
    """By the difference between a model of all experts and one of as many as a token goes to, routers apart."""
    networks = (FeedForwardConfig(), FeedForwardConfig(24, gated=True, num_experts=5, experts_per_token=2))
    few = (networks[0], dataclasses.replace(networks[1], num_experts=2))

    def model(networks):
        pattern = tuple(BlockConfig(AttentionConfig(num_heads=2), network) for network in networks)
        return ModelConfig(architecture, vocab_size=7, num_layers=4, embed_dim=8, pattern=pattern)

    routers = 2 * (5 - 2) * 8 * (2 if architecture == "encoder_decoder" else 1)
    more, less = (count_parameters(abstract_params(model(n))) for n in (networks, few))
    assert idle_parameters(model(networks)) == more - less - routers > 0
    assert idle_parameters(model(few)) == idle_parameters(model(networks[:1])) == 0


def test_operations_of_a_step_leave_idle_experts_out():
    network = FeedForwardConfig(24, num_experts=5, experts_per_token=2)
    block = BlockConfig(AttentionConfig(num_heads=2), network)
    model = ModelConfig(vocab_size=7, num_layers=2, embed_dim=8, pattern=(block,))
    batch = Batch(*[np.zeros((3, 6))] * 5)
    work = measure_work(Config(model=model, data=DataConfig(sequence_length=6, batch_size=3)), abstract_params(model))
    # Embedding (tied: a product), attention, router, two experts of two matrices, three norms.
    per_token = 7 * 8 + 2 * (4 * 8 * 8 + 8 * 5 + 2 * 2 * 8 * 24 + 2 * 8) + 8
    assert work(batch) == (18, 18 * (6 * per_token + 12 * 2 * 8 * 6))


def test_operations_of_a_step_have_what_is_remembered_of_the_rows_before():
    """Each token attends to M vectors more; by the formula of utilisation and by that of a plan."""
    block = BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(24))
    positions = PositionConfig(kind="transformer_xl")
    model = ModelConfig(vocab_size=7, num_layers=3, embed_dim=8, pattern=(block,), positions=positions)
    plain = Config(model=model, data=DataConfig(sequence_length=6, batch_size=3))
    memory = dataclasses.replace(
        plain,
        model=dataclasses.replace(model, memory_length=5),
        data=dataclasses.replace(plain.data, continue_rows=True),
    )
    params, batch = abstract_params(model), Batch(*[np.zeros((3, 6))] * 5)
    more = 18 * 12 * 3 * 8 * 5
    assert measure_work(memory, params)(batch).flops - measure_work(plain, params)(batch).flops == more
    for causal_half in (True, False):
        before, after = (
            formula_flops(config, params, rows=3, length=6, causal_half=causal_half) for config in (plain, memory)
        )
        assert after - before == more


@pytest.mark.parametrize(
    ("length", "memory", "window"), [(6, 0, 0), (6, 0, 4), (6, 5, 0), (6, 5, 4), (6, 5, 8), (6, 5, 20), (6, 1, 3)]
)
def test_keys_of_a_query_by_counting_pairs(length, memory, window):
    config = _with_memory(length, memory, window)
    query, key = np.arange(length)[:, None] + memory, np.arange(memory + length)
    near = (key > query - window) if window else np.ones((length, memory + length), bool)
    pairs = np.sum((key <= query) & near) / length
    counted = attention_flops(config, length=length, memory=memory, causal_half=True, products=1) / (2 * 8 * 2)
    # A query sees half of its own row's triangle, whose diagonal the formula halves.
    assert abs(counted - pairs) <= 0.5


def _with_memory(length, memory, window):
    block = BlockConfig(AttentionConfig(num_heads=2, window=window))
    model = ModelConfig(
        vocab_size=7,
        num_layers=2,
        embed_dim=8,
        pattern=(block,),
        positions=PositionConfig(kind="transformer_xl"),
        memory_length=memory,
    )
    return Config(model=model, data=DataConfig(sequence_length=length, batch_size=3, continue_rows=memory > 0))
