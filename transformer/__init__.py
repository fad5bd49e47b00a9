"""A small Flax linen transformer library and trainer."""
# ruff: noqa: F401 (for type checkers, which do not see the lazy names)

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer.adapter_config import AdapterConfig
    from transformer.analysis.attention import AttentionMap, TextAttention
    from transformer.config import Config, DataConfig, TrainingConfig
    from transformer.data.batches import BatchData
    from transformer.data.datasets import Dataset, Reader
    from transformer.data.forms.examples import ExampleForm
    from transformer.data.source import ExampleSource, Record, Source
    from transformer.data.tokenizers import Tokenizer, Vocabulary
    from transformer.form import FORMS, Form, Shown
    from transformer.generation.beams import BeamConfig, Beams, beam_search
    from transformer.generation.generate import Generated, Generator, generate, stream
    from transformer.generation.likelihood import Scored
    from transformer.generation.prompts import unpad
    from transformer.generation.sampling import SamplingConfig
    from transformer.generation.translate import translate
    from transformer.kinds import Family, Kind
    from transformer.layers.attention import Attention
    from transformer.layers.block import Block, BlockCache
    from transformer.layers.cache import Cache, CrossAttentionCache, KVCache, TransformerXLMemory
    from transformer.layers.experts import MixtureOfExperts
    from transformer.layers.feed_forward import FeedForward
    from transformer.layers.runtime import Runtime
    from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
    from transformer.model_kinds import (
        BACKENDS,
        NORMS,
        PATTERNS,
        POOLINGS,
        POSITIONS,
        AttentionBackend,
        AttentionCall,
        Norm,
        Pattern,
        Pooling,
        Positions,
    )
    from transformer.models.classifier import Classifier
    from transformer.models.decoder import Decoder
    from transformer.models.embedder import Embedder
    from transformer.models.encoder import Encoder
    from transformer.models.encoder_decoder import EncoderDecoder
    from transformer.models.init import init_params
    from transformer.objective import OBJECTIVES, Objective
    from transformer.objectives.classification import Classification
    from transformer.objectives.masked_lm import MaskedLM
    from transformer.objectives.next_token import LanguageModel, NextToken
    from transformer.objectives.prefix_lm import PrefixLM
    from transformer.objectives.seq2seq import Seq2Seq
    from transformer.objectives.span_corruption import SpanCorruption
    from transformer.ops.attention import dot_product_attention
    from transformer.ops.bias import BiasDescription
    from transformer.ops.losses import LogitSummary
    from transformer.ops.masks import AttentionMask, BlockPattern
    from transformer.ops.norms.layer_norm import LayerNorm
    from transformer.ops.norms.rms_norm import RMSNorm
    from transformer.ops.patterns.dense import DensePattern
    from transformer.ops.patterns.fixed import FixedPattern
    from transformer.ops.patterns.strided import StridedPattern
    from transformer.ops.poolings.attention import AttentionPooling
    from transformer.ops.poolings.first import FirstPooling
    from transformer.ops.poolings.last import LastPooling
    from transformer.ops.poolings.max import MaxPooling
    from transformer.ops.poolings.mean import MeanPooling
    from transformer.ops.positions.alibi import AlibiBias, AlibiPositions
    from transformer.ops.positions.inherit import InheritPositions
    from transformer.ops.positions.learned import LearnedPositions
    from transformer.ops.positions.none import NoPositions
    from transformer.ops.positions.rotary import RotaryPositions
    from transformer.ops.positions.sinusoidal import SinusoidalPositions
    from transformer.ops.positions.t5 import T5Bias, T5Positions
    from transformer.ops.positions.transformer_xl import TransformerXLPositions
    from transformer.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, Schedule
    from transformer.optimizers.adafactor import Adafactor
    from transformer.optimizers.adamw import AdamW
    from transformer.optimizers.lion import Lion
    from transformer.optimizers.muon import Muon
    from transformer.parallel.rules import Sharding
    from transformer.parallel_config import ParallelConfig
    from transformer.runs.attention import attention_page
    from transformer.runs.report import report_page
    from transformer.runs.saved import Loaded, load
    from transformer.runs.train import Reached, train
    from transformer.schedules.constant import ConstantSchedule
    from transformer.schedules.cosine import CosineSchedule
    from transformer.schedules.inverse_sqrt import InverseSqrtSchedule
    from transformer.schedules.linear import LinearSchedule
    from transformer.schedules.wsd import WSDSchedule
    from transformer.tokenizer import TOKENIZERS, TokenizerKind
    from transformer.tracker import TRACKERS, Tracker
    from transformer.trained import Trained
    from transformer.training.state import TrainState
    from transformer.training.writers import Writer
    from transformer.types import (
        Batch,
        CheckpointableIterator,
        GeneratedTexts,
        Ids,
        LabelledBatch,
        Loss,
        PairBatch,
        Reading,
        Sizes,
        UserError,
    )

