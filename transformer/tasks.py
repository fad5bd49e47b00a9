"""What each kind of objective trains: the architecture, the linen module, the loss, the work, and the metrics of a split."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from transformer.config import Config
from transformer.data.tokenizers import PairTokenizer, Vocabulary
from transformer.evaluation.confusion import macro_f1
from transformer.model_config import ModelConfig
from transformer.models.classifier import Classifier
from transformer.models.decoder import Decoder
from transformer.models.encoder import Encoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.models.init import init_params
from transformer.ops import dense_cpu, wide_product
from transformer.ops.attention import select_implementation
from transformer.ops.bias import AlibiBias
from transformer.ops.masks import AttentionMask
from transformer.training.flops import Flops, step_flops
from transformer.training.metrics import Work, derive
from transformer.training.optimizer import freeze
from transformer.types import PairBatch, PyTree
from transformer.validation import require


def resolve(config: Config, tokenizer: Vocabulary, class_names: tuple[str, ...] = ()) -> Config:
    """The config with the model's vocab_size, max_length and num_classes filled in.

    An encoder's vocabulary has the mask after the tokenizer's entries, also where nothing is masked, so that a
    classifier fits the encoder it starts from. That of span corruption has as many sentinels there as a row has spans.
    """
    model, objective = config.model, config.objective
    smallest = tokenizer.vocab_size + (model.architecture == "encoder")
    smallest += objective.extra_tokens(tokenizer, config.data.sequence_length)
    require(
        model.architecture == objective.architecture,
        f"Training the {objective.kind} objective needs model.architecture={objective.architecture}, got "
        f"{model.architecture!r}.",
    )
    require(
        model.vocab_size == 0 or model.vocab_size >= smallest,
        f"model.vocab_size must be at least the tokenizer's {smallest}, got {model.vocab_size}; 0 takes the tokenizer's, "
        "with room for a mask or sentinels.",
    )
    own = {"bidirectional_prefix": False, "num_classes": 0, **objective.model_settings(class_names)}
    require(
        own["bidirectional_prefix"] or not model.bidirectional_prefix,
        f"model.bidirectional_prefix is for the prefix_lm objective, which sets it, got objective.kind={objective.kind}; leave "
        "it out.",
    )
    require(
        model.num_classes in (0, own["num_classes"]) or own["num_classes"] == 0,
        f"model.num_classes must be the data's {len(class_names)}, got {model.num_classes}; 0 takes the data's.",
    )
    model = dataclasses.replace(
        model,
        vocab_size=model.vocab_size or smallest,
        max_length=model.max_length or config.data.sequence_length + model.memory_length,
        source_vocab_size=tokenizer.source.vocab_size if isinstance(tokenizer, PairTokenizer) else 0,
        **own,
    )
    return dataclasses.replace(config, model=model)


def make_model(config: ModelConfig, *, cpu_kernels: bool | None = None) -> nn.Module:
    """The linen module of a resolved model config; `cpu_kernels` is `training.cpu_kernels`, None has every derivative."""
    products = {True: dense_cpu.dot_general, False: wide_product.dot_general, None: jax.lax.dot_general}
    dot_general = products[cpu_kernels]
    if config.architecture == "decoder":
        return Decoder(config, dot_general=dot_general)
    if config.architecture == "encoder_decoder":
        return EncoderDecoder(config, dot_general=dot_general)
    module = Classifier if config.num_classes > 0 else Encoder
    return module(config, dot_general=dot_general)


def make_params(model: nn.Module, key: Any) -> PyTree:
    """Initial parameters."""
    return init_params(model, key, *init_shapes(model), method=init_method(model))[0]


def init_shapes(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Shapes of the token arrays that a model reads."""
    return ((1, 1),) * (2 if isinstance(model, EncoderDecoder) else 1)


def init_method(model: nn.Module) -> str:
    """The method of a model that uses all its parameters."""
    return "logits" if isinstance(model, Encoder) else "__call__"


