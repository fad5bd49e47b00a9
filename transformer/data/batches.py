"""Batches that a caller makes, in the place of the data that a config names."""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from transformer.config import Config
from transformer.data.source import WHOLE
from transformer.types import CheckpointableIterator, UserError
from transformer.validation import require, shown

_END = object()


class BatchData:
    """Batches of one's own as the data of a run.

    A batch is what the objective reads: for the package's, a `Batch`, `LabelledBatch` or `PairBatch` of numpy arrays, or a
    dictionary of some of its fields (`{"inputs": ..., "targets": ...}`; see their `of`); for one's own, any tree of arrays whose
    first axis are the rows. Each has `data.batch_size` rows; with several processes, each process brings its own part of them.

    A run that goes on is given the iterable again. If it has `get_state` and `set_state` with a state that is JSON, it is set to
    where it was; else as many batches are skipped as were taken, so that it must give the same ones in the same order.

    Args:
        splits: batches to train on; or those of `train` and of splits to score, by the name of the split. What is trained on goes
            on without end, or can be iterated again and starts anew; what is scored ends, and can be iterated again.
        class_names: of labelled texts, in the order of their numbers.
    """

    def __init__(
        self, splits: Mapping[str, Iterable[Any]] | Iterable[Any], *, class_names: tuple[str, ...] = ()
    ) -> None:
        self.splits: dict[str, Iterable[Any]] = dict(splits) if isinstance(splits, Mapping) else {"train": splits}
        self.class_names = tuple(class_names)
        self.sources: tuple[Any, ...] = ()
        self._kind: Any = None
        self._rows, self._vocabulary = 0, NoTokenizer(0)
        for name, batches in self.splits.items():
            require(
                isinstance(batches, Iterable) and not isinstance(batches, str),
                f"data= must be batches or splits of batches, got {batches!r:.80} for {name}; names of files and datasets belong "
                "into the config (data.source).",
            )

    def for_run(self, config: Config) -> "BatchData":
        """The same batches for a run of this config."""
        other = BatchData(self.splits, class_names=self.class_names)
        other._kind, other._rows = type(config.objective.batch_shapes(config)), config.data.batch_size
        other._vocabulary = ids_alone(config)
        return other

    @property
    def description(self) -> str:
        """Its splits."""
        return f"batches of your own: {', '.join(self.splits)}"

    @property
    def split_names(self) -> tuple[str, ...]:
        """Those that were given."""
        return tuple(self.splits)

    def texts(self, split: str) -> Iterator[str]:
        """None: batches hold ids."""
        del split
        return iter(())

    def labels(self, split: str) -> Iterator[int]:
        """None are known before they come."""
        del split
        return iter(())

    def make_tokenizer(self) -> Any:
        """A vocabulary without a tokenizer, whose size is the config's `model.vocab_size`."""
        return self._vocabulary

    def train_batches(
        self, tokenizer: Any, *, process_index: int = 0, process_count: int = 1
    ) -> CheckpointableIterator:
        """Those of `train`, over and over."""
        del tokenizer, process_index
        require("train" in self.splits, f"data= must have a split train, got {', '.join(self.splits)}.")
        return _Endless(self.splits["train"], lambda batch: self._checked(batch, process_count))

    def evaluation_batches(
        self, tokenizer: Any, split: str, *, process_index: int = 0, process_count: int = 1
    ) -> Iterable[Any]:
        """Those of a split, once."""
        del tokenizer, process_index
        names = tuple(self.splits) if split == WHOLE else (split,)
        return _Once([self.splits[name] for name in names], lambda batch: self._checked(batch, process_count))

    def count_cut(self, tokenizer: Any, split: str, at_most: int | None = None) -> tuple[dict[str, int], int]:
        """Nothing is known of what was cut."""
        del tokenizer, split, at_most
        return {}, 0

    def batches_of_epoch(self, tokenizer: Any) -> float | None:
        """How many there are, where they can be counted."""
        batches: Any = self.splits.get("train")
        if hasattr(batches, "__len__"):
            return float(len(batches))
        require(
            tokenizer is None,
            "training.epochs needs batches that can be counted (len), got "
            f"{type(batches).__name__}; set training.steps.",
        )
        return None

    def describe_scored(self, split: str, targets: int) -> str:
        """What was counted."""
        del split
        return f"{targets:,} targets"

    def _named(self, batch: Any) -> Any:
        """A dictionary as the batch whose fields it has; anything else as it is."""
        fields = getattr(self._kind, "_fields", ())
        if not isinstance(batch, Mapping) or not hasattr(self._kind, "of") or not set(fields) & set(batch):
            return batch
        needed = list(inspect.signature(self._kind.of).parameters)[:-1]
        require(
            set(needed) <= set(batch) <= set(fields),
            f"A batch given as data= must have {', '.join(needed)} and may have {', '.join(fields)} for {self._kind.__name__}, "
            f"got {', '.join(map(str, batch))}; an objective of your own that reads others says so in batch_shapes.",
        )
        return self._kind.of(**batch)

    def _checked(self, batch: Any, process_count: int) -> Any:
        batch = self._named(batch)
        rows, sizes = self._rows // process_count, {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        require(
            sizes == {(rows,)},
            f"A batch given as data= must hold arrays of data.batch_size={self._rows} rows"
            + (f", {rows} in each of {process_count} processes" if process_count > 1 else "")
            + f", got arrays of {', '.join(str(*size) if size else 'no' for size in sorted(sizes))} rows; set data.batch_size, "
            "or leave out what does not fill a batch.",
        )
        return batch


class NoTokenizer:
    """The vocabulary of a run on ids, whose size alone is known."""

    kind = "none"
    end_of_text = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.token_bytes = np.zeros(vocab_size, np.int32)

    def encode(self, text: str) -> Any:
        """Raise UserError."""
        raise UserError(
            f"A run on ids has no tokenizer to read {shown(text)} with; give load(tokenizer=...) the one of its ids."
        )

    def decode(self, ids: Any) -> str:
        """Raise UserError."""
        raise UserError(
            "A run on ids has no tokenizer to write text with; give load(tokenizer=...) the one of its ids."
        )

    def save(self, directory: Any) -> None:
        """There is nothing to keep."""


def ids_alone(config: Config) -> NoTokenizer:
    """The vocabulary of a config that names its size, less the ids that its objective adds."""
    size = config.model.vocab_size
    return NoTokenizer(max(0, size - config.objective.extra_tokens(NoTokenizer(size), config.data.sequence_length)))


class _Endless:
    """Batches over and over, with a state that says where they are."""

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
            f"Batches to train on must go on as long as training does, data= ended after {self._taken}; give an iterable that "
            "starts anew when it is iterated again, such as a list, or set fewer training.steps.",
        )
        self._taken += 1
        return self._check(batch)

    def get_state(self) -> dict[str, Any]:
        """Batches taken, and the iterator's own state where that is JSON."""
        state: dict[str, Any] = {"taken": self._taken}
        if hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state"):
            with contextlib.suppress(TypeError):
                state["own"] = json.loads(json.dumps(self._iterator.get_state()))
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where it was."""
        taken = int(state["taken"])
        if "own" in state:
            self._iterator.set_state(state["own"])
            self._taken = taken
        while self._taken < taken:
            next(self)


class _Once:
    """Batches of some splits, each time they are iterated."""

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
            "Batches to score must be there each time, got none; give an iterable that starts anew when it is iterated again, "
            "such as a list.",
        )
