"""A small Flax linen transformer library and trainer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, TrainingConfig
    from transformer.data.tokenizers import Tokenizer
    from transformer.generation.generate import Generated, Generator, generate, stream
    from transformer.generation.sampling import SamplingConfig
    from transformer.generation.translate import translate
    from transformer.layers.attention import Attention
    from transformer.layers.block import Block, BlockCache
    from transformer.layers.cache import KVCache, MemoryCache
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
    from transformer.models.classifier import Classifier
    from transformer.models.decoder import Decoder
    from transformer.models.encoder import Encoder
    from transformer.models.encoder_decoder import EncoderDecoder
    from transformer.models.init import init_params
    from transformer.ops.attention import dot_product_attention
    from transformer.ops.bias import AlibiBias, BiasDescription, T5Bias
    from transformer.ops.masks import AttentionMask, BlockPattern
    from transformer.parallel_config import ParallelConfig
    from transformer.runs.saved import Loaded, load
    from transformer.types import UserError

__version__ = "0.1.0"

_MODULES = {
    "AlibiBias": "ops.bias",
    "Attention": "layers.attention",
    "AttentionConfig": "model_config",
    "AttentionMask": "ops.masks",
    "BiasDescription": "ops.bias",
    "Block": "layers.block",
    "BlockCache": "layers.block",
    "BlockConfig": "model_config",
    "BlockPattern": "ops.masks",
    "Classifier": "models.classifier",
    "Config": "config",
    "DataConfig": "config",
    "Decoder": "models.decoder",
    "Encoder": "models.encoder",
    "EncoderDecoder": "models.encoder_decoder",
    "FeedForward": "layers.feed_forward",
    "FeedForwardConfig": "model_config",
    "Generated": "generation.generate",
    "Generator": "generation.generate",
    "KVCache": "layers.cache",
    "Loaded": "runs.saved",
    "MemoryCache": "layers.cache",
    "MixtureOfExperts": "layers.experts",
    "ModelConfig": "model_config",
    "NormConfig": "model_config",
    "ObjectiveConfig": "config",
    "OptimizerConfig": "config",
    "ParallelConfig": "parallel_config",
    "PositionConfig": "model_config",
    "SamplingConfig": "generation.sampling",
    "T5Bias": "ops.bias",
    "Tokenizer": "data.tokenizers",
    "TrainingConfig": "config",
    "UserError": "types",
    "dot_product_attention": "ops.attention",
    "generate": "generation.generate",
    "init_params": "models.init",
    "load": "runs.saved",
    "stream": "generation.generate",
    "translate": "generation.translate",
}

__all__ = [
    "AlibiBias",
    "Attention",
    "AttentionConfig",
    "AttentionMask",
    "BiasDescription",
    "Block",
    "BlockCache",
    "BlockConfig",
    "BlockPattern",
    "Classifier",
    "Config",
    "DataConfig",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "FeedForward",
    "FeedForwardConfig",
    "Generated",
    "Generator",
    "KVCache",
    "Loaded",
    "MemoryCache",
    "MixtureOfExperts",
    "ModelConfig",
    "NormConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PositionConfig",
    "SamplingConfig",
    "T5Bias",
    "Tokenizer",
    "TrainingConfig",
    "UserError",
    "dot_product_attention",
    "generate",
    "init_params",
    "load",
    "stream",
    "translate",
]


def __getattr__(name: str) -> Any:
    """A name comes when asked for: the command line checks its arguments before JAX is loaded, and layers need no Orbax."""
    if name not in _MODULES:
        raise AttributeError(f"module 'transformer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"transformer.{_MODULES[name]}"), name)
