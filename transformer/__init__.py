"""A small Flax linen transformer library and trainer."""

from typing import Any

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

__version__ = "0.1.0"

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
    """`load` comes when asked for: it needs Orbax and the tokenizers, which a user of the layers does not."""
    if name == "load":
        from transformer.runs.saved import load  # noqa: PLC0415

        return load
    raise AttributeError(f"module 'transformer' has no attribute {name!r}")
