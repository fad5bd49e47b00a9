"""Batches that a caller supplies instead of the data that a config names."""

import contextlib
import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath

from transformer.config import Config
from transformer.data.source import WHOLE
from transformer.data.tokenizers.base import Ids, Tokenizer
from transformer.types import CheckpointableIterator, UserError
from transformer.validation import require, shown

_END = object()


class BatchData:
    """User-supplied batches as the data of a run.

    A batch has the arrays of the objective (`Objective.batch_shapes`). For the package's objectives, it is a `Batch`,
    `LabelledBatch` or `PairBatch` of numpy arrays, or a dictionary with some of its fields (`{"inputs": ..., "targets": ...}`;
    see their `of`). It has `data.batch_size` rows of at most `data.sequence_length` tokens; with several processes, each
    supplies its share of the rows.

    A resumed run receives the iterable again. If its iterator has `get_state` and `set_state` with a JSON state, the state is
    restored. Otherwise the batches already used are skipped; the iterable must then give the same batches in the same order.

    Args:
        splits: batches to train on; or a mapping of splits, `train` and others to score. Training batches are endless, or
            can be iterated again from the start; batches to score end, and can be iterated again.
        class_names: the classes of labelled texts, in the order of their numbers.
    """

    def __init__(
        self, splits: Mapping[str, Iterable[Any]] | Iterable[Any], *, class_names: tuple[str, ...] = ()
    ) -> None:
        self.splits: dict[str, Iterable[Any]] = dict(splits) if isinstance(splits, Mapping) else {"train": splits}
        self.class_names = tuple(class_names)
        self.sources: tuple[Any, ...] = ()
        self._config = Config()
        for name, batches in self.splits.items():
            require(
                isinstance(batches, Iterable) and not isinstance(batches, str),
                f"data= must be batches or splits of batches, got {batches!r:.80} for {name}; names of files and datasets belong "
                "into the config (data.source).",
            )
            require(
                name == "train" or iter(batches) is not batches,
                f"Batches to score are read more than once, {name} of data= can be iterated once; give a list, or an iterable "
                "that starts again each time.",
            )

    def for_run(self, config: Config) -> "BatchData":
        """The same batches for a run with this config."""
        other = copy.copy(self)
        other._config = config
        return other

    @property
    def description(self) -> str:
        """A line with the splits."""
        names = f"batches of your own: {', '.join(self.splits)}"
        unscored = len(self.splits) > 1 and "validation" not in self.splits
        return names + ("; none is called validation, and none is scored during training" if unscored else "")

    @property
    def split_names(self) -> tuple[str, ...]:
        """The given splits."""
        return tuple(self.splits)

    def texts(self, split: str) -> Iterator[str]:
        """No texts: batches hold ids."""
        del split
        return iter(())

    def labels(self, split: str) -> Iterator[int]:
        """No labels: they are unknown before the batches are read."""
        del split
        return iter(())

    def make_tokenizer(self) -> Tokenizer:
        """A vocabulary without a tokenizer, with the size `model.vocab_size`.

        Raises:
            UserError: the batches hold tokens, and the config has no vocabulary size.
        """
        config = self._config
        require(
            config.model.vocab_size > 0 or not hasattr(config.objective.batch_shapes(config), "read"),
            "A run on batches of tokens must know how many there are, got model.vocab_size=0 and no tokenizer; set it, or give "
            "tokenizer=.",
        )
        return ids_alone(config)

    def train_batches(
        self, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
    ) -> CheckpointableIterator:
        """The batches of `train`, repeated without end."""
        del tokenizer, process_index
        require("train" in self.splits, f"data= must have a split train, got {', '.join(self.splits)}.")
        return _Endless(self.splits["train"], _Checked(self._config, process_count))

    def evaluation_batches(
        self, tokenizer: Tokenizer, split: str, *, process_index: int = 0, process_count: int = 1
    ) -> Iterable[Any]:
        """The batches of a split, once."""
        del tokenizer, process_index
        names = tuple(self.splits) if split == WHOLE else (split,)
        return _Once([self.splits[name] for name in names], _Checked(self._config, process_count))

    def describe_rows(self, tokenizer: Tokenizer, at_most: int = 0) -> str:
        """Empty: the making of the batches is unknown."""
        del tokenizer, at_most
        return ""

    def count_cut(self, tokenizer: Tokenizer, split: str, at_most: int | None = None) -> tuple[dict[str, int], int]:
        """Nothing: cuts are unknown."""
        del tokenizer, split, at_most
        return {}, 0

    def batches_of_epoch(self, tokenizer: Tokenizer | None) -> float | None:
        """The number of batches, if they can be counted."""
        batches: Any = self.splits.get("train")
        if hasattr(batches, "__len__") and len(batches) < 2**31:  # a larger length means endless batches
            return float(len(batches))
        require(
            tokenizer is None,
            "training.epochs needs batches that can be counted (len), got "
            f"{type(batches).__name__}; set training.steps.",
        )
        return None

    def describe_scored(self, split: str, targets: int) -> str:
        """The number of scored targets."""
        del split
        return f"{targets:,} targets"


