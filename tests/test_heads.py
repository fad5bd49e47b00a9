"""What benchmarks/heads.py measures, on weights and units made by hand, and on a small model."""

import pathlib
import runpy
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import NORMS
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.ops.norms.rms_norm import RMSNorm


@pytest.fixture(scope="module")
def heads():
    path = pathlib.Path(__file__).parent.parent / "benchmarks" / "heads.py"
    return types.SimpleNamespace(**runpy.run_path(str(path)))


def test_a_memory_that_knows_what_follows(heads):
    following = np.arange(600) % 3
    hidden = np.eye(3)[following] + np.linspace(0, 0.1, 600)[:, None]  # each unit answers to one token's contexts
    for scores, agreement, by_chance in ((np.eye(3), 1, 0), (np.eye(3)[[1, 2, 0]], 0, 0.5)):
        memory = heads.read_memory(hidden, following, scores)
        np.testing.assert_allclose(memory.agreement_F, agreement)
        np.testing.assert_allclose(memory.by_chance_F, by_chance)
        assert memory.contexts_FC[:, 0].tolist() == [597, 598, 599]


def test_looks_at_what_the_model_computes_with(heads):
    block = BlockConfig(
        AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True, window=5, logits_soft_cap=2.0),
        FeedForwardConfig(hidden_dim=24, gated=True),
        RMSNorm(),
    )
    model = Decoder(ModelConfig(vocab_size=13, num_layers=2, embed_dim=16, pattern=(block,), init_std=0.0))
    params, _ = init_params(model, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 8)), jnp.int32)
    weights, hidden = heads.look(model, params, tokens)
    seen = {"value": [], "out": [], "feed_forward": []}

    def watch(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.module.name in seen:
            seen[context.module.name].append(args[0] if context.module.name == "out" else result)
        return result

    with nn.intercept_methods(watch):
        model.apply({"params": params}, tokens)
    for layer in range(2):
        values = jnp.repeat(seen["value"][layer], 2, axis=2)
        mixed = jnp.einsum("bhts,bshk->bthk", weights[layer], values)
        np.testing.assert_allclose(mixed, seen["out"][layer], atol=1e-5)
        down = params["decoder"]["blocks"][f"block_{layer}"]["feed_forward"]["down"]["kernel"]
        np.testing.assert_allclose(hidden[layer] @ down, seen["feed_forward"][layer], atol=1e-5)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_of_a_value_are_logits_of_a_stream_that_is_the_value(heads, kind, tied):
    """Up to a factor: the norm's, which is one for all tokens."""
    block = BlockConfig(AttentionConfig(num_heads=2), norm=NORMS.find(kind)())
    config = ModelConfig(vocab_size=13, num_layers=1, embed_dim=16, pattern=(block,), tie_embeddings=tied)
    model = Decoder(config)
    params, _ = init_params(model, jax.random.key(0))
    scale = jnp.asarray(np.random.default_rng(0).normal(1, 0.5, 16), jnp.float32)
    params["decoder"]["final_norm"]["scale"] = scale
    scores = heads.value_scores(params, config, 0)[5]

    def instead(call, args, kwargs, context):
        if context.module.name == "final_norm":
            args = (params["decoder"]["blocks"]["block_0"]["feed_forward"]["down"]["kernel"][5][None, None],)
        return call(*args, **kwargs)

    with nn.intercept_methods(instead):
        logits = np.asarray(model.apply({"params": params}, jnp.zeros((1, 1), jnp.int32)))[0, 0]
    factor = (logits @ scores) / (scores @ scores)
    assert factor > 0
    np.testing.assert_allclose(scores * factor, logits, atol=1e-5 * np.abs(logits).max())
