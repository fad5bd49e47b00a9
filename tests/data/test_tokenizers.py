"""The contract of tokenizers: round trips, byte counts, saving and loading."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.data.tokenizers import END_OF_TEXT, load_tokenizer
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import Bytes, ByteTokenizer
from transformer.data.tokenizers.characters import Characters
from transformer.tokenizer import TOKENIZERS as FAMILY
from transformer.types import UserError

CORPUS = ["def f(x):\n    return x * x\n" * 20, "naïve 日本語 😀 text\r\n" * 20]
KINDS = {kind.kind: kind for kind in (Bytes(), Characters(), BytePairs(size=300))}
TOKENIZERS = {name: kind.train(CORPUS) for name, kind in KINDS.items()}
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))  # no lone surrogates: UTF-8 has none
corpus_text = st.text(sorted(set("".join(CORPUS))))


@every_tokenizer
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_decoding_inverts_encoding(kind, data):
    tokenizer = TOKENIZERS[kind]
    text = data.draw(corpus_text if kind == "characters" else unicode_text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert np.all((ids >= 0) & (ids < tokenizer.vocab_size))
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text


@every_tokenizer
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_token_bytes_add_up_to_the_bytes_of_the_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    text = data.draw(corpus_text if kind == "characters" else unicode_text)
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0


@every_tokenizer
@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(-2, 310)))
def test_any_integers_can_be_decoded(kind, ids):
    assert isinstance(TOKENIZERS[kind].decode(ids), str)


@every_tokenizer
@settings(max_examples=30, deadline=None)
@given(text=st.text())
def test_any_python_string_can_be_encoded(kind, text):
    tokenizer = TOKENIZERS[kind]
    expected = text.encode("utf-8", "replace").decode()
    decoded = tokenizer.decode(tokenizer.encode(text))
    if kind != "characters":
        assert decoded == expected
    else:
        known = set("".join(CORPUS))
        assert decoded == "".join(c if c in known else "\N{REPLACEMENT CHARACTER}" for c in expected)


@every_tokenizer
def test_a_saved_tokenizer_is_the_same_when_loaded(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run", KINDS[kind])
    assert type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    np.testing.assert_array_equal(loaded.token_bytes, tokenizer.token_bytes)
    for text in (*CORPUS, END_OF_TEXT, "other € characters"):
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@every_tokenizer
def test_the_name_of_the_end_of_text_is_text_like_any_other(kind):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.end_of_text not in tokenizer.encode(f"a{END_OF_TEXT}b")


@every_tokenizer
def test_the_end_of_text_decodes_to_nothing(kind):
    tokenizer = TOKENIZERS[kind]
    ids = [*tokenizer.encode("xx"), tokenizer.end_of_text, *tokenizer.encode("return")]
    assert tokenizer.decode(ids) == "xxreturn"


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_characters_are_sorted_after_the_special_ones():
    tokenizer = Characters().train(["cab", "é b"])
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode(" abcé").tolist() == [2, 3, 4, 5, 6]
    assert tokenizer.encode("z\N{PILE OF POO}a").tolist() == [1, 1, 3]
    assert tokenizer.token_bytes.tolist() == [0, 0, 1, 1, 1, 1, 2]


def test_byte_pairs_are_fewer_than_bytes_and_no_more_than_requested():
    tokenizer = TOKENIZERS["bpe"]
    assert 257 < tokenizer.vocab_size <= 300
    assert BytePairs(size=262).train(CORPUS).vocab_size == 262
    assert len(tokenizer.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert BytePairs().train(["ab"]).vocab_size == 258


@pytest.mark.parametrize("kind", ["words", "wordpiece"])
def test_a_vocabulary_of_words_may_be_small(kind):
    texts = ["to be or not to be"]
    least = 3
    if kind == "wordpiece":  # a piece for each character at the beginning of a word and one for each within
        with pytest.raises(UserError, match=r"at least (\d+) for the characters of these texts, got 3") as refused:
            FAMILY.find(kind)(size=3).train(texts)
        least = int(str(refused.value).split("at least ")[1].split()[0])
    tokenizer = FAMILY.find(kind)(size=least).train(texts)
    assert tokenizer.vocab_size == least
    assert "be" in tokenizer.decode(tokenizer.encode("be"))
    with pytest.raises(UserError, match=f"from 3 to 2\\^24 for the tokenizer '{kind}', or 0 for the default, got 2"):
        FAMILY.find(kind)(size=2)


def test_the_byte_pair_file_is_the_librarys(tmp_path):
    TOKENIZERS["bpe"].save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["model"]["type"] == "BPE"
    assert [token["content"] for token in saved["added_tokens"]] == [END_OF_TEXT]


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must hold tokenizer\.json"):
        load_tokenizer(tmp_path, Bytes())
    for kind in [name for name in FAMILY.names if name not in ("auto", "sentencepiece")]:  # its file needs the library
        for content in ('{"kind": "runes"}', "[]", "", '{"model": 3}', "[" * 10_000):
            (tmp_path / "tokenizer.json").write_text(content)
            with pytest.raises(UserError, match=rf"tokenizer\.json must describe a tokenizer of the kind '{kind}' as"):
                load_tokenizer(tmp_path, FAMILY.find(kind)())
    (tmp_path / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    with pytest.raises(UserError, match=r"must hold '<\|endoftext\|>', this one has 0 others"):
        load_tokenizer(tmp_path, BytePairs())
