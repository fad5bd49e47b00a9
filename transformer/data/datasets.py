"""The data of a config, text or examples, behind one interface: its description, its texts and its batches."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from transformer.config import Config, DataConfig
from transformer.data.example_data import ExampleData, describe_stored
from transformer.data.examples import open_examples, prepare_examples
from transformer.data.forms.examples import ExampleForm
from transformer.data.held_out import (
    held_out_examples,
    held_out_fingerprint,
    held_out_part,
    held_out_text,
    overlap_note,
    trained_part,
)
from transformer.data.packing import best_fit_tokens, describe_packing, packed_tokens, sample_documents
from transformer.data.pipeline import (
    count_streams,
    evaluation_batches,
    train_batches,
    training_limit,
)
from transformer.data.registry import find_source, open_sources
from transformer.data.source import WHOLE, ExampleSource, Source, split_text
from transformer.data.tasks import Run
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokens import open_tokens, store_tokens
from transformer.data.vocabulary import vocabulary_texts
from transformer.objective import Objective
from transformer.types import CheckpointableIterator
from transformer.validation import counted, require


@runtime_checkable
class Dataset(Protocol):
    """The data of a run."""

    @property
    def sources(self) -> Sequence[Source | ExampleSource]:
        """The sources in `data.source`, in order, then those in `data.validation`."""
        ...

    @property
    def description(self) -> str:
        """A description of the data, one line per source."""
        ...

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that every source has."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of labelled texts."""
        ...

    def texts(self, split: str) -> Iterator[str]:
        """The texts of a split, whole and in order."""
        ...

    def labels(self, split: str) -> Iterator[int]:
        """The class of each labelled text of a split, in order."""
        ...

    def make_tokenizer(self) -> Tokenizer:
        """Make the tokenizer that the config names; a trainable one is trained on the training split."""
        ...

    def train_batches(
        self, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
    ) -> CheckpointableIterator:
        """This process's rows of an endless sequence of training batches."""
        ...

    def evaluation_batches(
        self, tokenizer: Tokenizer, split: str, *, process_index: int = 0, process_count: int = 1
    ) -> Iterable[Any]:
        """This process's rows of the batches that cover a split; can be iterated repeatedly."""
        ...

    def count_cut(self, tokenizer: Tokenizer, split: str, at_most: int | None = None) -> tuple[dict[str, int], int]:
        """How many texts of each kind exceed a row and are cut, and how many were examined: all, or `at_most` evenly spaced.

        Running text is never cut.
        """
        ...

    def describe_rows(self, tokenizer: Tokenizer, at_most: int = 1000) -> str:
        """A line with the fractions of padding and of cut texts in training rows, from `at_most` texts; perhaps a hint too."""
        ...

    def batches_of_epoch(self, tokenizer: Tokenizer | None) -> float | None:
        """The number of batches that train on each text once; None if counting requires a tokenizer.

        Raises:
            UserError: the number is undefined.
        """
        ...

    def describe_scored(self, split: str, targets: int) -> str:
        """The amount of data behind a score of `targets` targets, such as `60 texts` or `1,234 tokens`."""
        ...


def open_data(
    config: DataConfig, objective: Objective, class_names: tuple[str, ...] = (), *, continued: bool = False
) -> Dataset:
    """Open the data that `config` names, in the form of the objective; local text is prepared first.

    Args:
        config: the data config.
        objective: the objective of the run.
        class_names: the classes of the run that scores the data, if any.
        continued: each row continues the same row of the previous batch, for a model with a Transformer-XL memory.
    """
    return objective.form.open(Reader(config, objective, class_names, continued))


def data_of(config: Config, class_names: tuple[str, ...] = ()) -> Dataset:
    """`open_data` for a run's config."""
    return open_data(config.data, config.objective, class_names, continued=config.model.memory_length > 0)


def fingerprints(config: DataConfig, objective: Objective, class_names: tuple[str, ...]) -> list[str]:
    """Fingerprints of the sources that `open_data` would open; local text is not prepared."""
    return objective.form.fingerprints(Reader(config, objective, class_names))


