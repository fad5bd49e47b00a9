"""A small Flax linen transformer library and trainer."""
# ruff: noqa: F401 (what a type checker sees of the lazy names)

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer.config import Config, DataConfig, TrainingConfig
    from transformer.data.tokenizers import Tokenizer
    from transformer.generation.generate import Generated, Generator, generate, stream
    from transformer.generation.sampling import SamplingConfig
    from transformer.generation.translate import translate
    from transformer.kinds import Family, Kind
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
    from transformer.objective import OBJECTIVES, Objective, Trained
    from transformer.objectives.classification import Classification
    from transformer.objectives.masked_lm import MaskedLM
    from transformer.objectives.next_token import NextToken
    from transformer.objectives.prefix_lm import PrefixLM
    from transformer.objectives.seq2seq import Seq2Seq
    from transformer.objectives.span_corruption import SpanCorruption
    from transformer.ops.attention import dot_product_attention
    from transformer.ops.bias import AlibiBias, BiasDescription, T5Bias
    from transformer.ops.masks import AttentionMask, BlockPattern
    from transformer.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, Schedule
    from transformer.optimizers.adafactor import Adafactor
    from transformer.optimizers.adamw import AdamW
    from transformer.optimizers.lion import Lion
    from transformer.optimizers.muon import Muon
    from transformer.parallel_config import ParallelConfig
    from transformer.runs.saved import Loaded, load
    from transformer.schedules.constant import ConstantSchedule
    from transformer.schedules.cosine import CosineSchedule
    from transformer.schedules.inverse_sqrt import InverseSqrtSchedule
    from transformer.schedules.linear import LinearSchedule
    from transformer.schedules.wsd import WSDSchedule
    from transformer.types import Batch, LabelledBatch, Loss, PairBatch, UserError

__version__ = "0.1.0"

_NAMES = {
    "config": "Config DataConfig TrainingConfig",
    "data.tokenizers": "Tokenizer",
    "generation.generate": "Generated Generator generate stream",
    "generation.sampling": "SamplingConfig",
    "generation.translate": "translate",
    "kinds": "Family Kind",
    "layers.attention": "Attention",
    "layers.block": "Block BlockCache",
    "layers.cache": "KVCache MemoryCache",
    "layers.experts": "MixtureOfExperts",
    "layers.feed_forward": "FeedForward",
    "model_config": "AttentionConfig BlockConfig FeedForwardConfig ModelConfig NormConfig PositionConfig",
    "models.classifier": "Classifier",
    "models.decoder": "Decoder",
    "models.encoder": "Encoder",
    "models.encoder_decoder": "EncoderDecoder",
    "models.init": "init_params",
    "objective": "OBJECTIVES Objective Trained",
    "objectives.classification": "Classification",
    "objectives.masked_lm": "MaskedLM",
    "objectives.next_token": "NextToken",
    "objectives.prefix_lm": "PrefixLM",
    "objectives.seq2seq": "Seq2Seq",
    "objectives.span_corruption": "SpanCorruption",
    "ops.attention": "dot_product_attention",
    "ops.bias": "AlibiBias BiasDescription T5Bias",
    "ops.masks": "AttentionMask BlockPattern",
    "optimizer": "OPTIMIZERS SCHEDULES Optimizer Schedule",
    "optimizers.adafactor": "Adafactor",
    "optimizers.adamw": "AdamW",
    "optimizers.lion": "Lion",
    "optimizers.muon": "Muon",
    "parallel_config": "ParallelConfig",
    "runs.saved": "Loaded load",
    "schedules.constant": "ConstantSchedule",
    "schedules.cosine": "CosineSchedule",
    "schedules.inverse_sqrt": "InverseSqrtSchedule",
    "schedules.linear": "LinearSchedule",
    "schedules.wsd": "WSDSchedule",
    "types": "Batch LabelledBatch Loss PairBatch UserError",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """A name comes when it is asked for: a config needs no Flax, and layers need no Orbax."""
    if name not in _MODULES:
        raise AttributeError(f"module 'transformer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"transformer.{_MODULES[name]}"), name)
