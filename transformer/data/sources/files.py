"""Files as sources: JSON lines, tables, and plain text."""

from collections.abc import Iterator

from etils import epath

from transformer.config import DataConfig
from transformer.data.documents import Document, file_documents
from transformer.data.files import is_there, json_objects, kind_of
from transformer.data.source_kind import Rows, SourceKind
from transformer.data.tables import table_rows, text_lines
from transformer.storage import expand, resolved
from transformer.validation import require

JSON_LINES = ".jsonl"
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class File(SourceKind):
    """Base of the source kinds that are files."""

    def title(self, name: str) -> tuple[str, str]:
        """Name the corpus after the file."""
        return epath.Path(expand(name)).name, "1.0.0"


class JsonLines(File):
    """A .jsonl file: each line is a row."""

    def accepts(self, name: str) -> bool:
        """Recognize the file by its suffix."""
        return kind_of(epath.Path(expand(name))) == JSON_LINES and is_there(name)

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """Each line is an object."""
        del keys, what
        return json_objects(epath.Path(expand(name)))


class Table(File):
    """A .csv or .tsv file: its first line names the columns."""

    def accepts(self, name: str) -> bool:
        """Recognize the file by its suffix."""
        return kind_of(epath.Path(expand(name))) in DELIMITERS and is_there(name)

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """Each row of the table."""
        del what
        path = epath.Path(expand(name))
        return table_rows(path, DELIMITERS[kind_of(path)], keys)


class TextFile(File):
    """Any other file: running text; each line is a row with one field."""

    def accepts(self, name: str) -> bool:
        """Accept any suffix."""
        return is_there(name)

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """Each line, as the value of a single field."""
        key, *others = keys
        _refuse_json(name)
        return super().rows(name, keys, what) if others else text_lines(epath.Path(expand(name)), key)

    def documents(self, name: str, config: DataConfig) -> Iterator[Document]:
        """The whole file, or its parts between `data.separator`."""
        path = resolved(name)
        _refuse_json(name)
        return file_documents(path.parent, [path], config.separator)

    def describe_empty(self, name: str, config: DataConfig) -> str:
        """Describe a file of white space."""
        del config
        return f"{resolved(name)} has 1 file and no text"


def _refuse_json(name: str) -> None:
    require(
        kind_of(epath.Path(name)) != ".json",
        f"Text is read from text files, .jsonl and tables, {name} would be read with its commas, quotes and braces. Save it as "
        ".jsonl, one object a line with the text as 'text'; to take the file as it is, give it a name that ends in .txt.",
    )
