"""What a model is made of by kind: the families and bases of positions, norms, block patterns, attention backends and poolings.

Kinds are settings with pure functions of arrays. Parameters are made in the module that calls, by a function that it gives,
`parameter(name, shape, axes, *, fan_in=0, fill=None)`: normal with the standard deviation of the model's config (or
1 / sqrt(fan_in)), or all `fill`. `axes` are the logical names of its axes (`parallel.rules`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn

import jax.numpy as jnp

from transformer.kinds import Family, Kind
from transformer.types import Array
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.model_config import BlockConfig, ModelConfig

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
    """How a token's position enters a model. Each method leaves its argument as it is unless the kind has a use for it."""

    family = POSITIONS
    absolute: ClassVar[bool] = False
    """Whether vectors of positions are added to the embeddings, so that a row cannot continue another one."""
    between_tokens: ClassVar[bool] = False
    """Whether attention compares positions of queries and keys, which cross-attention has not in common."""

    # ---- Checks ------------------------------------------------------------------------------------------------------

    def check(self, config: "ModelConfig") -> None:
        """Raise UserError where the model around it does not fit."""
        for block in config.block_counts:
            if block.own_positions.within(self) is self:
                self.check_block(block, config.embed_dim)

    def check_block(self, block: "BlockConfig", embed_dim: int) -> None:
        """Raise UserError where a block whose attention uses it does not fit."""
        del block, embed_dim

    def check_own(self, block: "BlockConfig", embed_dim: int) -> None:
        """Raise UserError unless a block may have it as `own_positions`."""
        require(
            not self.absolute,
            f"{self.kind.capitalize()} positions are added to the embeddings of a model, a block cannot have its own.",
        )
        self.check_block(block, embed_dim)

    def check_length(self, max_length: int, length: int) -> None:
        """Raise ValueError unless it reaches `length` tokens in a model of `max_length`."""
        del max_length, length

    # ---- Of the model ------------------------------------------------------------------------------------------------

    def within(self, model: "Positions") -> "Positions":
        """What a block uses that has this as its own positions."""
        del model
        return self

    def num_parameters(self, config: "ModelConfig") -> int:
        """Parameters in each stack of blocks."""
        del config
        return 0

    def embed(self, x_BTD: Array, positions_BT: Array, max_length: int, parameter: Parameter) -> Array:
        """Token vectors, with those of their positions [#B, T] added."""
        del positions_BT, max_length, parameter
        return x_BTD

    def shared_bias(self, num_heads: int, bidirectional: bool, parameter: Parameter) -> Any:
        """A `BiasDescription` that all layers share, or None."""
        del num_heads, bidirectional, parameter

    # ---- In attention ------------------------------------------------------------------------------------------------

    def rotate(
        self, query_BTHK: Array, key_BSGK: Array, positions: Callable[[], tuple[Array, Array]]
    ) -> tuple[Array, Array]:
        """Queries and keys before a cache takes the keys; `positions()` gives those of both, [#B, T] and [#B, S]."""
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
        """Queries and keys as they are multiplied, keys of a cache included; the scale stays that of K elements."""
        del positions, embed_dim, parameter
        return query_BTHK, key_BSGK

    def bias(self, num_heads: int, shared: Any) -> Any:
        """A `BiasDescription` of the logits, or None; `shared` is what `shared_bias` gave.

        Raises:
            ValueError: there is a shared bias, and no use for it.
        """
        del num_heads
        if shared is not None:
            self.refuse_shared(shared)

    def refuse_shared(self, shared: Any) -> NoReturn:
        """Raise ValueError for a shared bias that is not used, or is missing."""
        raise ValueError(
            f"Positions of kind t5, and no others, need a relative_bias, got kind={self.kind!r} and "
            f"{type(shared).__name__}; a `Stack` makes one, `RelativeBias` too."
        )


@dataclasses.dataclass(frozen=True)
class Norm(Kind):
    """Normalisation of each sub-layer, and where it stands."""

    family = NORMS

    placement: Literal["pre", "post", "sandwich", "output"] = "pre"
    """Before each sub-layer; after the residual sum (post); before and after the sub-layer (sandwich); or of its output only,
    before the residual sum (output: OLMo 2)."""
    epsilon: float = 1e-5
    """Added to the variance."""

    def __post_init__(self) -> None:
        require(self.epsilon > 0, f"Norm.epsilon must be positive, got {self.epsilon}.")

    @property
    def before(self) -> bool:
        """Whether it normalises what a sub-layer reads."""
        return self.placement in ("pre", "sandwich")

    def normalize(self, x: Array, vector: Callable[[str, float], Array]) -> Array:
        """Normalise float32 vectors over the last axis; `vector(name, fill)` makes a parameter that broadcasts to them."""
        raise NotImplementedError(f"{type(self).__name__} must define normalize().")


