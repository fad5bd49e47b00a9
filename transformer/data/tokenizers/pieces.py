"""The unchanged SentencePiece model of a pretrained model, wrapped in JSON."""

import base64
import dataclasses
import functools
import json
import re
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from transformer.data.files import without_surrogates
from transformer.data.tokenizers.base import Ids, saved_fields
from transformer.data.tokenizers.pretrained import SpecialIds, SpecialTokenizer, table_of, with_chat
from transformer.tokenizer import FILE_NAME, TOKENIZERS
from transformer.validation import require, require_installed

try:
    import sentencepiece  # pyright: ignore[reportMissingImports]
    from sentencepiece import sentencepiece_model_pb2  # pyright: ignore[reportMissingImports]
except ImportError:
    sentencepiece: Any = None
    sentencepiece_model_pb2: Any = None

_SPACE = "▁"
_BYTES = 256


def wrapped(model: bytes, added: dict[str, int], each_prefixed: bool) -> bytes:
    """The file of a run that stores a SentencePiece model.

    Args:
        model: the content of a `tokenizer.model`.
        added: special tokens that the folder adds to the model, text -> id.
        each_prefixed: text after a special token gets a leading space too (`legacy` of transformers).
    """
    fields = {"kind": "sentencepiece", "each_prefixed": each_prefixed, "added": added}
    return json.dumps({**fields, "model": base64.b64encode(model).decode()}, indent=1).encode()


class PieceTokenizer(SpecialTokenizer):
    """A tokenizer of the `sentencepiece` library."""

    def __init__(self, content: bytes, settings: SpecialIds) -> None:
        fields = saved_fields(content.decode(), settings.kind)
        self.content, self.model = content, base64.b64decode(fields["model"], validate=True)
        self.proto = read_proto(self.model)
        self._processor = _processor(self.model)
        pieces = range(self._processor.get_piece_size())
        self._added: dict[str, int] = {str(text): int(index) for text, index in fields["added"].items()}
        self._each_prefixed = bool(fields["each_prefixed"])
        stands_for_none = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        special = {index for index in pieces if any(is_one(index) for is_one in stands_for_none)}
        self._names = {self._processor.id_to_piece(index): index for index in sorted(special)} | self._added
        known_V = table_of({str(index): index for index in (*pieces, *self._added.values())})
        super().__init__(settings, known_V, special | set(self._added.values()))
        self.unknown = self._processor.unk_id()
        self.sentinels = ()
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        if self._keeps_text():
            for index in set(pieces) - self.special:
                piece = self._processor.id_to_piece(index)
                is_byte = self._processor.is_byte(index)
                self.token_bytes[index] = 1 if is_byte else len(piece.replace(_SPACE, " ").encode())
            if self.proto.normalizer_spec.add_dummy_prefix:
                self.token_bytes[self.end_of_text] = -1

    def _keeps_text(self) -> bool:
        """Whether pieces spell the text: the model normalizes nothing, and characters without a piece become bytes."""
        normalizer = self.proto.normalizer_spec
        bytes_known = sum(map(self._processor.is_byte, range(self._processor.get_piece_size()))) == _BYTES
        return bytes_known and not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces

    def encode(self, text: str, special: bool = False) -> Int[np.ndarray, " n"]:
        """Ids of a text, without the special ids around it; see `PretrainedTokenizer.encode`."""
        text = without_surrogates(text)
        if not special:
            return self.spell_special(np.array(self._processor.encode(text), np.int32))
        ids: list[int] = []
        for part in self._parts.split(text):
            if part in self._names:
                ids.append(self._names[part])
            elif part:
                ids += (self._processor if self._each_prefixed or not ids else self._unprefixed).encode(part)
        return np.array(ids, np.int32)

    @functools.cached_property
    def _parts(self) -> re.Pattern[str]:
        """A pattern that finds the names of special tokens, the longest first."""
        return re.compile("(" + "|".join(map(re.escape, sorted(self._names, key=len, reverse=True))) + ")")

    @functools.cached_property
    def _unprefixed(self) -> Any:
        """The same model without the leading space."""
        proto = read_proto(self.model)
        proto.normalizer_spec.add_dummy_prefix = False
        return _processor(proto.SerializeToString())

    def spelled(self, index: int) -> list[int]:
        """The id itself: of special tokens, the library encodes text only as the unknown token, which stays."""
        return [index] if index == self.unknown or index not in self.special else []

    def name_of(self, index: int) -> str:
        """The piece of an id, or the added token."""
        return next((name for name, known in self._names.items() if known == index), "")

    def decode(self, ids: Ids) -> str:
        """The text of ids; special ids are dropped, and invalid UTF-8 becomes U+FFFD."""
        size = self._processor.get_piece_size()
        return self._processor.decode([index for index in self.drop_special(ids) if index < size])


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class Pieces(SpecialIds):
    """The unchanged SentencePiece model of a pretrained model."""

    kind = "sentencepiece"

    def load(self, content: str) -> PieceTokenizer:
        """Read the model from its JSON."""
        return PieceTokenizer(content.encode(), self)

    def open(self, directory: epath.PathLike) -> PieceTokenizer:
        """Load the tokenizer with its chat templates."""
        return with_chat(self.load((epath.Path(directory) / FILE_NAME).read_bytes().decode()), directory)


def read_proto(model: bytes) -> Any:
    """The fields of a model.

    Raises:
        ValueError: the content is no SentencePiece model.
    """
    require_installed(sentencepiece, "sentencepiece", "sentencepiece")
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's exception
        raise ValueError(f"it is no SentencePiece model ({error!s:.80})") from None
    require(len(proto.pieces) > 0, "A SentencePiece model must have pieces, this one has none.")
    return proto


def _processor(model: bytes) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # RuntimeError of several kinds
        raise ValueError(f"it is no SentencePiece model ({error!s:.80})") from None
