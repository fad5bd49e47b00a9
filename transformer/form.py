"""Forms of data that an objective can learn from: the base class of the package's and of user-defined forms."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from transformer.kinds import Family, Kind
from transformer.types import PyTree

if TYPE_CHECKING:
    from transformer.config import DataConfig
    from transformer.data.datasets import Dataset, Reader
    from transformer.data.tokenizers import Tokenizer

FORMS = Family(
    "form",
    {
        "text": "transformer.data.forms.text",
        "labelled": "transformer.data.forms.labelled",
        "pairs": "transformer.data.forms.pairs",
    },
)


class Shown(NamedTuple):
    """A row of a batch, formatted for display."""

    heading: str
    lines: Sequence[Sequence[tuple[str, str]]]
    """Lines below the title, each a list of texts with their styles (a colour, dim)."""


@dataclasses.dataclass(frozen=True)
class Form(Kind):
    """How data is stored, opened, and described: running text, labelled texts, pairs.

    A user-defined form derives from this, or from `ExampleForm` (`data/forms/examples.py`) if each row is one example. It has a
    name (`kind`), is registered by `FORMS.register`, and is read by objectives under that name. It has no settings.
    """

    family = FORMS
    title: ClassVar[str]
    """Its name in messages, such as `labelled texts`."""
    noun: ClassVar[str]
    """The unit that a score counts: token, text, pair."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Settings from `config.OF_SOME` that it uses, such as `data.label_key`."""
    needs_name: ClassVar[bool] = True
    """Whether `transformer prepare` stores it under a user's name."""
    prepares: ClassVar[tuple[str, ...]]
    """Options of `transformer prepare` that it uses, besides the common ones."""

    def open(self, reader: "Reader") -> "Dataset":
        """The `Dataset` of a config; `reader` (`data.datasets.Reader`) has the config, and opens text and examples.

        Raises:
            UserError: it cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} must define open().")

    def fingerprints(self, reader: "Reader") -> list[str]:
        """Fingerprints of the sources in `open`'s dataset."""
        return [source.fingerprint for source in self.open(reader).sources]

    def prepare(self, reader: "Reader", name: str, files: Mapping[str, Sequence[str]]) -> str:
        """Store files as a dataset, and return a description.

        Args:
            reader: with the config.
            name: of the dataset.
            files: files of each split.

        Raises:
            UserError: they cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} must define prepare().")

    def max_segments(self, data: "DataConfig") -> int:
        """The promise about the segment ids of its batches (`AttentionMask.max_segments`); by default none.

        Args:
            data: a `DataConfig`.
        """
        del data
        return 0

    def show(self, batch: PyTree, tokenizer: "Tokenizer", class_names: Sequence[str]) -> Iterator[Shown]:
        """The rows of a batch, formatted for display."""
        raise NotImplementedError(f"{type(self).__name__} must define show().")
