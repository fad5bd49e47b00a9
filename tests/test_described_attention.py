"""What a run says of its attention is what its model traces."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from transformer.config import Config, DataConfig, ParallelConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.model_kinds import POSITIONS
from transformer.objective import OBJECTIVES
from transformer.ops.patterns.strided import StridedPattern
from transformer.parts import Parts, StandIn


def make(attention=None, positions="rotary", length=512, kind="next_token", **model):
    block = BlockConfig(AttentionConfig(num_heads=2, **(attention or {})))
    return Config(
        model=ModelConfig(
            vocab_size=5,
            max_length=length,
            num_layers=1,
            embed_dim=8,
            pattern=(block,),
            positions=POSITIONS.find(positions)(),
            **model,
        ),
        data=DataConfig(sequence_length=length),
        objective=OBJECTIVES.find(kind)(),
        parallel=ParallelConfig(data=1),
    )


def describe_attention(config, platform):
    return Parts(config, StandIn(config.model.vocab_size)).describe_attention(platform)


@pytest.mark.parametrize(
    ("settings", "cpu", "tpu"),
    [
        ({}, "blockwise", "splash"),
        ({"attention": {"window": 9, "logits_soft_cap": 2.0}}, "blockwise", "splash"),
        ({"length": 128}, "xla", "xla"),
        ({"positions": "alibi"}, "blockwise", "blockwise"),
        ({"positions": "transformer_xl"}, "blockwise", "splash"),
        ({"attention": {"pattern": StridedPattern()}}, "blockwise", "blockwise"),
        ({"kind": "prefix_lm"}, "blockwise", "blockwise"),
        ({"attention": {"implementation": "xla"}}, "xla", "xla"),
    ],
)
def test_the_attention_of_a_run_is_named(settings, cpu, tpu):
    config = make(**settings)
    assert (describe_attention(config, "cpu"), describe_attention(config, "tpu")) == (cpu, tpu)
    model, tokens = config.objective.make_model(config.model), jnp.zeros((2, config.data.sequence_length), jnp.int32)
    given = {"prefix_BT": tokens > 0} if model.bidirectional_prefix else {}
    jaxpr = jax.make_jaxpr(
        lambda params: model.apply({"params": params}, tokens, positions_BT=tokens, segment_ids_BT=tokens, **given)
    )(Parts(config, StandIn(5)).shapes)
    assert ("platform_index" in str(jaxpr)) == (cpu != tpu)


def test_patterns_of_blocks_and_their_devices():
    local = BlockConfig(AttentionConfig(num_heads=2, dropout=0.1))
    config = make(memory_length=64)
    assert describe_attention(config, "tpu") == "blockwise"
    config = make()
    model = dataclasses.replace(config.model, num_layers=2, pattern=(*config.model.pattern, local))
    assert describe_attention(dataclasses.replace(config, model=model), "tpu") == "splash and xla"
    assert describe_attention(dataclasses.replace(config, parallel=ParallelConfig(data=8)), "tpu") == "splash"
    assert describe_attention(dataclasses.replace(config, parallel=ParallelConfig(context=4)), "tpu") == "ring"
    by_pmap = dataclasses.replace(config, parallel=ParallelConfig(data=8, strategy="pmap"))
    assert describe_attention(by_pmap, "tpu") == "splash"
    assert describe_attention(config, "gpu") == "blockwise"  # rows have segments
