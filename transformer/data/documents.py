"""Documents of running text, corpora, and the text files of a folder."""

import array
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int

from transformer.data.identity import ContentHash
from transformer.data.long_text import Text, chunks, file_texts, num_bytes
from transformer.storage import is_local
from transformer.validation import require

CONVERSATION = "\0conversation"
"""The prompt of a document whose text is a conversation: JSON of its messages, never cut."""


class Document(NamedTuple):
    """A text, the prompt before it (read without loss), and its file."""

    text: Text
    prompt: str
    name: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A local corpus of non-empty documents; each call of `documents` reads them again."""

    name: str
    version: str
    fingerprint: str
    """A hash of texts and prompts in order, but not of file names or paths."""
    sizes: Int[np.ndarray, " n"]
    """The size in bytes of each document's text."""
    documents: Callable[[], Iterator[Document]]

    @property
    def count(self) -> int:
        """The number of documents."""
        return len(self.sizes)


def file_documents(root: epath.Path, files: list[epath.Path], separator: str) -> Iterator[Document]:
    """The documents of text files, named by their paths below `root`; blank ones are skipped."""
    for path in files:
        location = path.relative_to(root).as_posix()
        for number, text in enumerate(file_texts(path, separator), 1):
            if number == 1:
                yield Document(text, "", location)
            else:
                yield Document(text.removeprefix("\n"), "", f"{location}:{number}")


def with_text(documents: Iterator[Document]) -> Iterator[Document]:
    """The documents that are not blank."""
    return (document for document in documents if document.text and not document.text.isspace())


def make_corpus(name: str, version: str, documents: Callable[[], Iterator[Document]], if_empty: str) -> Corpus:
    """A corpus of the documents that are not blank.

    Raises:
        UserError: there are none; `if_empty` describes the source instead.
    """

    content, sizes = ContentHash(), array.array("q")
    for document in with_text(documents()):
        sizes.append(num_bytes(document.text))
        content.add_text(sizes[-1], chunks(document.text), document.prompt)
    require(len(sizes) > 0, f"A source must hold text, {if_empty}.")
    return Corpus(name, version, content.hexdigest(), np.array(sizes, np.int64), lambda: with_text(documents()))


def visible_files(root: epath.Path, skipped: frozenset[str] = frozenset()) -> list[epath.Path]:
    """Files under `root`, sorted, without hidden files and the contents of hidden or `skipped` folders.

    Links are followed. Each real folder is read once, and folders that contain `root` never, because links may form cycles.
    """
    seen = set[str]()
    above = os.path.realpath(root) if is_local(root) else ""

    def is_new(folder: epath.Path) -> bool:
        if not is_local(folder):  # no links there
            return True
        real = os.path.realpath(folder)
        if real in seen or os.path.commonpath([real, above]) == real:
            return False
        seen.add(real)
        return True

    def below(folder: epath.Path) -> Iterator[epath.Path]:
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                yield path
            elif path.name not in skipped and is_new(path):
                yield from below(path)

    return list(below(root))


def plain_text(prompt: str, text: str) -> str:
    """A document's prompt and text; for a conversation, its messages in sequence."""
    if prompt != CONVERSATION:
        return prompt + text
    return "\n".join(message["content"] for message in json.loads(text))
