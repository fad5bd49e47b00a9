"""The form of the data that an objective learns from: the base of every form, the package's and one's own."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from transformer.kinds import Family, Kind

FORMS = Family(
    "form",
    {
        "text": "transformer.data.forms.text",
        "labelled": "transformer.data.forms.labelled",
        "pairs": "transformer.data.forms.pairs",
    },
)


class Shown(NamedTuple):
    """A row of a batch, for a person."""

    heading: str
    lines: Sequence[Sequence[tuple[str, str]]]
    """Below it, each of texts with their styles (a colour, dim)."""


@dataclasses.dataclass(frozen=True)
class Form(Kind):
    """How data is stored, opened, and described: running text, labelled texts, pairs.

    One's own derives from this, or from `ExampleForm` (`data/forms/examples.py`) where an example is one row. It has a name
    (`kind`), is made known by `FORMS.register`, and an objective reads it by that name. It has no settings.
    """

    family = FORMS
    title: ClassVar[str]
    """What it is called in messages, as `labelled texts`."""
    noun: ClassVar[str]
    """What a score is of, one of them: token, text, pair."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Settings of a run that it uses, of those that not every run does (`config.OF_SOME`), as `data.label_key`."""
    needs_name: ClassVar[bool] = True
    """Whether `transformer prepare` stores it under a name of the user's."""
    prepares: ClassVar[tuple[str, ...]]
    """Options of `transformer prepare` that it uses, besides those of all forms."""

    def open(self, reader: Any) -> Any:
        """The `Dataset` that a config names; `reader` (`data.datasets.Reader`) has the config, and opens text and examples.

        Raises:
            UserError: it cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} must define open().")

    def fingerprints(self, reader: Any) -> list[str]:
        """Fingerprints of the sources that `open` opens."""
        return [source.fingerprint for source in self.open(reader).sources]

    def prepare(self, reader: Any, name: str, files: Mapping[str, Sequence[str]]) -> str:
        """Store files as a dataset, and describe it.

        Args:
            reader: with the config.
            name: of the dataset.
            files: of each split.

        Raises:
            UserError: they cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} must define prepare().")

    def max_segments(self, data: Any) -> int:
        """What is promised of the segment ids of its batches (`AttentionMask.max_segments`); by default nothing.

        Args:
            data: a `DataConfig`.
        """
        del data
        return 0

    def show(self, batch: Any, tokenizer: Any, class_names: Sequence[str]) -> Iterator[Shown]:
        """The rows of a batch, for a person."""
        raise NotImplementedError(f"{type(self).__name__} must define show().")
