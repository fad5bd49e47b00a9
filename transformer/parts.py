"""The parts of a config: its model and loss, and the steps that train it on devices. They read no data."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from transformer.config import Config
from transformer.data.tokenizers import Vocabulary
from transformer.layers.adapters import split
from transformer.layers.runtime import Runtime
from transformer.model_config import BlockConfig, ModelConfig
from transformer.models.init import initialized, initializer, made
from transformer.objective import Objective
from transformer.ops import dense_cpu, fused_loss, wide_product
from transformer.ops.attention import Request, recorded
from transformer.ops.ids import check_batch_ids
from transformer.ops.recompute import recomputed
from transformer.ops.ring import check_blocks
from transformer.ops.zigzag import balanced_order
from transformer.parallel.rules import RULES, is_names
from transformer.parallel.runner import Runner, check_divisible
from transformer.parallel.strategies import STRATEGIES
from transformer.training.flops import Flops, step_flops
from transformer.training.loss_scale import make_loss_scale
from transformer.training.metrics import Work
from transformer.training.optimizer import check_adapters, check_scanned_groups, freeze, make_optimizer, parameter_path
from transformer.training.spikes import make_spikes
from transformer.training.state import TrainState, create_state
from transformer.training.step import EvaluateStep, TrainStep
from transformer.types import Array, Loss, PyTree, Sizes, UserError
from transformer.validation import require

T = TypeVar("T")


class StandIn:
    """A vocabulary without a tokenizer: only its size is known."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.token_bytes = np.ones(vocab_size, np.int32)


def resolve(config: Config, tokenizer: Vocabulary) -> Config:
    """The config with the model's vocab_size and max_length filled in.

    The ids that the objective needs (a mask, sentinels) follow the tokenizer's.
    """
    model, objective = config.model, config.objective
    smallest = tokenizer.vocab_size + objective.extra_tokens(tokenizer, config.data.sequence_length)
    require(
        model.vocab_size == 0 or model.vocab_size >= smallest,
        f"model.vocab_size must be at least the tokenizer's {smallest}, got {model.vocab_size}; 0 takes the tokenizer's, "
        "with room for a mask or sentinels.",
    )
    model = dataclasses.replace(
        model,
        vocab_size=model.vocab_size or smallest,
        max_length=model.max_length or config.data.sequence_length + model.memory_length,
    )
    return dataclasses.replace(config, model=model)


def count_parameters(params: PyTree) -> int:
    """Number of elements in a tree of arrays."""
    return sum(x.size for x in jax.tree.leaves(params))


def initialize(objective: Objective, model: nn.Module, key: Array) -> tuple[PyTree, PyTree]:
    """Initial parameters of an objective's model (shapes, without a key), and the logical names of their axes.

    The package's models give the same parameters for rows of any length.
    """
    return initialized(model, key, *objective.init_inputs(1), method=objective.init_method)


