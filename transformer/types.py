"""The vocabulary shared by every package: the dimension key, the batch, and what ends a run that a user can explain.

Dimension key, used in signatures and as suffixes of variable names (`query_BTHK`):

    B batch               T query positions      S key positions        D embed_dim
    H query heads         G key/value heads      K head_dim             F feed-forward hidden
    V vocabulary          L layers               P cache or recurrence  N rows, B and T folded
    E experts             A experts of a token   R rows for experts, N times A
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

Array = Any  # a jax.Array, a tracer or a numpy array; shapes stand in the suffix or in jaxtyping
PyTree = Any
Statistics = dict[str, Array]
"""Additive statistics: scalars that add exactly over micro-batches, devices, hosts and batches."""


class UserError(ValueError):
    """Bad input: the message states the invariant, the value and the remedy; the command line exits with 2."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run; the message says what was saved and how to go on, the command line exits with 128 + `number`.

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
    """How many ids a model knows."""

    vocab_size: int
    source_vocab_size: int = 0
    """Of sources with a vocabulary of their own."""
    num_classes: int = 0


class Ids(NamedTuple):
    """An array of a batch whose values must be at least 0 and below `size`, where their weight is not 0."""

    name: str
    values: Array
    size: int
    weights: Array | None = None
    kind: str = "Tokens"
    limit: str = "vocab_size"
    """The setting that is the size."""
    remedy: str = "; encode it with the model's own tokenizer"
    """The end of the message about a wrong one."""


def _ones(values: Array) -> Array:
    """As many ones, int32. (Without NumPy, whose import no command line waits for.)"""
    return (values * 0 + 1).astype("int32")


def _real(segment_ids: Array) -> Array:
    """1 where there is a token, 0 where there is padding, float32."""
    return (segment_ids != 0).astype("float32")


