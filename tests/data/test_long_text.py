"""A text too long for memory gives what the same text gives that is held whole."""

import bz2
import dataclasses
import gzip
import lzma
import shutil

import numpy as np
import pytest
import zstandard
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.data import long_text, token_shards, tokens
from transformer.data.documents import file_documents
from transformer.data.encoded import encode_long, encode_records
from transformer.data.identity import ContentHash
from transformer.data.long_text import LongText, chunks, file_texts, num_bytes
from transformer.data.pipeline import evaluation_batches
from transformer.data.registry import open_source
from transformer.data.shards import Shards
from transformer.data.source import WHOLE, Record
from transformer.data.splits import cut, split_document
from transformer.data.tokenizers import long
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokenizers.wordpiece import WordPieces
from transformer.data.tokens import document_tokens, open_tokens
from transformer.types import UserError

PACK = {"plain": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}


@pytest.fixture
def short_memory(monkeypatch):
    """Texts of a few bytes are long, and are read a few bytes at a time."""
    for module in (long_text, token_shards):
        monkeypatch.setattr(module, "LONG", 100)
    monkeypatch.setattr(long_text, "_CHUNK", 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("pack", PACK)
@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab é漢😀\n #", min_size=1, max_size=400),
    separator=st.sampled_from(["", "#", "##", " #", "\n\n", "é"]),
    mark=st.booleans(),
    held=st.sampled_from([0, 10, 100]),
    data=st.data(),
)
def test_parts_of_a_file_equal_parts_of_its_text(folder, pack, text, separator, mark, held, data):
    text = text.removeprefix("\ufeff")
    path = folder / "text.txt"
    path.write_bytes(PACK[pack]((b"\xef\xbb\xbf" if mark else b"") + text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "LONG", held)
        patch.setattr(long_text, "_CHUNK", 16)
        documents = list(file_documents(folder, [path], separator))
        first, *others = text.split(separator) if separator else [text]
        wanted = [first, *(other.removeprefix("\n") for other in others)]
        assert [document.text.encode().decode() for document in documents] == wanted
        for document, whole in zip(documents, wanted, strict=True):
            # Of no text, no more is asked: it is no document.
            if not whole:
                continue
            assert num_bytes(document.text) == len(whole.encode()) and b"".join(chunks(document.text)).decode() == whole
            assert document.text.isspace() == whole.isspace()
            assert list(cut(document.text, 21)) == list(cut(whole, 21))
            if isinstance(document.text, LongText):
                stops = data.draw(st.tuples(*[st.integers(0, num_bytes(document.text))] * 2).map(sorted))
                sizes = np.diff([0, *stops, num_bytes(document.text)])
                parts = [part.text.encode().decode() for _, part in split_document(document, sizes)]
                assert "".join(parts) == whole
                # A short text gives each part a character; a long one has enough of them.
                ends = np.cumsum([len(part.encode()) for part in parts])
                assert all(min(abs(end - stop) for stop in [*stops, num_bytes(document.text)]) < 4 for end in ends)


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("separator", ["", "END"])
def test_a_corpus_is_prepared_as_one_that_is_held_whole(tmp_path, make_config, monkeypatch, pack, separator):
    lines = [f"line {i} of é漢😀 words\n" + "\n" * (i % 4 == 0) for i in range(200)]
    path = tmp_path / "text.txt"
    path.write_bytes(PACK[pack]("".join(lines[:150] + ["END\n"] * (separator != "") + lines[150:]).encode()))

    made = [kind.train(lines) for kind in (BytePairs(size=300), WordPieces(size=100))]

    def prepared(data_dir):
        config = make_config(path, separator=separator, record_bytes=64, validation_fraction=0.2, test_fraction=0.1)
        config = dataclasses.replace(config, data_dir=str(tmp_path / data_dir))
        source = open_source(str(path), config)
        records = {split: list(source.records(split)) for split in source.split_names}
        tokens = [
            [(part.tokens.tolist(), part.weights.tolist(), part.last) for part in sequence]
            for one in (*made, ByteTokenizer())
            for sequence in (open_tokens(source, "train", one), document_tokens(source, WHOLE, one))
        ]
        return source.fingerprint, source.sizes, records, tokens

    whole = prepared("whole")
    monkeypatch.setattr(long_text, "LONG", 100)
    monkeypatch.setattr(long_text, "_CHUNK", 32)
    monkeypatch.setattr(token_shards, "LONG", 100)
    monkeypatch.setattr(token_shards, "LONGEST", 64)
    monkeypatch.setattr(long, "_LONG", 256)
    monkeypatch.setattr(long, "_PIECE", 64)
    assert any(isinstance(text, LongText) for text in file_texts(epath.Path(path), separator))
    assert prepared("in pieces") == whole


@pytest.mark.parametrize("separator", ["", "END"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * 500 + b"\xff" + b"b" * 99, "byte 500: 0xff"),
        (b"a" * 450 + b"END" + b"b" * 47 + b"\xff", "byte 500: 0xff"),
        (b"a" * 500 + b"\0" + b"b" * 99, "NUL at byte 500"),
        ("é".encode() * 250 + "é".encode()[:1], "byte 500: 0xc3"),
        ("text ".encode("utf-16") * 99, "is UTF-16"),
        (b"PK\x03\x04" + b"a" * 500, "is zip data"),
        (gzip.compress(np.random.default_rng(0).bytes(2000).hex().encode())[:900], "A compressed file must be whole"),
    ],
)
def test_what_is_no_text_is_refused_with_its_location(tmp_path, make_config, short_memory, content, message, separator):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(str(path), make_config(path, separator=separator))
    assert not list(tmp_path.glob("prepared/text_records/*/prepared.json"))


