"""The tokenizer interface, and how a run directory stores one tokenizer, or a pair for sources and targets."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Int

from transformer.tokenizer import FILE_NAME, TokenizerKind
from transformer.types import UserError
from transformer.validation import require

END_OF_TEXT = "<|endoftext|>"
_SOURCE = "source_tokenizer"

Ids = Sequence[int] | Int[np.ndarray, " n"] | Any


@runtime_checkable
class Vocabulary(Protocol):
    """The properties of a tokenizer that a model and its loss use."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is smaller."""
        ...

    @property
    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """The number of UTF-8 bytes that each id stands for, 0 for special ids; the denominator of bits per byte.

        `end_of_text` has -1 if the tokenizer adds a space before each text.
        """
        ...


@runtime_checkable
class Tokenizer(Vocabulary, Protocol):
    """The properties of a tokenizer that the pipeline, the trainer and generation use.

    It may also have `begin`, `end` and `stop` (tuples of ids), `decoder_start`, `mask`, `sentinels` and `known`, as tokenizers of
    pretrained models do. `transformer.tokenizer` explains them, and the defaults for tokenizers without them.
    """

    @property
    def kind(self) -> str:
        """The name in `data.tokenizer.kind`; for a pair, the kind of the target tokenizer."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id that ends a document and precedes its first token."""
        ...

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Ids of `text`, without end-of-text; a lone surrogate, which has no UTF-8 form, becomes `?`."""
        ...

    def decode(self, ids: Ids) -> str:
        """The text of any integers; special ids and ids outside the vocabulary are dropped."""
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Write the file that `load_tokenizer` reads."""
        ...


AnyVocabulary = TypeVar("AnyVocabulary", bound=Vocabulary)


def known_ids(ids: Ids, vocab_size: int) -> np.ndarray:
    """The ids that belong to the vocabulary."""
    flat = np.asarray(ids, dtype=np.int64).reshape(-1)
    return flat[(flat >= 0) & (flat < vocab_size)]


def write_tokenizer(directory: epath.PathLike, text: str) -> None:
    """Write the tokenizer file, whose content the kind's `load` takes."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FILE_NAME).write_text(text)


class PairTokenizer:
    """A target tokenizer together with a separate source tokenizer."""

    def __init__(self, source: Tokenizer, target: Tokenizer) -> None:
        self.source, self.target, self.kind = source, target, target.kind
        self.vocab_size, self.end_of_text, self.token_bytes = target.vocab_size, target.end_of_text, target.token_bytes

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Ids of a target."""
        return self.target.encode(text)

    def decode(self, ids: Ids) -> str:
        """Text of a target."""
        return self.target.decode(ids)

    def save(self, directory: epath.PathLike) -> None:
        """Write the target tokenizer under the usual name, and the source tokenizer beside it."""
        self.source.save(epath.Path(directory) / _SOURCE)
        self.target.save(directory)


def source_tokenizer(tokenizer: AnyVocabulary) -> AnyVocabulary:
    """The source tokenizer of a pair, else the tokenizer itself."""
    return getattr(tokenizer, "source", tokenizer)


def describe_entries(tokenizer: Tokenizer) -> str:
    """The vocabulary size, or both sizes of a pair."""
    entries, reader = f"{tokenizer.vocab_size:,} entries", source_tokenizer(tokenizer)
    return entries if reader is tokenizer else f"{reader.vocab_size:,} entries for sources, {entries} for targets"


def note_unknown(tokenizer: Tokenizer, tokens: Ids, note: Callable[[str], None]) -> None:
    """Report how many words or characters of a prompt are unknown: the model cannot distinguish them."""
    unknown = int(np.sum(np.asarray(tokens) == getattr(tokenizer, "unknown", -1)))
    if unknown:
        verb = "is" if unknown == 1 else "are"
        note(
            f"{unknown} of the prompt's {len(tokens)} tokens {verb} not in the model's vocabulary, and {verb} read as unknown."
        )


def load_tokenizer(directory: epath.PathLike, kind: TokenizerKind) -> Tokenizer:
    """Load the tokenizer that `Tokenizer.save` wrote to `directory`; `kind` comes from the run's config."""
    if (epath.Path(directory) / _SOURCE).exists():
        return PairTokenizer(_load(epath.Path(directory) / _SOURCE, kind), _load(directory, kind))
    return _load(directory, kind)


def _load(directory: epath.PathLike, kind: TokenizerKind) -> Tokenizer:
    path = epath.Path(directory) / FILE_NAME
    require(path.exists(), f"A run directory must hold {FILE_NAME}, which training writes; {directory} does not.")
    try:
        return kind.open(directory)
    except UserError:
        raise
    except Exception as error:  # the library raises only the base class, and user-defined kinds may raise anything
        raise UserError(
            f"{path} must describe a tokenizer of the kind {kind.kind!r} as training writes it: {error}."
        ) from None


def saved_fields(content: str, kind: str) -> dict[str, Any]:
    """The fields of a tokenizer file that names its kind.

    Raises:
        ValueError: the file names another kind, or is not a tokenizer file.
    """
    fields = json.loads(content)
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        raise ValueError(f"it has {content[:80]!r}")
    return fields
