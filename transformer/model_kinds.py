"""Families and base classes of a model's kinds: positions, norms, block patterns, attention backends and poolings.

Kinds are settings with pure functions of arrays. The calling module makes their parameters through a function that it passes,
`parameter(name, shape, axes, *, fan_in=0, fill=None)`. Initial values are normal with the config's standard deviation (or
1 / sqrt(fan_in)), or all `fill`. `axes` are the logical names of the axes (`parallel.rules`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, NoReturn

import jax.numpy as jnp

from transformer.kinds import Family, Kind
from transformer.types import Array
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.model_config import BlockConfig, ModelConfig
    from transformer.ops.bias import BiasDescription
    from transformer.ops.masks import AttentionMask

Parameter = Callable[..., Array]


def _family(section: str, package: str, *names: str, field: str = "") -> Family:
    return Family(section, {name: f"transformer.ops.{package}.{name}" for name in names}, field)


POSITIONS = _family(
    "model.positions",
    "positions",
    *("rotary", "none", "learned", "sinusoidal", "alibi", "t5", "transformer_xl", "inherit"),
)
NORMS = _family("model.norm", "norms", "layer_norm", "rms_norm")
PATTERNS = _family("model.attention.pattern", "patterns", "dense", "strided", "fixed")
BACKENDS = _family(
    "model.attention",
    "backends",
    *("auto", "xla", "blockwise", "splash", "cudnn"),
    field="model.attention.implementation",
)
POOLINGS = _family("model.pooling", "poolings", "mean", "max", "first", "last", "attention")


@dataclasses.dataclass(frozen=True)
class Positions(Kind):
    """How positions enter a model. Each method returns its argument unchanged unless the kind overrides it."""

    family = POSITIONS
    absolute: ClassVar[bool] = False
    """Whether position vectors are added to the embeddings; a row then cannot continue another one."""
    between_tokens: ClassVar[bool] = False
    """Whether attention compares positions of queries and keys; cross-attention cannot, across two sequences."""

    # ---- Checks ------------------------------------------------------------------------------------------------------

    def check(self, config: "ModelConfig") -> None:
        """Raise UserError if the model's config does not fit."""
        for block in config.block_counts:
            if block.own_positions.within(self) is self:
                self.check_block(block, config.embed_dim)

    def check_block(self, block: "BlockConfig", embed_dim: int) -> None:
        """Raise UserError if a block with these positions does not fit."""
        del block, embed_dim

    def check_own(self, block: "BlockConfig", embed_dim: int) -> None:
        """Raise UserError unless a block may have these as `own_positions`."""
        require(
            not self.absolute,
            f"{self.kind.capitalize()} positions are added to the embeddings of a model, a block cannot have its own.",
        )
        self.check_block(block, embed_dim)

    def check_length(self, max_length: int, length: int) -> None:
        """Raise ValueError unless the positions are defined for `length` tokens in a model of `max_length`."""
        del max_length, length

    # ---- Of the model ------------------------------------------------------------------------------------------------

    def within(self, model: "Positions") -> "Positions":
        """The positions of a block with these as its own."""
        del model
        return self

    def num_parameters(self, config: "ModelConfig") -> int:
        """Parameters in each stack of blocks."""
        del config
        return 0

    def embed(self, x_BTD: Array, positions_BT: Array, max_length: int, parameter: Parameter) -> Array:
        """Token vectors plus the vectors of their positions [#B, T]."""
        del positions_BT, max_length, parameter
        return x_BTD

    def shared_bias(self, num_heads: int, bidirectional: bool, parameter: Parameter) -> "BiasDescription | None":
        """A `BiasDescription` that all layers share, or None."""
        del num_heads, bidirectional, parameter

    # ---- In attention ------------------------------------------------------------------------------------------------

    def rotate(
        self, query_BTHK: Array, key_BSGK: Array, positions: Callable[[], tuple[Array, Array]]
    ) -> tuple[Array, Array]:
        """Queries and keys, before a cache stores the keys; `positions()` gives the positions of both, [#B, T] and [#B, S]."""
        del positions
        return query_BTHK, key_BSGK

    def extend(
        self,
        query_BTHK: Array,
        key_BSGK: Array,
        positions: Callable[[], tuple[Array, Array]],
        embed_dim: int,
        parameter: Parameter,
    ) -> tuple[Array, Array]:
        """Queries and keys as multiplied, with the keys of a cache; the scale is computed from K elements."""
        del positions, embed_dim, parameter
        return query_BTHK, key_BSGK

    def bias(self, num_heads: int, shared: "BiasDescription | None") -> "BiasDescription | None":
        """A `BiasDescription` of the logits, or None; `shared` is the result of `shared_bias`.

        Raises:
            ValueError: a shared bias was given, but the kind does not use it.
        """
        del num_heads
        if shared is not None:
            self.refuse_shared(shared)

    def refuse_shared(self, shared: object) -> NoReturn:
        """Raise ValueError for a shared bias that is unused or missing."""
        raise ValueError(
            f"Positions of kind t5, and no others, need a relative_bias, got kind={self.kind!r} and "
            f"{type(shared).__name__}; a `Stack` makes one, `RelativeBias` too."
        )