@dataclasses.dataclass(frozen=True)
class Reader:
    """Opens and stores data for a form: as streams of running text, or as one example per row."""

    config: DataConfig
    objective: Objective | None = None
    """The objective of the run, if any."""
    class_names: tuple[str, ...] = ()
    """The classes of the run that scores the data, if any."""
    continued: bool = False
    """Each row continues the same row of the previous batch."""
    run: Run | None = None
    """Runs the tasks that prepare text and store its tokens; None means this process and others on this machine."""

    def running_text(self) -> Dataset:
        """Open each of `config.source` as running text, prepared now unless it already is."""
        named = held_out_part(self.config)
        # Validation data first: they are small, and a mistake in them is found before a large corpus is prepared.
        held_out = tuple(map(held_out_text, open_sources(named, self.run))) if named else ()
        trained = open_sources(trained_part(self.config), self.run)
        return TextData(self.config, self.objective, trained, held_out, self.continued, run=self.run)

    def text_fingerprints(self) -> list[str]:
        """The fingerprints of `running_text`; nothing is prepared."""
        trained, held_out = trained_part(self.config), held_out_part(self.config)
        found = [find_source(name).fingerprint(name, trained) for name in trained.source]
        named = [find_source(name).fingerprint(name, held_out) for name in held_out.source] if held_out else []
        return [*found, *map(held_out_fingerprint, named)]

    def examples(self, form: ExampleForm) -> Dataset:
        """The examples of `config.source`, and of `config.validation`."""
        trained, held_out = trained_part(self.config), held_out_part(self.config)
        source = open_examples(trained.source, form, trained, self.class_names)
        if held_out:
            other = open_examples(held_out.source, form, held_out, self.class_names or source.class_names)
            source = held_out_examples(source, other)
        return ExampleData(self.config, form, source)

    def store(self, form: ExampleForm, name: str, files: Mapping[str, Sequence[str]]) -> str:
        """Store the examples of files as a dataset, and describe it."""
        return prepare_examples(form, name, files, self.config)


def describe_data(data: Dataset) -> list[dict[str, Any]]:
    """A JSON description of the data of a run. Two datasets are equal if their fingerprints are.

    Returns:
        A dictionary for each source, in the order of `data.source`. `name` is for messages. `fingerprint` is a hash of the texts,
        prompts or labels and of the split rule, but not of paths or names. `splits` has the number of documents or examples.
    """
    return [
        {"name": source.name, "fingerprint": source.fingerprint, "splits": dict(source.sizes)}
        for source in data.sources
    ]