@dataclasses.dataclass(frozen=True)
class Pattern(Kind):
    """Which blocks of keys a block of queries sees, after the Sparse Transformer (Child et al. 2019, section 4.2).

    One that does not see all has a `block_size` (tokens of a block) among its settings.
    """

    family = PATTERNS
    sees_all: ClassVar[bool] = False
    """Whether every block sees every other."""

    def restrict(self, mask: Any) -> Any:
        """An `AttentionMask` with this pattern too."""
        return dataclasses.replace(mask, pattern=self)

    def sees(self, query_blocks: Any, key_blocks: Any) -> Any:
        """Whether blocks with these numbers see these blocks; numpy or JAX integers that broadcast."""
        raise NotImplementedError(f"{type(self).__name__} must define sees().")


class AttentionCall(NamedTuple):
    """What attention is called with, after its checks; to choose a backend, shapes and dtypes of the arrays are enough."""

    query_BTHK: Any
    key_BSGK: Any
    value_BSGK: Any
    mask: Any
    """An `AttentionMask`."""
    bias: Any = None
    """Floating-point numbers [B|1, H|1, T, S], a `BiasDescription`, or None."""
    scale: float = 1.0
    logits_soft_cap: float = 0.0
    """0 means off."""
    dropout_rate: float = 0.0
    dropout_key: Any = None

    def demands(self) -> Iterator[tuple[str, str]]:
        """What not every backend can do: each name that `AttentionBackend.takes` may have, and its words for messages."""
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
    """A way to compute attention, which a config chooses by name. It must bring `compute`, and say what that `takes`."""

    family = BACKENDS
    takes: ClassVar[frozenset[str]] = frozenset()
    """What it honours: fields of an `AttentionMask`, bias, logits_soft_cap, dropout_rate. Calls with more are refused."""
    dtypes: ClassVar[tuple[str, ...]] = ()
    """Of queries, keys and values; none means any."""

    def compute(self, call: AttentionCall) -> Array:
        """Outputs [B, T, H, W] in the dtype of the queries; a query that sees no key gives zeros."""
        raise NotImplementedError(f"{type(self).__name__} must define compute().")

    def refusal(self, call: AttentionCall) -> str:
        """What it cannot honour, in words, or nothing; from what is known when tracing."""
        dtype = str(call.query_BTHK.dtype)
        fits = not self.dtypes or dtype in self.dtypes
        other = "" if fits else f"inputs of {dtype} ({' and '.join(self.dtypes)} only)"
        return next((words for name, words in call.demands() if name not in self.takes), other)

    def preferred(self, call: AttentionCall, platform: str) -> bool:
        """Whether `auto` takes it on a platform (cpu, cuda, tpu, ...), if it refuses nothing; by default never."""
        del call, platform
        return False

    def attend(self, call: AttentionCall) -> Array:
        """`compute`, in a program for whichever platforms have it."""
        return self.compute(call)

    def on(self, platform: str, call: AttentionCall) -> "AttentionBackend":
        """What computes a call on a platform: itself, unless it chooses among others."""
        del platform, call
        return self


@dataclasses.dataclass(frozen=True)
class Pooling(Kind):
    """How a classifier makes one vector of a text."""

    family = POOLINGS
    learned: ClassVar[bool] = False
    """Whether it uses learned scores."""

    def __call__(self, x_BTD: Array, valid_BT: Array, scores: Callable[[], Array]) -> Array:
        """`pool` in float32, and zeros for a row without a valid token; the result has the type of the hidden states."""
        pooled_BD = self.pool(x_BTD.astype(jnp.float32), valid_BT, scores)
        return jnp.where(jnp.any(valid_BT, axis=1, keepdims=True), pooled_BD, 0).astype(x_BTD.dtype)

    def pool(self, x_BTD: Array, valid_BT: Array, scores: Callable[[], Array]) -> Array:
        """The vector [B, D] of the valid ones of each row, float32; a row without any may give anything.

        Args:
            x_BTD: hidden states, float32.
            valid_BT: False for padding.
            scores: gives a learned score [B, T] for each of them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pool().")