def _positions(segment_ids: Array) -> Array:
    """From 0 within each segment, int32."""
    numpy = segment_ids.__array_namespace__()  # of the library that the array is of
    index = _ones(segment_ids).cumsum(axis=-1, dtype="int32") - 1
    new = numpy.concatenate([index[:, :1] == 0, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - numpy.maximum.accumulate(numpy.where(new, index, 0), axis=1)


class Batch(NamedTuple):
    """A batch of rows for a language model; every field has shape [B, T].

    Padding has `segment_ids == 0` and `weights == 0`. Tokens attend only within their segment. No segment ids, None, mean that
    every row is one document without padding: attention then has less to look at, and any fused kernel takes it.
    """

    inputs: Array  # int32, the tokens read
    targets: Array  # int32, the token that follows each input
    weights: Array  # float32, how much each target counts in the loss
    segment_ids: Array  # int32, 1, 2, ... for the documents packed in a row, 0 for padding; or None
    positions: Array  # int32, from 0 within each segment; where rows are continued, within each document

    @classmethod
    def of(cls, inputs: Array, targets: Array, **others: Array) -> "Batch":
        """A batch of rows without padding. With `segment_ids`, tokens of segment 0 have weight 0, and positions restart.

        Fields that are given stay as they are.
        """
        ids = others.get("segment_ids")
        whole = ids if ids is not None and ids.shape == inputs.shape else _ones(inputs)
        return cls(inputs, targets, _real(whole), None, _positions(whole))._replace(**others)

    @property
    def read(self) -> tuple[Array, ...]:
        """The tokens that the model reads."""
        return (self.inputs,)

    def ids(self, sizes: Any) -> tuple[Ids, ...]:
        """What must be ids of a model of these `Sizes`."""
        return Ids("inputs", self.inputs, sizes.vocab_size), Ids(
            "targets", self.targets, sizes.vocab_size, self.weights
        )


class LabelledBatch(NamedTuple):
    """A batch of texts with a class each.

    Rows that only fill up a batch have `weights == 0`; they and padding have `segment_ids == 0`.
    """

    inputs: Array  # int32 [B, T], the tokens read
    segment_ids: Array  # int32 [B, T], 1 for tokens, 0 for padding; or None, where there is no padding
    labels: Array  # int32 [B], the class of each text
    weights: Array  # float32 [B], how much each text counts in the loss

    @classmethod
    def of(cls, inputs: Array, labels: Array, **others: Array) -> "LabelledBatch":
        """A batch of whole rows without padding, but for the fields that are given."""
        return cls(inputs, None, labels, _ones(labels).astype("float32"))._replace(**others)

    @property
    def read(self) -> tuple[Array, ...]:
        """The tokens that the model reads."""
        return (self.inputs,)

    def ids(self, sizes: Any) -> tuple[Ids, ...]:
        """What must be ids of a model of these `Sizes`."""
        labels = Ids("labels", self.labels, sizes.num_classes, self.weights, "Labels", "num_classes", "")
        return Ids("inputs", self.inputs, sizes.vocab_size), labels


class PairBatch(NamedTuple):
    """A batch of sources and targets, a pair a row.

    Rows that only fill up a batch have weights of 0; they and padding have segment ids of 0.
    """

    source: Array  # int32 [B, S], the tokens of the source
    source_segment_ids: Array  # int32 [B, S], 1 for tokens, 0 for padding; or None, where there is no padding
    inputs: Array  # int32 [B, T], the target tokens read: end-of-text, then all but the last
    targets: Array  # int32 [B, T], the token that follows each input; the last is end-of-text
    weights: Array  # float32 [B, T], how much each target counts in the loss
    segment_ids: Array  # int32 [B, T], likewise

    @classmethod
    def of(cls, source: Array, inputs: Array, targets: Array, **others: Array) -> "PairBatch":
        """A batch of pairs without padding. With `segment_ids`, targets of segment 0 have weight 0.

        Fields that are given stay as they are.
        """
        ids = others.get("segment_ids")
        return cls(source, None, inputs, targets, _real(_ones(inputs) if ids is None else ids), None)._replace(**others)

    @property
    def read(self) -> tuple[Array, ...]:
        """The tokens that the model reads."""
        return self.source, self.inputs

    def ids(self, sizes: Any) -> tuple[Ids, ...]:
        """What must be ids of a model of these `Sizes`."""
        size = sizes.vocab_size
        source = Ids("source", self.source, sizes.source_vocab_size or size)
        return Ids("inputs", self.inputs, size), source, Ids("targets", self.targets, size, self.weights)


Noise = Callable[[Batch, int, tuple[int, ...]], None]
"""Changes row `row` of a batch in place; its randomness depends on the place of the row in the data alone."""

LossOutput = tuple[tuple[Array, Array], tuple[PyTree, Statistics]]


class Loss(NamedTuple):
    """The loss of a model: `loss(...)` summed over the batch, divided by `weight(batch)`, known before the gradient."""

    weight: Callable[[Any], Array]
    """`batch -> weight_sum`, a float32 scalar that does not depend on the parameters."""
    loss: Callable[[PyTree, PyTree, Any, Array, bool], LossOutput]
    """`(params, carry, batch, key, train) -> (loss_sum, weight_sum), (carry, statistics)`."""
    init_carry: Callable[[int], PyTree] = lambda rows: ()
    """`rows -> carry` before the first batch of so many rows; the first axis of its arrays are the rows."""


class Reading(NamedTuple):
    """How a trained model reads one text, for a look at its attention."""

    ids: Mapping[str, Array]
    """The tokens of each stack (`encoder`, `decoder`), int32 [n]."""
    inputs: tuple[Array, ...]
    """Arguments of the model's method."""
    options: Mapping[str, Array] = {}
    """Its keyword arguments."""
    method: str = "__call__"
    predicts: str = ""
    """What the logits are of, as `next token`; empty if there are none."""
    of: str = ""
    """The stack whose tokens have a row of logits each; empty: the whole text has one row."""
    first: int = 0
    """The first token whose row means something."""
    ahead: int = 1
    """How far behind a token the one is that its row is of: 1 is the next, 0 itself."""
    logits: Callable[[Any, PyTree, Array], Array] = lambda model, params, output: output[0]
    """`(model, params, output) -> logits` [n, V], of what the method gives."""


@runtime_checkable
class CheckpointableIterator(Protocol):
    """An iterator over batches whose state can be saved and restored exactly (a Grain iterator is one)."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]:
        """A JSON-serialisable description of the batches consumed so far."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken: the next batch is the one that followed it."""
        ...
