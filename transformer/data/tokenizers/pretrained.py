"""The tokenizer of a pretrained model: its unchanged `tokenizer.json`, and the special ids that its folder names."""

import copy
import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Bool, Int

from transformer.data.files import without_surrogates
from transformer.data.tokenizers.base import Ids, known_ids
from transformer.data.tokenizers.byte_counts import count_bytes, in_alphabet
from transformer.tokenizer import FILE_NAME, TOKENIZERS, TokenizerKind
from transformer.types import UserError
from transformer.validation import require

CHAT_FILE = "chat_template.json"
"""Chat templates by name, and the texts of the special tokens that they use."""
_MOST_IDS = 2**24


@dataclasses.dataclass(frozen=True)
class SpecialIds(TokenizerKind):
    """The special ids of a pretrained tokenizer, as `from_folder` finds them; -1 or an empty list means none."""

    begin: tuple[int, ...] = ()
    """Ids before a text, such as BERT's [CLS] or Llama's <|begin_of_text|>."""
    end: tuple[int, ...] = ()
    """Ids after a text of an encoder, such as [SEP] or T5's </s>."""
    end_of_text: int = 0
    """The id that ends a document."""
    stop: tuple[int, ...] = ()
    """Ids that end generation; empty means end_of_text alone."""
    pad: int = -1
    """The padding id."""
    decoder_start: int = -1
    """The id before a target of an encoder-decoder; -1 means end_of_text."""
    mask: int = -1
    """The id that replaces a masked token; -1 means one more than the largest id."""

    def train(self, texts: Iterable[str]) -> NoReturn:
        """A pretrained tokenizer is not trained."""
        del texts
        raise UserError(
            f"A tokenizer of the kind {self.kind} comes with a pretrained model and is not trained; start from an imported run "
            "(training.init_from), or choose another data.tokenizer.kind."
        )

    @property
    def all_ids(self) -> set[int]:
        """Every special id."""
        named = {*self.begin, *self.end, *self.stop, self.end_of_text, self.pad, self.decoder_start, self.mask}
        return named - {-1}


class SpecialTokenizer:
    """Base of the tokenizers of pretrained models: special ids stand for no text, and no text becomes a special id."""

    def __init__(self, settings: SpecialIds, known_V: Bool[np.ndarray, " V"], special: set[int]) -> None:
        self.kind, self.settings, self.known, self.vocab_size = settings.kind, settings, known_V, len(known_V)
        missing = [index for index in settings.all_ids if not (0 <= index < len(known_V) and known_V[index])]
        require(
            not missing,
            f"Special ids must belong to the tokenizer, which has {int(known_V.sum())} tokens below {len(known_V)}, got "
            f"{', '.join(map(str, sorted(missing)))}.",
        )
        self.begin, self.end, self.end_of_text = settings.begin, settings.end, settings.end_of_text
        self.stop, self.decoder_start, self.mask, self.pad = (
            settings.stop,
            settings.decoder_start,
            settings.mask,
            settings.pad,
        )
        self.special = special | settings.all_ids
        self._special_N = np.array(sorted(self.special))
        self.chat_file = b""

    def drop_special(self, ids: Ids) -> list[int]:
        """The ids that stand for text."""
        flat = known_ids(ids, self.vocab_size)
        return flat[~np.isin(flat, self._special_N)].tolist()

    def spell_special(self, ids_N: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
        """Replace special ids in an encoded text by the ids of their names: in a text, such a name is ordinary text."""
        if not np.isin(ids_N, self._special_N).any():
            return ids_N
        return np.array([piece for index in ids_N.tolist() for piece in self.spelled(index)], np.int32)

    def spelled(self, index: int) -> list[int]:
        """The ids that spell the name of a special token as text; an ordinary id is returned as it is."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """The name of an id in the tokenizer file."""
        raise NotImplementedError

    def save(self, directory: epath.PathLike) -> None:
        """Write unchanged copies of the tokenizer's files."""
        path = epath.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE_NAME).write_bytes(self.content)
        if self.chat_file:
            (path / CHAT_FILE).write_bytes(self.chat_file)

    content: bytes


