"""What is made of a config: its model resolved and initialised, its work, its attention, and the metrics of a split."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from transformer.config import Config
from transformer.data.tokenizers import Vocabulary, source_tokenizer
from transformer.evaluation.confusion import macro_f1
from transformer.layers.runtime import Runtime
from transformer.model_config import BlockConfig
from transformer.models.init import init_params
from transformer.objective import Objective
from transformer.ops import dense_cpu, wide_product
from transformer.ops.attention import recorded
from transformer.parallel.rules import RULES
from transformer.training.flops import Flops, step_flops
from transformer.training.metrics import Work, derive
from transformer.training.optimizer import freeze
from transformer.types import Loss, PyTree
from transformer.validation import require


def resolve(config: Config, tokenizer: Vocabulary, class_names: tuple[str, ...] = ()) -> Config:
    """The config with the model's vocab_size, max_length and num_classes filled in.

    After the tokenizer's entries come those that the objective needs (a mask, sentinels).
    """
    model, objective = config.model, config.objective
    smallest = tokenizer.vocab_size + objective.extra_tokens(tokenizer, config.data.sequence_length)
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
        source_vocab_size=0 if source_tokenizer(tokenizer) is tokenizer else source_tokenizer(tokenizer).vocab_size,
        **own,
    )
    return dataclasses.replace(config, model=model)


def training_runtime(cpu_kernels: bool) -> Runtime:
    """How a trainer's model computes: with products that suit the platform, over the mesh that is set."""
    return Runtime(dot_general=dense_cpu.dot_general if cpu_kernels else wide_product.dot_general, sharding=RULES)


def initialize(objective: Objective, model: nn.Module, key: Any) -> tuple[PyTree, PyTree]:
    """Initial parameters of an objective's model (their shapes, without a key), and the logical names of their axes."""
    return init_params(model, key, *((1, 1),) * objective.num_stacks, method=objective.init_method)


def count_parameters(params: PyTree) -> int:
    """Numbers in a tree of arrays."""
    return sum(x.size for x in jax.tree.leaves(params))


def describe_attention(config: Config, platform: str) -> str:
    """The attention backends of training on a platform (`jax.devices()[0].platform`) in rows of `data.sequence_length` tokens."""
    if config.parallel.context > 1:
        return "ring"
    model = config.objective.make_model(dataclasses.replace(config.model, scan_layers=True, remat="none"))
    params, _ = initialize(config.objective, model, None)
    loss = config.objective.bind(model, StandIn(config.model.vocab_size))
    batch = config.objective.batch_shapes(config)
    carry = jax.eval_shape(lambda: loss.init_carry(config.data.batch_size))
    with recorded() as requests:
        jax.eval_shape(functools.partial(_training_loss, loss), params, carry, batch, jax.random.key(0))
    backends = (request.backend({"gpu": "cuda"}.get(platform, platform)) for request in requests)
    return " and ".join(dict.fromkeys(backends))


def _training_loss(loss: Loss, params: PyTree, carry: PyTree, batch: Any, key: Any) -> Any:
    return loss.loss(params, carry, batch, key, True)


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

    def in_plain(blocks: tuple[BlockConfig, ...]) -> tuple[BlockConfig, ...]:
        return tuple(
            dataclasses.replace(block, attention=dataclasses.replace(block.attention, implementation="xla"))
            for block in blocks
        )

    model = config.model
    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(model, first=in_plain(model.first), pattern=in_plain(model.pattern), remat="none"),
        objective=config.objective.in_chunks(1),
    )
    loss = plain.objective.bind(plain.objective.make_model(plain.model), StandIn(config.model.vocab_size))
    return step_flops(freeze(loss, config.optimizer, params), params, batch)


def measure_work(config: Config, params: PyTree, parts: int = 1) -> Callable[[Any], Work]:
    """What a training step amounts to, of which a process sees one of so many parts of the batch.

    Counted once for each shape of a batch, when the first comes (`training.flops`).
    """
    counted: dict[Any, float] = {}

    def work(batch: Any) -> Work:
        read = batch.read
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
