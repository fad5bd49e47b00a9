"""The data of a run on labelled texts, pairs or other examples, one per row."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformer.config import DataConfig
from transformer.data.example_batches import ExampleBatches, ExampleEvaluationBatches, padding_of
from transformer.data.example_tokens import open_encoded, open_example_tokens
from transformer.data.forms.examples import ExampleForm
from transformer.data.pipeline import own_rows, prefetched
from transformer.data.source import ExampleSource
from transformer.data.tokenizers import Tokenizer, describe_entries
from transformer.data.vocabulary import evenly_spaced
from transformer.types import CheckpointableIterator
from transformer.validation import counted


def describe_stored(tokenizer: Tokenizer, kept: bool) -> str:
    """A line that says whether the tokens of a dataset are stored."""
    stored = "stored" if kept else "not stored: in a folder that cannot be written to, there are none"
    return f"tokens of the tokenizer {tokenizer.kind}, {describe_entries(tokenizer)}: {stored}"


def _example_bytes(example: Sequence[Any]) -> int:
    return sum(len(part.encode()) for part in example if isinstance(part, str))


@dataclasses.dataclass(frozen=True)
class ExampleData:
    """Labelled texts, pairs or other examples, one per row."""

    config: DataConfig
    form: ExampleForm
    source: ExampleSource

    @property
    def sources(self) -> tuple[ExampleSource]:
        """The only source."""
        return (self.source,)

    @property
    def description(self) -> str:
        """A description of the data."""
        return self.source.description

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the splits."""
        return self.source.split_names

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers."""
        return self.source.class_names

    def texts(self, split: str) -> Iterator[str]:
        """The texts of a split; of pairs, the targets."""
        return (self.form.text(example) for example in self.source.examples(split))

    def labels(self, split: str) -> Iterator[int]:
        """The class of each example of a split; 0 where there are no classes."""
        return (int(self.form.label(example)) for example in self.source.examples(split))

    def make_tokenizer(self) -> Tokenizer:
        """Make the tokenizer of the training split."""
        examples = self.source.examples("train")

        def chosen() -> Iterable[Any]:
            some = evenly_spaced([examples], _example_bytes, self.config.tokenizer_bytes)
            return examples if some is None else some

        return self.form.make_tokenizer(self.config, chosen if self.config.tokenizer.sampled else lambda: examples)

    def store_tokens(self, tokenizer: Tokenizer | None = None) -> str:
        """Store the tokens for a run with a tokenizer, by default the training split's own; returns a line about them."""
        made, source = tokenizer or self.make_tokenizer(), self.source
        kept = [source.tokens and source.tokens(split, made, True) is not None for split in source.split_names]
        return describe_stored(made, all(kept))

    def train_batches(
        self, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
    ) -> CheckpointableIterator:
        """Training rows in the form's batches."""
        rows = own_rows(self.config, process_index, process_count)
        return prefetched(ExampleBatches(self.config, self.form, tokenizer, self.source, rows))

    def evaluation_batches(
        self, tokenizer: Tokenizer, split: str, *, process_index: int = 0, process_count: int = 1
    ) -> Iterable[Any]:
        """Evaluation rows in the form's batches."""
        rows = own_rows(self.config, process_index, process_count)
        self.source.examples(split)  # report a missing split now, not at the first evaluation
        examples = functools.partial(open_encoded, self.source, self.form, split, tokenizer, self.config)
        return ExampleEvaluationBatches(self.config, self.form, examples, rows)

    def describe_rows(self, tokenizer: Tokenizer, at_most: int = 1000) -> str:
        """Statistics of examples evenly spaced over the split."""
        cut, count = self.count_cut(tokenizer, "train", at_most)
        examples = self.source.examples("train")
        chosen = (examples[i * len(examples) // count] for i in range(count))
        lengths = [self.form.length(self.form.encode(example, tokenizer, self.config)) for example in chosen]
        cuts = " and ".join(f"{n / count:.0%} of {name}" for name, n in cut.items() if n)
        padding = f"{padding_of(lengths, self.config):.0%} padding"
        line = f"batches of {counted(count, self.form.noun)}: {padding}, {cuts or 'none'} cut"
        room = f"A row has room for {self.config.sequence_length - 1} tokens; a longer data.sequence_length cuts fewer."
        return f"{line}\n{room}" if cuts else line

    def count_cut(self, tokenizer: Tokenizer, split: str, at_most: int | None = None) -> tuple[dict[str, int], int]:
        """The number of `texts`, or of `sources` and `targets`, that are longer than a row, and the number of examples."""
        examples = open_example_tokens(self.source, self.form, split, tokenizer, store=False)
        count = min(len(examples), at_most or len(examples))
        chosen = (examples[i * len(examples) // count] for i in range(count))
        return self.form.count_cut(chosen, tokenizer, self.config), count

    def batches_of_epoch(self, tokenizer: Tokenizer | None) -> float | None:
        """The number of full batches; each epoch drops other examples, in its incomplete last batch."""
        del tokenizer
        return float(len(self.source.examples("train")) // self.config.batch_size)

    def describe_scored(self, split: str, targets: int) -> str:
        """The number of scored examples."""
        del targets
        return counted(len(self.source.examples(split)), self.form.noun)