@pytest.mark.parametrize("change", ["written to", "cut off", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, short_memory, change):
    path = epath.Path(tmp_path / "text.txt")
    path.write_text("a line\n" * 100)
    (text,) = file_texts(path, "")
    read = text.chunks()
    next(read)
    if change == "replaced":
        shutil.copy(path, tmp_path / "other.txt")
        (tmp_path / "other.txt").write_text("a lime\n" * 101)
        (tmp_path / "other.txt").rename(path)
    else:
        path.write_text("a lime\n" * (50 if change == "cut off" else 101))
    with pytest.raises(UserError, match="must stay as it is"):
        list(read)


@pytest.mark.parametrize("before", range(20, 40))
@pytest.mark.parametrize("separator", ["END", "\n\n", "EE"])
def test_a_separator_is_found_wherever_it_lies(folder, monkeypatch, before, separator):
    monkeypatch.setattr(long_text, "LONG", 0)
    monkeypatch.setattr(long_text, "_CHUNK", 16)
    path = folder / "text.txt"
    path.write_text("x" * before + separator + "y" * 30)
    assert [text.encode() for text in file_texts(path, separator)] == [b"x" * before, b"y" * 30]


class _Closed(ByteTokenizer):
    """With ids on both sides of a text."""

    begin, end = (256,), (256,)


@settings(max_examples=200, deadline=None)
@given(
    tokenizer=st.sampled_from([ByteTokenizer(), _Closed()]),
    prompt=st.sampled_from(["", "p", "prompt"]),
    pieces=st.lists(st.text("ab \n", min_size=1, max_size=9), min_size=1, max_size=9),
    most=st.integers(1, 20),
)
def test_a_document_that_comes_in_pieces_is_encoded_as_a_whole(tokenizer, prompt, pieces, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "LONGEST", most)
        patch.setattr(long, "_LONG", 4)
        patch.setattr(long, "_PIECE", 1)
        (whole,) = encode_records(tokenizer, [Record("".join(pieces), prompt, continues=False, last=True)])
        wanted = [(one.tokens.tolist(), one.weights.tolist(), one.last) for one in token_shards._parts(whole)]
        parts = encode_long(tokenizer, prompt, iter(pieces), most)
        assert [(one.tokens.tolist(), one.weights.tolist(), one.last) for one in parts] == wanted


@given(pieces=st.lists(st.text(max_size=9), min_size=1, max_size=4), prompt=st.text(max_size=4))
def test_a_text_in_pieces_has_the_hash_of_the_whole(pieces, prompt):
    one, other = ContentHash(), ContentHash()
    data = [piece.encode() for piece in pieces]
    one.add("".join(pieces), prompt)
    other.add_text(sum(map(len, data)), data, prompt)
    assert one.hexdigest() == other.hexdigest()


@pytest.mark.parametrize("stored", [False, True])
def test_of_a_long_document_no_more_is_read_than_the_limit_allows(tmp_path, make_config, monkeypatch, stored):
    for module, name in ((token_shards, "LONGEST"), (tokens, "LONGEST"), (long, "_LONG"), (long, "_PIECE")):
        monkeypatch.setattr(module, name, 16)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"word {i}\n" for i in range(500)))
    source = open_source(str(path), make_config(path, record_bytes=64))
    (whole,) = document_tokens(source, "train", ByteTokenizer(), 0 if stored else 10**9)
    read, once = [], Shards.__getitem__
    monkeypatch.setattr(Shards, "__getitem__", lambda self, index: read.append(index) or once(self, index))
    (limited,) = document_tokens(source, "train", ByteTokenizer(), 100)
    assert 100 <= limited.num_targets < 200 and len(read) < 20
    assert limited.tokens.tolist() == whole.tokens[: len(limited.tokens)].tolist()
    config = make_config(path, limit=100)
    (batch, *_) = batches = list(evaluation_batches(config, ByteTokenizer(), "train", sources=[source]))
    assert sum(int(batch.weights.sum()) for batch in batches) == 100
    assert batch.targets[0].tolist() == whole.tokens[1 : 1 + config.sequence_length].tolist()