class PretrainedTokenizer(SpecialTokenizer):
    """A pretrained tokenizer of the `tokenizers` library."""

    def __init__(self, content: bytes, settings: SpecialIds) -> None:
        self.content, fields = content, read_fields(content)
        self._model = read_model(content)
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        known_V, added = table_of(vocabulary), fields.get("added_tokens") or []
        super().__init__(settings, known_V, {token["id"] for token in added if token["special"]})
        self.unknown = _unknown(fields["model"], vocabulary)
        counts = count_bytes(fields, vocabulary, self.special, self.vocab_size)
        self.token_bytes = counts.token_bytes
        if counts.adds_space:
            self.token_bytes[self.end_of_text] = -1
        names = (f"<extra_id_{number}>" for number in range(len(vocabulary)))
        found = list(map(vocabulary.get, names))
        self.sentinels = tuple(found[: found.index(None)] if None in found else found)
        self._byte_level = '"ByteLevel"' in json.dumps([fields.get("pre_tokenizer"), fields.get("normalizer")])

    def encode(self, text: str, special: bool = False) -> Int[np.ndarray, " n"]:
        """Ids of a text, without the special ids around it.

        Args:
            text: any text.
            special: names of special tokens in the text become these tokens, as in a rendered chat template; else they are text.
        """
        return _ids(self._with_special, [text])[0] if special else self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
        """Ids of each text."""
        return [self.spell_special(ids_N) for ids_N in _ids(self._model, texts)]

    def decode(self, ids: Ids) -> str:
        """The text of ids; special ids are dropped, and invalid UTF-8 becomes U+FFFD."""
        return self._model.decode(self.drop_special(ids), skip_special_tokens=True)

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        model = copy.deepcopy(self._model)
        model.encode_special_tokens = False
        return model

    def spelled(self, index: int) -> list[int]:
        """Encode the name of a special token in two parts, so that the library does not find the token; unknown stays unknown."""
        if index == self.unknown or index not in self.special:
            return [index]
        name = self.name_of(index)
        name = in_alphabet(name) if self._byte_level else name.replace(" ", "▁")
        pieces = [piece.id for part in (name[:1], name[1:]) if part for piece in self._model.model.tokenize(part)]
        return [piece for piece in pieces if piece == self.unknown or piece not in self.special]

    def name_of(self, index: int) -> str:
        """The token of an id."""
        return self._model.id_to_token(index) or ""


def _ids(model: tokenizers.Tokenizer, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
    encodings = model.encode_batch_fast([without_surrogates(text) for text in texts], add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class Pretrained(SpecialIds):
    """The unchanged tokenizer.json of a pretrained model."""

    kind = "pretrained"

    def load(self, content: str) -> PretrainedTokenizer:
        """Read any file of the `tokenizers` library."""
        return PretrainedTokenizer(content.encode(), self)

    def open(self, directory: epath.PathLike) -> PretrainedTokenizer:
        """Load the tokenizer with its chat templates."""
        return with_chat(self.load((epath.Path(directory) / FILE_NAME).read_bytes().decode()), directory)


AnySpecial = TypeVar("AnySpecial", bound=SpecialTokenizer)


def with_chat(tokenizer: AnySpecial, directory: epath.PathLike) -> AnySpecial:
    """Add the chat templates stored in a tokenizer's directory."""
    path = epath.Path(directory) / CHAT_FILE
    tokenizer.chat_file = path.read_bytes() if path.exists() else b""
    return tokenizer


def read_fields(content: bytes) -> dict[str, Any]:
    """The fields of a `tokenizer.json`.

    Raises:
        ValueError: the content is no `tokenizer.json`.
    """
    fields = json.loads(content.decode())
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        raise ValueError(f"it has {content[:80]!r}")
    return fields


def read_model(content: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer, without the padding and truncation that the file may set.

    Raises:
        ValueError: the library refuses the file.
    """
    try:
        model: Any = tokenizers.Tokenizer.from_str(content.decode())
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises only base classes, or a panic that is not an Exception
        raise ValueError(str(error)) from None
    model.no_padding()
    model.no_truncation()
    model.encode_special_tokens = True
    return model


def table_of(vocabulary: dict[str, int]) -> Bool[np.ndarray, " V"]:
    """A mask of the ids that have a token, up to the largest id."""
    size = max(vocabulary.values(), default=-1) + 1
    require(
        0 < size <= _MOST_IDS,
        f"A tokenizer must have from 1 to {_MOST_IDS:,} ids, the largest of this one is {size - 1:,}.",
    )
    known_V = np.zeros(size, bool)
    known_V[list(vocabulary.values())] = True
    return known_V


def _unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int:
    """The id of the unknown token; -1 if there is none."""
    index = model.get("unk_id") if model.get("type") == "Unigram" else vocabulary.get(model.get("unk_token") or "")
    return index if isinstance(index, int) else -1