@dataclasses.dataclass(frozen=True)
class TextData:
    """Running text, for language models."""

    config: DataConfig
    objective: Objective | None
    trained: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()
    """The sources in `data.validation`."""
    continued: bool = False
    class_names: tuple[str, ...] = ()
    run: Run | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources in `data.source`, then those in `data.validation`."""
        return self.trained + self.held_out

    @property
    def description(self) -> str:
        """A description of the data, one line per source."""
        trained = [source.fingerprint for source in self.trained]
        notes = (note for held_out in self.held_out for note in overlap_note(held_out.fingerprint, trained))
        return "\n".join([*(source.description for source in self.sources), *dict.fromkeys(notes)])

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that every source has."""
        splits = self.trained[0].split_names
        common = [name for name in splits if all(name in source.split_names for source in self.trained)]
        return tuple(dict.fromkeys([*common, "validation"])) if self.held_out else tuple(common)

    def of(self, split: str) -> tuple[Source, ...]:
        """The sources of a split."""
        if split == WHOLE:
            return self.sources
        return self.held_out if self.held_out and split == "validation" else self.trained

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split, each after its prompt."""
        for source in self.of(split):
            yield from split_text(source, split)

    def labels(self, split: str) -> Iterator[int]:
        """No labels: running text has no classes."""
        del split
        return iter(())

    def make_tokenizer(self) -> Tokenizer:
        """Make the tokenizer of the training split."""
        kind = self.config.tokenizer
        if not kind.sampled:
            return kind.train(self.texts("train"))
        return kind.train(vocabulary_texts(self.trained, self.config.tokenizer_bytes))

    def store_tokens(self, tokenizer: Tokenizer | None = None) -> str:
        """Store the tokens for a run with a tokenizer, by default the training split's own; returns a line about them."""
        tokenizer = tokenizer or self.make_tokenizer()
        kept = all([store_tokens(source, tokenizer, self.run) for source in self.sources])
        return describe_stored(tokenizer, kept)

    def train_batches(
        self, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
    ) -> CheckpointableIterator:
        """Rows of `Batch`es or `PairBatch`es, masked or corrupted if the objective requires it."""
        return train_batches(
            self.config,
            tokenizer,
            sources=self.trained,
            process_index=process_index,
            process_count=process_count,
            **self._changes(tokenizer),
        )

    def evaluation_batches(
        self, tokenizer: Tokenizer, split: str, *, process_index: int = 0, process_count: int = 1
    ) -> Iterable[Any]:
        """Rows as in training; masking or corruption is the same at each evaluation."""
        return evaluation_batches(
            self.config,
            tokenizer,
            split,
            sources=self.of(split),
            process_index=process_index,
            process_count=process_count,
            **self._changes(tokenizer),
        )

    def count_cut(self, tokenizer: Tokenizer, split: str, at_most: int | None = None) -> tuple[dict[str, int], int]:
        """Nothing is cut: a document continues in the next row."""
        del tokenizer, split, at_most
        return {}, 0

    def batches_of_epoch(self, tokenizer: Tokenizer | None) -> float | None:
        """The tokens of the training split divided by the tokens of a batch: each stream reads its share repeatedly.

        Padding after the last of `data.max_segments` documents counts too, and all streams reach their ends at about this step.
        Windows (`pack=False`) cover as much text by then, some of it twice.
        """
        if tokenizer is None:
            return None
        require(
            len(self.trained) == 1,
            f"training.epochs are of one source, got {len(self.trained)} that are drawn by their shares, the smaller ones more "
            "often; set training.steps.",
        )
        sizes = open_tokens(self.trained[0], "train", tokenizer).sizes()
        length, most = self.config.sequence_length, self._limit(tokenizer)
        if self.config.best_fit:
            streams = count_streams(self.config, self.trained, tokenizer)
            tokens = best_fit_tokens(sizes.tolist(), length, most, streams)
        else:
            tokens = packed_tokens(sizes.tolist(), length, most) if most else int(sizes.sum(dtype=np.int64))
        return tokens / (self.config.batch_size * length)

    def describe_rows(self, tokenizer: Tokenizer, at_most: int = 1000) -> str:
        """Statistics of the first source, from eight parts of it; empty for windows and for continued rows."""
        if self.continued or not self.config.pack:
            return ""
        records, most, streams = open_tokens(self.trained[0], "train", tokenizer), self._limit(tokenizer), 0
        documents = sample_documents(records, at_most)
        if self.config.best_fit:
            # The sample is packed as if it were one stream, whose chunks are full.
            all_read = sum(len(document.sizes) for document in documents) == len(records)
            streams = count_streams(self.config, self.trained, tokenizer) if all_read else 1
        return describe_packing(documents, self.config.sequence_length, most, streams)

    def _limit(self, tokenizer: Tokenizer) -> int:
        """Most documents of a training row; 0 means no limit."""
        return training_limit(self.config, self.continued, bool(self._changes(tokenizer).get("joined")))

    def describe_scored(self, split: str, targets: int) -> str:
        """The number of predicted tokens."""
        del split
        return counted(targets, "token")

    def _changes(self, tokenizer: Tokenizer) -> Mapping[str, Any]:
        if self.objective is None:
            return {}
        changes = self.objective.changes(tokenizer, self.config.sequence_length, self.config.shuffle_seed)
        return {"continued": self.continued, **changes}