__version__ = "0.1.0"

_NAMES = {
    "adapter_config": "AdapterConfig",
    "analysis.attention": "AttentionMap TextAttention",
    "config": "Config DataConfig TrainingConfig",
    "data.batches": "BatchData",
    "data.datasets": "Dataset Reader",
    "data.forms.examples": "ExampleForm",
    "data.source": "ExampleSource Record Source",
    "data.tokenizers": "Tokenizer Vocabulary",
    "form": "FORMS Form Shown",
    "generation.beams": "BeamConfig Beams beam_search",
    "generation.generate": "Generated Generator generate stream",
    "generation.likelihood": "Scored",
    "generation.prompts": "unpad",
    "generation.sampling": "SamplingConfig",
    "generation.translate": "translate",
    "kinds": "Family Kind",
    "layers.attention": "Attention",
    "layers.block": "Block BlockCache",
    "layers.cache": "Cache KVCache CrossAttentionCache TransformerXLMemory",
    "layers.experts": "MixtureOfExperts",
    "layers.feed_forward": "FeedForward",
    "layers.runtime": "Runtime",
    "model_config": "AttentionConfig BlockConfig FeedForwardConfig ModelConfig",
    "model_kinds": "BACKENDS NORMS PATTERNS POOLINGS POSITIONS AttentionBackend AttentionCall Norm Pattern Pooling Positions",
    "models.classifier": "Classifier",
    "models.decoder": "Decoder",
    "models.embedder": "Embedder",
    "models.encoder": "Encoder",
    "models.encoder_decoder": "EncoderDecoder",
    "models.init": "init_params",
    "objective": "OBJECTIVES Objective",
    "objectives.classification": "Classification",
    "objectives.masked_lm": "MaskedLM",
    "objectives.next_token": "LanguageModel NextToken",
    "objectives.prefix_lm": "PrefixLM",
    "objectives.seq2seq": "Seq2Seq",
    "objectives.span_corruption": "SpanCorruption",
    "ops.attention": "dot_product_attention",
    "ops.bias": "BiasDescription",
    "ops.losses": "LogitSummary",
    "ops.masks": "AttentionMask BlockPattern",
    "ops.norms.layer_norm": "LayerNorm",
    "ops.norms.rms_norm": "RMSNorm",
    "ops.patterns.dense": "DensePattern",
    "ops.patterns.fixed": "FixedPattern",
    "ops.patterns.strided": "StridedPattern",
    "ops.poolings.attention": "AttentionPooling",
    "ops.poolings.first": "FirstPooling",
    "ops.poolings.max": "MaxPooling",
    "ops.poolings.last": "LastPooling",
    "ops.poolings.mean": "MeanPooling",
    "ops.positions.alibi": "AlibiBias AlibiPositions",
    "ops.positions.inherit": "InheritPositions",
    "ops.positions.learned": "LearnedPositions",
    "ops.positions.none": "NoPositions",
    "ops.positions.rotary": "RotaryPositions",
    "ops.positions.sinusoidal": "SinusoidalPositions",
    "ops.positions.t5": "T5Bias T5Positions",
    "ops.positions.transformer_xl": "TransformerXLPositions",
    "optimizer": "OPTIMIZERS SCHEDULES Optimizer Schedule",
    "optimizers.adafactor": "Adafactor",
    "optimizers.adamw": "AdamW",
    "optimizers.lion": "Lion",
    "optimizers.muon": "Muon",
    "parallel.rules": "Sharding",
    "parallel_config": "ParallelConfig",
    "runs.attention": "attention_page",
    "runs.report": "report_page",
    "tracker": "TRACKERS Tracker",
    "runs.saved": "Loaded load",
    "runs.train": "Reached train",
    "schedules.constant": "ConstantSchedule",
    "schedules.cosine": "CosineSchedule",
    "schedules.inverse_sqrt": "InverseSqrtSchedule",
    "schedules.linear": "LinearSchedule",
    "schedules.wsd": "WSDSchedule",
    "tokenizer": "TOKENIZERS TokenizerKind",
    "training.state": "TrainState",
    "training.writers": "Writer",
    "trained": "Trained",
    "types": "Batch CheckpointableIterator GeneratedTexts Ids LabelledBatch Loss PairBatch Reading Sizes UserError",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    """Import a name on first use: a config then needs no Flax, and layers need no Orbax."""
    if name not in _MODULES:
        raise AttributeError(f"module 'transformer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"transformer.{_MODULES[name]}"), name)