@dataclasses.dataclass(frozen=True)
class Norm(Kind):
    """Normalisation of each sub-layer, and its placement."""

    family = NORMS

    placement: Literal["pre", "post", "sandwich", "output"] = "pre"
    """Before each sub-layer (pre); after the residual sum (post); before and after the sub-layer (sandwich); or on its output
    only, before the residual sum (output: OLMo 2)."""
    epsilon: float = 1e-5
    """Added to the variance."""

    def __post_init__(self) -> None:
        require(self.epsilon > 0, f"Norm.epsilon must be positive, got {self.epsilon}.")

    @property
    def before(self) -> bool:
        """Whether it normalises the inputs of sub-layers."""
        return self.placement in ("pre", "sandwich")

    def normalize(self, x: Array, vector: Callable[[str, float], Array]) -> Array:
        """Normalise float32 vectors over the last axis; `vector(name, fill)` makes a parameter that broadcasts to them."""
        raise NotImplementedError(f"{type(self).__name__} must define normalize().")


@dataclasses.dataclass(frozen=True)
class Pattern(Kind):
    """The blocks of keys that a block of queries sees, after the Sparse Transformer (Child et al. 2019, section 4.2).

    Patterns other than dense have a `block_size` (tokens per block) among their settings.
    """

    family = PATTERNS
    sees_all: ClassVar[bool] = False
    """Whether every block sees all blocks."""

    def restrict(self, mask: "AttentionMask") -> "AttentionMask":
        """An `AttentionMask` with this pattern added."""
        return dataclasses.replace(mask, pattern=self)

    def sees(self, query_blocks: Array, key_blocks: Array) -> Array:
        """Whether blocks with these numbers see these blocks of keys; numpy or JAX integers that broadcast."""
        raise NotImplementedError(f"{type(self).__name__} must define sees().")


class AttentionCall(NamedTuple):
    """The arguments of attention, after its checks; shapes and dtypes of the arrays suffice to choose a backend."""

    query_BTHK: Array
    key_BSGK: Array
    value_BSGK: Array
    mask: "AttentionMask"
    """An `AttentionMask`."""
    bias: "Array | BiasDescription | None" = None
    """Floating-point numbers [B|1, H|1, T, S], a `BiasDescription`, or None."""
    scale: float = 1.0
    logits_soft_cap: float = 0.0
    """0 means off."""
    dropout_rate: float = 0.0
    dropout_key: Array = None

    def demands(self) -> Iterator[tuple[str, str]]:
        """Demands of this call that some backends lack: a name for `AttentionBackend.takes`, and words for messages."""
        if self.dropout_rate > 0:
            yield "dropout_rate", f"dropout_rate={self.dropout_rate}"
        if self.mask.visible is not None:
            yield "visible", "an array as mask (an AttentionMask describes causal masks, windows, segments and lengths)"
        if self.bias is not None:
            yield "bias", "a bias"
        for field in dataclasses.fields(self.mask):
            value = getattr(self.mask, field.name)
            said = value is not None if field.default is None else value != field.default
            if said and field.name != "visible" and not field.metadata.get("promise"):
                yield field.name, f"mask.{field.name}"
        if self.logits_soft_cap > 0:
            yield "logits_soft_cap", f"logits_soft_cap={self.logits_soft_cap}"


@dataclasses.dataclass(frozen=True)
class AttentionBackend(Kind):
    """An implementation of attention, chosen by name in a config. It defines `compute`, and lists in `takes` its features."""

    family = BACKENDS
    takes: ClassVar[frozenset[str]] = frozenset()
    """Supported features: fields of an `AttentionMask`, bias, logits_soft_cap, dropout_rate. Other calls are refused."""
    dtypes: ClassVar[tuple[str, ...]] = ()
    """Supported types of queries, keys and values; empty means any."""

    def compute(self, call: AttentionCall) -> Array:
        """Outputs [B, T, H, W] in the dtype of the queries; a query that sees no key gives zeros."""
        raise NotImplementedError(f"{type(self).__name__} must define compute().")

    def refusal(self, call: AttentionCall) -> str:
        """The unsupported part of a call, in words, or an empty string; from static information."""
        dtype = str(call.query_BTHK.dtype)
        fits = not self.dtypes or dtype in self.dtypes
        other = "" if fits else f"inputs of {dtype} ({' and '.join(self.dtypes)} only)"
        return next((words for name, words in call.demands() if name not in self.takes), other)

    def preferred(self, call: AttentionCall, platform: str) -> bool:
        """Whether `auto` picks it on a platform (cpu, cuda, tpu, ...), unless it refuses the call; by default never."""
        del call, platform
        return False

    def attend(self, call: AttentionCall) -> Array:
        """`compute`, in a program for all platforms that support it."""
        return self.compute(call)

    def on(self, platform: str, call: AttentionCall) -> "AttentionBackend":
        """The backend that computes a call on a platform: itself, unless it chooses among others."""
        del platform, call
        return self


@dataclasses.dataclass(frozen=True)
class Pooling(Kind):
    """How a classifier reduces a text's hidden states to one vector."""

    family = POOLINGS
    learned: ClassVar[bool] = False
    """Whether it uses learned scores."""

    def __call__(self, x_BTD: Array, valid_BT: Array, scores: Callable[[], Array]) -> Array:
        """`pool` in float32, and zeros for a row without a valid token; the result has the type of the hidden states."""
        pooled_BD = self.pool(x_BTD.astype(jnp.float32), valid_BT, scores)
        return jnp.where(jnp.any(valid_BT, axis=1, keepdims=True), pooled_BD, 0).astype(x_BTD.dtype)

    def pool(self, x_BTD: Array, valid_BT: Array, scores: Callable[[], Array]) -> Array:
        """The pooled vector [B, D] of each row's valid tokens, float32; arbitrary for a row without any.

        Args:
            x_BTD: hidden states, float32.
            valid_BT: False for padding.
            scores: returns a learned score [B, T] per token.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pool().")