class _Checked:
    """Converts a batch to the types of the objective; raises UserError for other fields or axes."""

    def __init__(self, config: Config, process_count: int) -> None:
        self._shapes, self._size = config.objective.batch_shapes(config), config.data.batch_size
        self._processes, self._rows = process_count, config.data.batch_size // process_count
        make = getattr(type(self._shapes), "of", None)  # present in the package's batches
        self._of: Any = make
        self._needed = list(inspect.signature(make).parameters)[:-1] if make else []

    def __call__(self, batch: Any) -> Any:
        """The batch, ready for the runner."""
        batch = self._named(batch)
        shapes = self._shapes if self._of is None or type(batch) is not type(self._shapes) else self._like(batch)
        require(
            jax.tree.structure(batch) == jax.tree.structure(shapes),
            f"A batch given as data= must be {_words(self._shapes)}, got {_words(batch)}; an objective of your own that reads "
            "others says so in batch_shapes.",
        )
        lengths: dict[tuple[int, ...], tuple[int, ...]] = {}
        return jax.tree_util.tree_map_with_path(functools.partial(self._array, lengths), batch, shapes)

    def _like(self, batch: Any) -> Any:
        """The shapes of a batch, with segment ids only if it has them: the batch decides whether its rows are whole."""
        shapes = self._shapes
        ids = {"segment_ids": shapes.inputs, "source_segment_ids": getattr(shapes, "source", None)}
        present = {name: like for name, like in ids.items() if name in shapes._fields}
        given = {name: None if getattr(batch, name) is None else like for name, like in present.items()}
        return shapes._replace(**given)

    def _named(self, batch: Any) -> Any:
        """A dictionary as the batch with its fields; anything else is unchanged."""
        if not isinstance(batch, Mapping) or self._of is None:
            return batch
        fields = self._shapes._fields
        require(
            set(self._needed) <= set(batch) <= set(fields),
            f"A batch given as data= must have {', '.join(self._needed)} and may have {', '.join(fields)}, got "
            f"{', '.join(map(str, batch))}; an objective of your own that reads others says so in batch_shapes.",
        )
        whole = {name: None for name, values in batch.items() if values is None and name.endswith("segment_ids")}
        return self._of(**{name: np.asarray(values) for name, values in batch.items()} | whole)

    def _array(
        self, lengths: dict[tuple[int, ...], tuple[int, ...]], path: Any, values: Any, expected: jax.ShapeDtypeStruct
    ) -> np.ndarray:
        """An array of the batch; `lengths` maps the axes of full rows to the axes of earlier arrays."""
        values, name = np.asarray(values), jax.tree_util.keystr(path, simple=True, separator="/") or "array"
        require(
            values.shape[:1] == (self._rows,),
            f"A batch given as data= must have data.batch_size={self._size} rows"
            + (f", {self._rows} in each of {self._processes} processes" if self._processes > 1 else "")
            + f", got {name} of shape {list(values.shape)}; set data.batch_size, or leave out what does not fill a batch.",
        )
        # A row may be shorter than the config's length; all fields share one length.
        longest, own = expected.shape[1:], values.shape[1:]
        fits = len(own) == len(longest) and all(
            size == most or (self._of is not None and 0 < size < most) for size, most in zip(own, longest, strict=True)
        )
        require(
            fits and lengths.setdefault(longest, own) == own,
            f"{name} of a batch given as data= must have the axes of {[self._rows, *longest]} (data.sequence_length at most, as "
            f"long as the others), got {list(values.shape)}.",
        )
        integers = np.issubdtype(expected.dtype, np.integer)
        taken = (np.integer,) if integers else (np.integer, np.floating, np.bool_)
        require(
            any(np.issubdtype(values.dtype, kind) for kind in taken),
            f"{name} of a batch given as data= must be {'integers' if integers else 'numbers'}, got {values.dtype}.",
        )
        return values.astype(expected.dtype, copy=False)