def count_parameters(params: PyTree) -> int:
    """Numbers in a tree of arrays."""
    return sum(x.size for x in jax.tree.leaves(params))


def describe_attention(config: Config, platform: str) -> str:
    """The attention backends of training on a platform (`jax.devices()[0].platform`) in rows of `data.sequence_length` tokens."""
    if config.parallel.context > 1:
        return "ring"
    model, T, names = config.model, config.data.sequence_length, []
    S, kind = T + model.memory_length, model.positions.kind
    bias = AlibiBias(None) if kind in ("alibi", "t5") else None  # that there is one is all that counts
    # By positions, of which a pattern sees blocks.
    placed = config.objective.reads == "text" and model.architecture != "encoder_decoder"

    def ids(length: int) -> Any:
        return jax.ShapeDtypeStruct((1, length), np.int32)

    def array(length: int, heads: int, width: int) -> Any:
        return jax.ShapeDtypeStruct((1, length, heads, width), model.dtype)

    for attention in (block.attention for block in model.pattern):
        head_dim = attention.resolved_head_dim(model.embed_dim)
        width = head_dim + (model.embed_dim if kind == "transformer_xl" else 0)
        picked = select_implementation(
            {"gpu": "cuda"}.get(platform, platform),
            array(T, attention.num_heads, width),
            array(S, attention.kv_heads, width),
            array(S, attention.kv_heads, head_dim),
            mask=AttentionMask(
                causal=model.architecture != "encoder",
                window=attention.window,
                query_segment_ids=ids(T),
                key_segment_ids=ids(S),
                query_positions=ids(T) if placed and attention.pattern != "dense" else None,
                key_prefix=ids(S) if model.bidirectional_prefix else None,
                query_offset=ids(1) if model.memory_length > 0 else None,
            ),
            bias=bias,
            logits_soft_cap=attention.logits_soft_cap,
            dropout_rate=attention.dropout,
        )
        names.append(picked if attention.implementation == "auto" else attention.implementation)
    return " and ".join(dict.fromkeys(names))


class StandIn:
    """The vocabulary of a tokenizer that is not there: only its size is known."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.token_bytes = np.ones(vocab_size, np.int32)


def count_step(config: Config, params: PyTree, batch: PyTree) -> Flops:
    """Operations of a training step of a resolved config; of parameters and batch, shapes are enough.

    Traced is the plain model: what is saved by computing a part at a time, or again, changes no count, and a fused kernel would
    only take longer to trace. Frozen parameters have no gradient.
    """
    pattern = tuple(
        dataclasses.replace(block, attention=dataclasses.replace(block.attention, implementation="xla"))
        for block in config.model.pattern
    )
    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pattern=pattern, remat="none"),
        objective=config.objective.in_chunks(1),
    )
    loss = plain.objective.bind(make_model(plain.model), StandIn(config.model.vocab_size))
    return step_flops(freeze(loss, config.optimizer, params), params, batch)


def measure_work(config: Config, params: PyTree, parts: int = 1) -> Callable[[Any], Work]:
    """What a training step amounts to, of which a process sees one of so many parts of the batch.

    Counted once for each shape of a batch, when the first comes (`training.flops`).
    """
    counted: dict[Any, float] = {}

    def work(batch: Any) -> Work:
        read = (batch.source, batch.inputs) if isinstance(batch, PairBatch) else (batch.inputs,)
        shapes = tuple(tokens.shape for tokens in read)
        if shapes not in counted:
            counted[shapes] = parts * count_step(config, params, batch).total
        return Work(parts * sum(tokens.size for tokens in read), counted[shapes])

    return work


def split_metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of the summed statistics of a whole split."""
    metrics = derive(sums)
    if "confusion" in sums:
        metrics["macro_f1"] = macro_f1(np.asarray(sums["confusion"]))
    return metrics
