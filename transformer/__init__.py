"""A small Flax linen transformer library and trainer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer.generation.generate import generate
    from transformer.layers.attention import Attention
    from transformer.layers.block import Block
    from transformer.layers.cache import KVCache
    from transformer.layers.experts import MixtureOfExperts
    from transformer.layers.feed_forward import FeedForward
    from transformer.model_config import (
        AttentionConfig,
        BlockConfig,
        FeedForwardConfig,
        ModelConfig,
        NormConfig,
        PositionConfig,
    )
    from transformer.models.decoder import Decoder
    from transformer.models.encoder import Encoder
    from transformer.models.encoder_decoder import EncoderDecoder
    from transformer.ops.attention import dot_product_attention
    from transformer.ops.masks import AttentionMask
    from transformer.runs.saved import load

__version__ = "0.1.0"

_MODULES = {
    "Attention": "layers.attention",
    "AttentionConfig": "model_config",
    "AttentionMask": "ops.masks",
    "Block": "layers.block",
    "BlockConfig": "model_config",
    "Decoder": "models.decoder",
    "Encoder": "models.encoder",
    "EncoderDecoder": "models.encoder_decoder",
    "FeedForward": "layers.feed_forward",
    "FeedForwardConfig": "model_config",
    "KVCache": "layers.cache",
    "MixtureOfExperts": "layers.experts",
    "ModelConfig": "model_config",
    "NormConfig": "model_config",
    "PositionConfig": "model_config",
    "dot_product_attention": "ops.attention",
    "generate": "generation.generate",
    "load": "runs.saved",
}

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionMask",
    "Block",
    "BlockConfig",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "FeedForward",
    "FeedForwardConfig",
    "KVCache",
    "MixtureOfExperts",
    "ModelConfig",
    "NormConfig",
    "PositionConfig",
    "dot_product_attention",
    "generate",
    "load",
]


def __getattr__(name: str) -> Any:
    """A name comes when asked for: the command line checks its arguments before JAX is loaded, and layers need no Orbax."""
    if name not in _MODULES:
        raise AttributeError(f"module 'transformer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"transformer.{_MODULES[name]}"), name)