def training_runtime(platform: str, fold: bool = True) -> Runtime:
    """How a trainer's model computes on devices of a platform (`jax.Device.platform`), over the current mesh.

    On a CPU, products have a special gradient, which may fold a batch's axes. On accelerators, the logits are read once. A GPU
    also recomputes activations and norms for their gradient: its compiler would store them in float32, a TPU's does not.
    """
    if platform == "cpu":
        return Runtime(dot_general=dense_cpu.dot_general if fold else wide_product.dot_general, sharding=RULES)
    runtime = Runtime(dot_general=wide_product.dot_general, summarize=fused_loss.summarize, sharding=RULES)
    return runtime if platform == "tpu" else dataclasses.replace(runtime, recompute=recomputed)


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The model of a resolved config and its loss; nothing is allocated.

    Example:
        >>> from transformer.model_config import ModelConfig
        >>> parts = Parts(resolve(Config(model=ModelConfig(num_layers=1, embed_dim=8)), StandIn(11)), StandIn(11))
        >>> parts.shapes["token_embedding"]["embedding"].shape
        (11, 8)
    """

    config: Config
    """A config from `resolve`."""
    vocabulary: Vocabulary
    """The run's tokenizer, or the properties of one that losses need."""
    runtime: Runtime | None = None
    """How the model computes; None means the modules' defaults."""
    module: nn.Module | None = None
    """A model to use instead of the config's."""
    class_names: tuple[str, ...] = ()
    """Class names of labelled texts."""
    own_batches: bool = False
    """Whether a caller supplies the batches; nothing is then promised about their segment ids."""

    @functools.cached_property
    def model(self) -> Any:
        """The linen module."""
        if self.module is not None:
            return self.module
        runtime, adapter = self.runtime, self.config.adapter
        if adapter.rank > 0:
            runtime = dataclasses.replace(runtime or Runtime(), adapter=adapter)
        model = self.config.objective.make_model(
            self.config.model, runtime, vocabulary=self.vocabulary, class_names=self.class_names
        )
        # Only the package's models take this promise; a user's own may not have the argument.
        return model.clone(max_segments=self.max_segments) if hasattr(model, "max_segments") else model

    @property
    def max_segments(self) -> int:
        """The promise about the segment ids of batches (`AttentionMask.max_segments`)."""
        return 0 if self.own_batches else self.config.objective.max_segments(self.config)

    @property
    def sizes(self) -> Sizes:
        """Sizes of the model's tables of ids."""
        own = self.config.objective.model_settings(self.vocabulary, self.class_names)
        return Sizes(self.config.model.vocab_size, own.get("source_vocab_size", 0), len(self.class_names))

    @functools.cached_property
    def _shapes_and_axes(self) -> tuple[PyTree, PyTree]:
        with self._explained():
            return made(self._init, None)

    @property
    def shapes(self) -> PyTree:
        """Shapes of the parameters."""
        return self._shapes_and_axes[0]

    @property
    def axes(self) -> PyTree:
        """Logical names of the parameters' axes."""
        return self._shapes_and_axes[1]

    @functools.cached_property
    def loss(self) -> Loss:
        """The training loss; frozen parameters have no gradient."""
        loss = self.config.objective.bind(self.model, self.vocabulary)
        return freeze(loss, self.config.optimizer, self.shapes)

    def init_params(self, key: Array) -> PyTree:
        """Initial parameters."""
        return made(self._init, key)[0]

    @functools.cached_property
    def _init(self) -> Callable[[Array], PyTree]:
        """Makes the parameters, with the names of their axes; its calls share one trace of the model."""
        objective, length = self.config.objective, 1 if self.module is None else self.config.data.sequence_length
        return initializer(self.model, *objective.init_inputs(length), method=objective.init_method)

    def check_batch(self, batch: T) -> T:
        """The batch on the host, if the loss can take it; else `UserError`."""
        self.config.objective.check_batch(batch)
        return check_batch_ids(self.sizes, batch, max_segments=self.max_segments)

    def trace(self, batch: PyTree = None) -> list[Request]:
        """Trace the loss of a batch (None: of full rows) as in training, and return its calls of attention."""
        config, loss, key = self.config, self.loss, jax.random.key(0)
        carry = jax.eval_shape(lambda: loss.init_carry(config.data.batch_size))
        with self._explained(), recorded() as requests:
            jax.eval_shape(
                lambda params, carry, batch: loss.loss(params, carry, batch, key, True),
                self.shapes,
                carry,
                config.objective.batch_shapes(config) if batch is None else batch,
            )
        return requests

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise UserError if a given model cannot be called like the objective's own."""
        objective = self.config.objective
        try:
            yield
        except Exception as error:
            if self.module is None or isinstance(error, UserError):
                raise
            text = str(error).strip().partition("\n")[0]
            raise UserError(
                f"model= must be a module that {type(objective).__name__} can train, called as its "
                f"{objective.model_class.__name__} is and with parameters alone; {type(self.module).__name__} gave "
                f"{type(error).__name__}: {text}"
            ) from error

    def changed(self, **model: object) -> "Parts":
        """The same arithmetic in another form: with these fields of the model's config, and logits computed at once."""
        config = dataclasses.replace(
            self.config,
            model=dataclasses.replace(self.config.model, **model),
            objective=self.config.objective.in_chunks(1),
        )
        return dataclasses.replace(self, config=config)

    def count_step(self, batch: PyTree) -> Flops:
        """Operations of a training step; the shapes of the batch suffice.

        The traced model is the plain one: chunks and recomputation change no count, and a fused kernel would only take longer to
        trace.
        """

        def in_plain(blocks: tuple[BlockConfig, ...]) -> tuple[BlockConfig, ...]:
            return tuple(
                dataclasses.replace(block, attention=dataclasses.replace(block.attention, implementation="xla"))
                for block in blocks
            )

        model = self.config.model
        plain = self.changed(first=in_plain(model.first), pattern=in_plain(model.pattern), remat="none")
        return step_flops(dataclasses.replace(plain, runtime=None).loss, self.shapes, batch)

    def measure_work(self, parts: int = 1) -> Callable[[Any], Work]:
        """The work of a training step, of which a process sees one of this many parts of the batch.

        Counted once for each shape of a batch, when the first one comes (`training.flops`).
        """
        counted: dict[Any, float] = {}

        def work(batch: Any) -> Work:
            read = getattr(batch, "read", ())  # a user's own batch does not say which fields are tokens
            shapes = tuple(x.shape for x in jax.tree.leaves(batch))
            if shapes not in counted:
                counted[shapes] = parts * self.count_step(batch).total
            return Work(parts * sum(tokens.size for tokens in read), counted[shapes])

        return work

    def describe_attention(self, platform: str) -> str:
        """The attention backends in training on a platform (`jax.devices()[0].platform`), for full rows."""
        config = self.config
        shards, context = STRATEGIES[config.parallel.strategy].shares(config.parallel)
        if context > 1:
            return "ring"
        plain = self.changed(scan_layers=True, remat="none")
        rows = max(1, config.data.batch_size // (shards * config.optimizer.accumulate_steps))
        data = dataclasses.replace(config.data, batch_size=rows, num_streams=0)
        optimizer = dataclasses.replace(config.optimizer, accumulate_steps=1)
        config = dataclasses.replace(plain.config, data=data, optimizer=optimizer)
        plain, platform = (
            dataclasses.replace(plain, config=config, runtime=None),
            {"gpu": "cuda"}.get(platform, platform),
        )

        def named(batch: Any) -> str:
            return " and ".join(dict.fromkeys(request.backend(platform) for request in plain.trace(batch)))

        batch = config.objective.batch_shapes(config)
        if not self.own_batches or not hasattr(batch, "segment_ids"):
            return named(batch)
        # A user's own rows may or may not have segment ids; that is known when they arrive.
        packed, whole = (named(batch._replace(segment_ids=ids)) for ids in (batch.inputs, None))
        return packed if packed == whole else f"{whole} for rows without segment ids, {packed} for others"


def check_devices(config: Config, mesh: Mesh | None = None) -> None:
    """Raise UserError unless devices, batch and model fit together, as far as the config shows; before any data is read."""
    runner = STRATEGIES[config.parallel.strategy]
    shards, context = runner.shares(config.parallel, mesh)
    if config.model.memory_length > 0:
        runner.check_memory()
    if context > 1:
        balanced_order(config.data.sequence_length, context)
        check_blocks(config.data.sequence_length, context)
        config.objective.check_context(config)
        _check_context(config.model)
    check_divisible(config.data.batch_size, shards, config.optimizer.accumulate_steps)


def _check_context(model: ModelConfig) -> None:
    """Raise UserError unless the positions of a row may be sharded, in another order."""
    patterns = {block.attention.pattern for block in model.block_counts}
    require(
        all(pattern.sees_all for pattern in patterns),
        "parallel.context needs dense attention (a window is fine), got "
        f"attention.pattern={', '.join(sorted(pattern.kind for pattern in patterns))}; "
        "set parallel.context=1.",
    )
    require(
        model.dropout == 0 and all(block.attention.dropout == 0 for block in model.block_counts),
        "parallel.context needs model.dropout=0 and attention.dropout=0: dropout depends on the index in an array, and rows "
        "are stored in another order; set them, or parallel.context=1.",
    )


class Steps:
    """The steps that train a resolved config on its devices; nothing is allocated on any of them.

    Args:
        config: a config from `resolve`.
        vocabulary: the run's tokenizer, or the properties of one that losses need.
        mesh: of devices, present or absent; None takes the devices of `config.parallel`.
        optimizer: used instead of the config's, learning rate included.
        model: a linen module to use instead of the config's.
        class_names: class names of labelled texts.
        own_batches: a caller supplies the batches; nothing is promised about their segment ids.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        mesh: Mesh | None = None,
        optimizer: optax.GradientTransformation | None = None,
        model: nn.Module | None = None,
        class_names: tuple[str, ...] = (),
        own_batches: bool = False,
    ) -> None:
        strategy = STRATEGIES[config.parallel.strategy]
        # The kernels for CPUs fold the batch and position axes, which would gather both over a context axis.
        _, context = strategy.shares(config.parallel, mesh)
        platform = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform
        runtime = training_runtime(platform, context == 1)
        self.parts = parts = Parts(config, vocabulary, runtime, model, class_names, own_batches)
        """The model and the loss."""
        frozen, trained = split(parts.shapes)
        if config.model.scan_layers and model is None:
            check_scanned_groups(config.optimizer, trained)
        check_adapters(config.adapter, trained)
        schedule = None
        if optimizer is None:
            optimizer, schedule = make_optimizer(config.optimizer, config.training.steps, trained)
        self.train_step = TrainStep(
            parts.loss,
            optimizer,
            schedule,
            accumulate_steps=config.optimizer.accumulate_steps,
            ema_decay=config.optimizer.ema_decay,
            skip_spikes=config.training.skip_spikes,
            axis_name=strategy.axis_name,
        )
        """The compiled step of the runner."""
        evaluate_step = EvaluateStep(parts.loss, strategy.axis_name)
        self.runner: Runner = strategy.make(
            config.parallel, self.train_step, evaluate_step, mesh=mesh, axes=parts.axes, row_order=balanced_order
        )
        self.runner.check_batch = parts.check_batch
        state = jax.eval_shape(self._make_state)._replace(frozen=frozen)
        self.state: TrainState = self.runner.abstract_state(state)
        """Shapes before the first step, with the shardings for restored checkpoints and for the loaded base."""

    def init_state(self, *params: PyTree) -> TrainState:
        """The state before the first step; no device ever holds more than its part.

        Given subtrees of parameters replace the initialised ones. With adapters, the state lacks the frozen parameters.
        """
        return self.runner.init_state(self._make_state, *params)

    def describe_whole(self) -> str:
        """Parameters that are whole on every device for lack of partition metadata; empty if nothing is sharded."""
        whole = [
            parameter_path(path)
            for path, names in jax.tree_util.tree_leaves_with_path(self.parts.axes, is_leaf=is_names)
            if len(names) == 0
        ]
        sizes = self.parts.config.parallel.sizes
        if not whole or all(sizes[name] == 1 for name in ("fsdp", "tensor", "expert")):
            return ""
        return f"without partition metadata, whole on every device: {', '.join(whole)}"

    def _make_state(self, params: PyTree | None = None) -> TrainState:
        config = self.parts.config
        # Adapters are float32 for any type of the base.
        model = dataclasses.replace(config.model, param_dtype="float32") if config.adapter.rank else config.model
        _, own = split(self.parts.init_params(jax.random.key(config.training.seed)))
        return create_state(
            own if params is None else {**own, **params},
            self.train_step.optimizer,
            jax.random.key(config.training.seed + 1),
            carry=self.parts.loss.init_carry(config.data.batch_size),
            ema=config.optimizer.ema_decay > 0,
            loss_scale=make_loss_scale(model),
            spikes=make_spikes(config.training.skip_spikes),
        )
