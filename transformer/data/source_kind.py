"""The base of every kind of source: how a name in `data.source` is read, as running text, labelled texts or pairs."""

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from transformer.config import DataConfig
from transformer.data.distributed import open_in_tasks
from transformer.data.documents import CONVERSATION, Corpus, Document, make_corpus
from transformer.data.files import without_surrogates
from transformer.data.forms.examples import ExampleForm
from transformer.data.forms.labelled import LabelledText
from transformer.data.prepare import data_directory, fingerprint_of, open_corpus
from transformer.data.seen import Stamp, stamp
from transformer.data.source import ExampleSource, Source
from transformer.data.tasks import Run
from transformer.types import UserError
from transformer.validation import require, shown

Rows = Iterator[tuple[str, dict[str, Any]]]
"""The rows of a file: the location of each, for messages, and its fields."""


class SourceKind:
    """A reader of names in `data.source`. A user-defined kind derives from it and is registered with `register_source`.

    It must define `accepts` and `rows`, which serves running text, examples of every form, and prediction. If its running text is
    not in rows, it defines `documents` too.
    """

    is_path = True
    """Names are paths: those in a run's directory are read only if this user has trained on them."""

    def accepts(self, name: str) -> bool:
        """Whether this kind reads the name; the first kind that does is used."""
        raise NotImplementedError(f"{type(self).__name__} must define accepts().")

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """Each row with its location.

        Args:
            name: the name of the source.
            keys: the required fields.
            what: the kind of content, for messages: labelled texts, pairs, ...

        Raises:
            UserError: the rows cannot be read; the message names the file and the line.
        """
        del keys
        raise UserError(
            f"A file of {what} must be .jsonl, .csv, .tsv (or these with .gz, .bz2, .xz, .zst), .parquet or .arrow, got {name}."
        )

    # ---- Running text ------------------------------------------------------------------------------------------------

    def files(self, name: str) -> list[epath.Path] | None:
        """The files of a name that is not itself a file or folder."""
        del name

    def title(self, name: str) -> tuple[str, str]:
        """The title of the corpus, and its version."""
        return name, "1.0.0"

    def documents(self, name: str, config: DataConfig) -> Iterator[Document]:
        """The documents of running text, without blank ones. By default each row is one document."""
        for location, row in self.rows(name, (config.text_key,), "running text"):
            document = _document(row, location, config)
            yield document._replace(name=f"{self.title(name)[0]}:{location.rpartition(' ')[2]}")

    def parts(self, name: str) -> Sequence[Any]:
        """Parts of running text that can be read independently, in order, each JSON-serializable; by default one part."""
        del name
        return ("all",)

    def part_documents(self, name: str, part: Sequence[str], config: DataConfig) -> Iterator[Document]:
        """The documents of one of `parts`."""
        del part
        return self.documents(name, config)

    def corpus(self, name: str, config: DataConfig) -> Corpus:
        """The running text of a name.

        Raises:
            UserError: there is none.
        """
        try:
            return make_corpus(
                *self.title(name), lambda: self.documents(name, config), self.describe_empty(name, config)
            )
        except OSError as error:
            raise UserError(f"A source must be readable, {name} is not: {error}.") from error

    def describe_empty(self, name: str, config: DataConfig) -> str:
        """The cause of missing running text, for messages."""
        return f"{name} has no line with a non-empty {config.text_key!r}"

    def open_text(self, name: str, config: DataConfig, run: Run | None = None) -> Source:
        """Open running text. It is prepared unless it already is; by tasks of `run`, if given."""
        stamped = self._stamp(name, config)
        if run is not None:
            return open_in_tasks(self, name, config, stamped, run)
        return open_corpus(functools.partial(self.corpus, name, config), self.title(name), config, stamped)

    def fingerprint(self, name: str, config: DataConfig) -> str:
        """The fingerprint of the source that `open_text` opens; nothing is prepared."""
        return fingerprint_of(
            functools.partial(self.corpus, name, config), self.title(name), config, self._stamp(name, config)
        )

    def _stamp(self, name: str, config: DataConfig) -> Stamp:
        return self.stamp(name, (config.separator, config.text_key, config.prompt_key), config)

    def stamp(self, name: str, reading: Sequence[str], config: DataConfig) -> Stamp:
        """The state of the files of a name; `reading` describes the settings that affect the content read."""
        # The files of a user-defined kind are unknown, and a name that is not a path may be a file's by chance.
        is_known = self.is_path and type(self).__module__.startswith("transformer.")
        reading = (type(self).__qualname__, *reading)
        return stamp(name, reading, data_directory(config), self.files(name) if is_known else [])

    # ---- Examples ----------------------------------------------------------------------------------------------------

    def class_folders(self, name: str) -> Iterator[tuple[str, LabelledText]] | None:
        """Labelled texts in class folders, each with its location; None if they are rows, as all other examples are."""
        del name

    def open_stored(
        self, name: str, form: ExampleForm, config: DataConfig, class_names: tuple[str, ...]
    ) -> ExampleSource | None:
        """Examples stored with their own splits; None if they are rows."""
        del name, form, config, class_names
        return None


def _document(row: dict[str, Any], location: str, config: DataConfig) -> Document:
    text: Any = row.get(config.text_key, row.get("messages"))
    if isinstance(text, list):
        return Document(_conversation(text, location), CONVERSATION, "")
    prompt: Any = row.get(config.prompt_key, "")
    require(
        isinstance(text, str) and isinstance(prompt, str),
        f"Each row must have its text as a string, in the field data.text_key={config.text_key!r} (or messages), and a prompt "
        f"(data.prompt_key={config.prompt_key!r}) must be a string too; {location} has "
        f"{', '.join(f'{k:.40} ({type(v).__name__})' for k, v in row.items())}. Name other fields, or leave the row out.",
    )
    return Document(without_surrogates(text), without_surrogates(prompt), "")


def _conversation(messages: list[Any], location: str) -> str:
    """Messages as JSON; each must have a role and content, and keeps its other fields."""
    for number, message in enumerate(messages, 1):
        strings = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        require(
            strings,
            f"A message must have a role and its content, both text; message {number} of {location} is {shown(message)}.",
        )
    return without_surrogates(json.dumps(messages, ensure_ascii=False)) if messages else ""
