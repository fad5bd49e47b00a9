"""Types shared by every package: the dimension key, batches, and errors that a user can fix.

Dimension key, used in signatures and as suffixes of variable names (`query_BTHK`):

    B batch               T query positions      S key positions        D embed_dim
    H query heads         G key/value heads      K head_dim             F feed-forward hidden
    V vocabulary          L layers               P cache or memory      N rows, B and T folded
    E experts             A experts of a token   R rows for experts, N times A
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

Array = Any  # a jax.Array, a tracer or a numpy array; its shape is in the name's suffix or in jaxtyping
PyTree = Any
Leaf = Any  # an array field of a pytree: jax also puts tracers, shapes, shardings and axis numbers there
Json = Any  # as `json.loads` returns it: None, a truth value, a number, a text, a list or a dictionary
Statistics = dict[str, Array]
"""Additive statistics: scalars that add exactly over micro-batches, devices, hosts and batches."""


class UserError(ValueError):
    """Bad input: the message states the invariant, the value and the remedy; the command line exits with 2."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run; the message says what was saved and how to resume. The command line exits with 128 + `number`.

    Args:
        number: of the signal.
        message: for the user.
        agreed: all processes of the run stopped at the same step, and saved it.
    """

    def __init__(self, number: int, message: str, *, agreed: bool = False) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_code = 128 + number
        self.agreed = agreed


class Sizes(NamedTuple):
    """Sizes of a model's tables of ids."""

    vocab_size: int
    source_vocab_size: int = 0
    """Size of a separate vocabulary for sources."""
    num_classes: int = 0


class Ids(NamedTuple):
    """An array of a batch whose values must be at least 0 and below `size`, except where their weight is 0."""

    name: str
    values: Array
    size: int
    weights: Array | None = None
    kind: str = "Tokens"
    limit: str = "vocab_size"
    """The setting with the size."""
    remedy: str = "; encode it with the model's own tokenizer"
    """The end of the error message."""


def _ones(values: Array) -> Array:
    """An array of ones, int32, of the same shape. (Without NumPy: importing it would slow down the command line.)"""
    return (values * 0 + 1).astype("int32")


def _real(segment_ids: Array) -> Array:
    """1 for tokens, 0 for padding, float32."""
    return (segment_ids != 0).astype("float32")


