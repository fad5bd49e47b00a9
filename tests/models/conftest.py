"""Tiny models with random parameters, compiled once for each configuration and shape."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POSITIONS
from transformer.models.decoder import Decoder
from transformer.models.encoder import Encoder
from transformer.models.encoder_decoder import EncoderDecoder


@dataclasses.dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """A config that `build` makes an encoder of."""


@dataclasses.dataclass(frozen=True)
class PairConfig(ModelConfig):
    """A config that `build` makes an encoder-decoder of."""


@dataclasses.dataclass(frozen=True)
class PrefixConfig(ModelConfig):
    """A config that `build` makes a decoder of that reads prefixes in both directions."""


CONFIGS = {"decoder": ModelConfig, "prefix": PrefixConfig, "encoder": EncoderConfig, "encoder_decoder": PairConfig}
MODELS = {
    ModelConfig: Decoder,
    PrefixConfig: functools.partial(Decoder, bidirectional_prefix=True),
    EncoderConfig: Encoder,
    PairConfig: EncoderDecoder,
}


def config(kind="rotary", *, architecture="decoder", attention=(), block=(), **changes):
    """Two layers of width 16, four heads on two key/value heads, biases and all."""
    settings = {"num_heads": 4, "num_kv_heads": 2, "use_bias": True, **dict(attention)}
    parts = {"attention": AttentionConfig(**settings), "feed_forward": FeedForwardConfig(hidden_dim=24), **dict(block)}
    defaults = {
        "vocab_size": 13,
        "max_length": 12,
        "num_layers": 2,
        "embed_dim": 16,
        "pattern": (BlockConfig(**parts),),
        "positions": POSITIONS.find(kind)(),
    }
    return CONFIGS[architecture](**{**defaults, **changes})


def build(config):
    return MODELS[type(config)](config)


@functools.cache
def params(config):
    """Random parameters, large enough that every part matters (fresh biases are zeros, fresh scales ones)."""
    model = build(dataclasses.replace(config, scan_layers=False))
    tokens = [jax.ShapeDtypeStruct((1, 2), np.int32)] * (2 if isinstance(config, PairConfig) else 1)
    method = "logits" if isinstance(config, EncoderConfig) else "__call__"
    shapes = jax.eval_shape(functools.partial(model.init, method=method), jax.random.key(0), *tokens)
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(center + 0.3 * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def jit(function):
    """`jax.jit` that compiles in half the time, to slower code."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def forward(config, method="__call__"):
    """The compiled model: `forward(config)(params, *tokens, **arguments)`."""
    model = build(config)
    return jit(lambda params, *args, **kwargs: model.apply({"params": params}, *args, method=method, **kwargs))


@functools.cache
def graded(config):
    """The compiled model and a gradient: `(params, weights, *tokens, **arguments) -> (gradient, logits)`.

    It is the gradient of `sum(weights * logits)`.
    """
    model = build(config)

    def loss(params, weights, *args, **kwargs):
        logits = model.apply({"params": params}, *args, **kwargs)
        return (weights * logits).sum(), logits

    return jit(jax.grad(loss, has_aux=True))


def assert_trees_close(actual, expected, tolerance=2e-5):
    """Every leaf within `tolerance` of the largest value of the expected leaf (at least of 1)."""
    flat, _ = jax.tree_util.tree_flatten_with_path(expected)
    leaves = jax.tree.leaves(actual)
    assert len(leaves) == len(flat)
    for leaf, (path, other) in zip(leaves, flat, strict=True):
        scale = max(1.0, float(np.abs(other).max(initial=0)))
        np.testing.assert_allclose(leaf, other, atol=tolerance * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


def tokens(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 13, shape), jnp.int32)


@pytest.fixture(scope="session")
def tiny():
    """The helpers of this file."""
    helpers = (config, build, params, jit, forward, graded, assert_trees_close, tokens)
    return types.SimpleNamespace(**{helper.__name__: helper for helper in helpers})