def _words(tree: Any) -> str:
    """The type of a batch: its class, or the keys of a dictionary."""
    return f"a dictionary of {', '.join(map(str, tree))}" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"


class NoTokenizer:
    """The vocabulary of a run on ids, with a known size and no text."""

    kind = "none"
    end_of_text = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.token_bytes = np.zeros(vocab_size, np.int32)

    def encode(self, text: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(
            f"A run on ids has no tokenizer to read {shown(text)} with; give load(tokenizer=...) the one of its ids."
        )

    def decode(self, ids: Ids) -> str:
        """Raise UserError."""
        raise UserError(
            "A run on ids has no tokenizer to write text with; give load(tokenizer=...) the one of its ids."
        )

    def save(self, directory: epath.PathLike) -> None:
        """Nothing to save."""


def ids_alone(config: Config) -> NoTokenizer:
    """The vocabulary of a config with a vocabulary size, without the ids that its objective adds."""
    size = config.model.vocab_size
    return NoTokenizer(max(0, size - config.objective.extra_tokens(NoTokenizer(size), config.data.sequence_length)))


class _Endless:
    """Batches repeated without end, with a state that stores the position."""

    def __init__(self, batches: Iterable[Any], check: Callable[[Any], Any]) -> None:
        self._batches, self._check = batches, check
        self._iterator: Any = iter(batches)
        self._taken = 0

    def __iter__(self) -> "_Endless":
        return self

    def __next__(self) -> Any:
        batch = next(self._iterator, _END)
        if batch is _END:
            self._iterator = iter(self._batches)
            batch = next(self._iterator, _END)
        require(
            batch is not _END,
            f"Batches to train on must last as long as training does, data= ended after {self._taken}; give an iterable that "
            "starts again when it is iterated again, such as a list, or set fewer training.steps.",
        )
        self._taken += 1
        return self._check(batch)

    def get_state(self) -> dict[str, Any]:
        """The number of batches taken, and the iterator's own state if it is JSON."""
        state: dict[str, Any] = {"taken": self._taken}
        if hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state"):
            with contextlib.suppress(TypeError):
                state["own"] = json.loads(json.dumps(self._iterator.get_state()))
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the position."""
        taken = int(state["taken"])
        if "own" in state:
            self._iterator.set_state(state["own"])
            self._taken = taken
        while self._taken < taken:
            next(self)


class _Once:
    """The batches of some splits; each iteration starts from the first."""

    def __init__(self, splits: list[Iterable[Any]], check: Callable[[Any], Any]) -> None:
        self._splits, self._check = splits, check

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for batches in self._splits:
            for batch in batches:
                count += 1
                yield self._check(batch)
        require(
            count > 0,
            "Batches to score must be there each time, got none; give an iterable that starts again when it is iterated again, "
            "such as a list.",
        )