def _positions(segment_ids: Array) -> Array:
    """Positions from 0 within each segment, int32."""
    numpy = segment_ids.__array_namespace__()  # the array's own library
    index = _ones(segment_ids).cumsum(axis=-1, dtype="int32") - 1
    new = numpy.concatenate([index[:, :1] == 0, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - numpy.maximum.accumulate(numpy.where(new, index, 0), axis=1)


class Batch(NamedTuple):
    """A batch of rows for a language model; every field has shape [B, T].

    Padding has `segment_ids == 0` and `weights == 0`. Tokens attend only within their segment. None for segment ids means that
    every row is one document without padding: attention then needs fewer conditions, and any fused kernel supports it.
    """

    inputs: Array  # int32, the input tokens
    targets: Array  # int32, the token that follows each input
    weights: Array  # float32, weight of each target in the loss
    segment_ids: Array  # int32, 1, 2, ... for the documents packed in a row, 0 for padding; or None
    positions: Array  # int32, from 0 within each segment; in continued rows, within each document

    @classmethod
    def of(cls, inputs: Array, targets: Array, **others: Array) -> "Batch":
        """A batch of rows without padding. With `segment_ids`, tokens of segment 0 have weight 0, and positions restart.

        Given fields stay unchanged.
        """
        ids = others.get("segment_ids")
        whole = ids if ids is not None and ids.shape == inputs.shape else _ones(inputs)
        return cls(inputs, targets, _real(whole), None, _positions(whole))._replace(**others)

    @property
    def read(self) -> tuple[Array, ...]:
        """The input tokens of the model."""
        return (self.inputs,)

    def ids(self, sizes: Sizes) -> tuple[Ids, ...]:
        """The arrays that must hold ids of a model with these `Sizes`."""
        return Ids("inputs", self.inputs, sizes.vocab_size), Ids(
            "targets", self.targets, sizes.vocab_size, self.weights
        )


class LabelledBatch(NamedTuple):
    """A batch of texts, each with one class.

    Rows that fill up a batch have `weights == 0`; they and padding have `segment_ids == 0`.
    """

    inputs: Array  # int32 [B, T], the input tokens
    segment_ids: Array  # int32 [B, T], 1 for tokens, 0 for padding; or None, where there is no padding
    labels: Array  # int32 [B], the class of each text
    weights: Array  # float32 [B], weight of each text in the loss

    @classmethod
    def of(cls, inputs: Array, labels: Array, **others: Array) -> "LabelledBatch":
        """A batch of whole rows without padding, except for the given fields."""
        return cls(inputs, None, labels, _ones(labels).astype("float32"))._replace(**others)

    @property
    def read(self) -> tuple[Array, ...]:
        """The input tokens of the model."""
        return (self.inputs,)

    def ids(self, sizes: Sizes) -> tuple[Ids, ...]:
        """The arrays that must hold ids of a model with these `Sizes`."""
        labels = Ids("labels", self.labels, sizes.num_classes, self.weights, "Labels", "num_classes", "")
        return Ids("inputs", self.inputs, sizes.vocab_size), labels


class PairBatch(NamedTuple):
    """A batch of sources and targets, one pair per row.

    Rows that fill up a batch have weights of 0; they and padding have segment ids of 0.
    """

    source: Array  # int32 [B, S], the tokens of the source
    source_segment_ids: Array  # int32 [B, S], 1 for tokens, 0 for padding; or None, where there is no padding
    inputs: Array  # int32 [B, T], the target tokens as input: end-of-text, then all but the last
    targets: Array  # int32 [B, T], the token that follows each input; the last is end-of-text
    weights: Array  # float32 [B, T], weight of each target in the loss
    segment_ids: Array  # int32 [B, T], 1 for tokens, 0 for padding

    @classmethod
    def of(cls, source: Array, inputs: Array, targets: Array, **others: Array) -> "PairBatch":
        """A batch of pairs without padding. With `segment_ids`, targets of segment 0 have weight 0.

        Given fields stay unchanged.
        """
        ids = others.get("segment_ids")
        return cls(source, None, inputs, targets, _real(_ones(inputs) if ids is None else ids), None)._replace(**others)

    @property
    def read(self) -> tuple[Array, ...]:
        """The input tokens of the model."""
        return self.source, self.inputs

    def ids(self, sizes: Sizes) -> tuple[Ids, ...]:
        """The arrays that must hold ids of a model with these `Sizes`."""
        size = sizes.vocab_size
        source = Ids("source", self.source, sizes.source_vocab_size or size)
        return Ids("inputs", self.inputs, size), source, Ids("targets", self.targets, size, self.weights)


Noise = Callable[[Batch, int, tuple[int, ...]], None]
"""Changes row `row` of a batch in place; its random numbers depend only on the row's position in the data."""

LossOutput = tuple[tuple[Array, Array], tuple[PyTree, Statistics]]


class Loss(NamedTuple):
    """The loss of a model: `loss(...)` summed over the batch, divided by `weight(batch)`, which is known before the gradient."""

    weight: Callable[[Any], Array]
    """`batch -> weight_sum`, a float32 scalar that does not depend on the parameters."""
    loss: Callable[[PyTree, PyTree, Any, Array, bool], LossOutput]
    """`(params, carry, batch, key, train) -> (loss_sum, weight_sum), (carry, statistics)`."""
    init_carry: Callable[[int], PyTree] = lambda rows: ()
    """`rows -> carry` before the first batch of this many rows, the first axis of its arrays."""


class GeneratedTexts(NamedTuple):
    """The texts that a trained model generates from one prompt."""

    prompt: str
    """As the model read it, if the texts continue it; else empty."""
    texts: tuple[str, ...]
    """Continuations of the prompt, or texts made from it, such as translations."""


class Reading(NamedTuple):
    """How a trained model reads one text, to inspect its attention."""

    ids: Mapping[str, Array]
    """The tokens of each stack (`encoder`, `decoder`), int32 [n]."""
    inputs: tuple[Array, ...]
    """Positional arguments of the model's method."""
    options: Mapping[str, Array] = {}
    """Its keyword arguments."""
    method: str = "__call__"
    predicts: str = ""
    """What the logits predict, such as `next token`; empty if there are none."""
    of: str = ""
    """The stack whose tokens have one row of logits each; empty: the whole text has one row."""
    first: int = 0
    """The first token with a meaningful row."""
    ahead: int = 1
    """Offset from a token to the one that its row predicts: 1 is the next, 0 itself."""
    logits: Callable[[Any, PyTree, Array], Array] = lambda model, params, output: output[0]
    """`(model, params, output) -> logits` [n, V], from the method's output."""


@runtime_checkable
class CheckpointableIterator(Protocol):
    """An iterator over batches whose state can be saved and restored exactly (a Grain iterator is one)."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]:
        """A JSON-serialisable description of the batches consumed so far."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a saved `state`: the next batch is the one that followed it."""
        ...
