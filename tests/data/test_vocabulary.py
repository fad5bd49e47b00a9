"""A vocabulary covers all the text, or a sample at even distances from all of it, for any division into pieces."""

import doctest
import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.config import Config, DataConfig
from transformer.data import vocabulary
from transformer.data.datasets import open_data
from transformer.data.registry import open_sources
from transformer.data.source import split_text
from transformer.data.tokenizers import long
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.characters import Characters
from transformer.data.tokenizers.long import encode_all, in_pieces
from transformer.data.tokenizers.pretrained import Pretrained
from transformer.data.tokenizers.words import Words
from transformer.data.vocabulary import vocabulary_texts
from transformer.objectives.classification import Classification
from transformer.objectives.next_token import NextToken
from transformer.types import UserError

TEXT = "One two, three's\n\nfour  five\tsix \n seven. It's 12 o'clock\nÉtude 東京 東京\n" * 40


def test_docstring_examples():
    assert doctest.testmod(vocabulary).failed == doctest.testmod(long).failed == 0


@given(text=st.text(st.sampled_from("ab é's.,1\n \t東"), max_size=300), size=st.integers(1, 40))
@settings(deadline=None)
def test_pieces_make_up_the_text_and_are_no_longer_than_four_times_their_size(text, size):
    pieces = list(in_pieces(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) <= 4 * size for piece in pieces)
    assert all(pieces) or text == ""


@given(words=st.lists(st.text(st.sampled_from("ab é's.,1\n\t 東"), max_size=9), max_size=60), size=st.integers(3, 40))
@settings(deadline=None)
def test_the_words_of_pieces_agree_with_the_whole(words, size):
    """Where a text is cut between words, the splitting into words is as of the whole, for both kinds of splitting."""
    text = " x ".join(words)
    for kind in (BytePairs(size=300), Words(size=50)):
        split = kind.train([TEXT])._model.pre_tokenizer.pre_tokenize_str
        pieces, cuts = list(in_pieces(text, size)), 0
        if all(len(piece) < 4 * size for piece in pieces):
            found = [word for piece in pieces for word, _ in split(piece)]
            cuts += len(pieces) - 1
            assert found == [word for word, _ in split(text)]


@pytest.mark.parametrize("kind", [BytePairs(size=400), Words(size=30)], ids=lambda kind: kind.kind)
def test_a_small_corpus_gives_the_vocabulary_of_whole_documents(tmp_path, make_config, monkeypatch, kind):
    (tmp_path / "text.txt").write_text(TEXT * 5)
    config = make_config(tmp_path / "text.txt", tokenizer=kind, record_bytes=64)
    monkeypatch.setattr(vocabulary, "_PIECE", 100)
    sources = open_sources(config)
    assert len(list(vocabulary_texts(sources, config.tokenizer_bytes))) > 50
    expected = kind.train(split_text(sources[0], "train"))
    found = open_data(config, NextToken()).make_tokenizer()
    assert found.to_json() == expected.to_json()  # (of word pieces the library makes another one each time)


@pytest.mark.parametrize("limit", [1000, 5000, 20_000])
def test_a_sample_covers_all_sources_and_has_its_size(make_config, write_jsonl, limit):
    paths = [write_jsonl([{"text": f"{name} {i:05} " * 5} for i in range(900)], f"{name}.jsonl") for name in "ab"]
    config = make_config(*paths, validation_fraction=0.0, tokenizer=BytePairs(size=300), tokenizer_bytes=limit)
    texts = list(vocabulary_texts(open_sources(config), limit))
    assert 0.9 * limit < len("".join(texts).encode()) < 1.1 * limit
    for name, of_source in itertools.groupby(texts, lambda text: text[0]):
        places = [int(text.split()[1]) for text in of_source]
        steps = {after - before for before, after in itertools.pairwise(places)}
        assert len(places) > 0.45 * len(texts), name
        assert max(steps) - min(steps) <= 1
        assert places[0] < 200 and places[-1] >= 700
    tokenizer = open_data(config, NextToken()).make_tokenizer()
    assert tokenizer.to_json() == config.tokenizer.train(texts).to_json()


def test_characters_agree_with_all_the_text(make_config, write_jsonl):
    path = write_jsonl([{"text": f"text {chr(0x4E00 + i)}"} for i in range(300)])
    config = make_config(path, validation_fraction=0.0, tokenizer=Characters(), tokenizer_bytes=1000)
    assert open_data(config, NextToken()).make_tokenizer().vocab_size > 300


def test_examples_are_sampled_too(make_config, write_jsonl):
    rows = [{"text": f"word{i // 10} text", "label": str(i % 2)} for i in range(3000)]
    path = write_jsonl(rows)
    sizes = [
        open_data(make_config(path, tokenizer=Words(size=1000), **limit), Classification()).make_tokenizer().vocab_size
        for limit in ({}, {"tokenizer_bytes": 1000})
    ]
    assert sizes[0] > 290
    assert 50 < sizes[1] < 110


def test_a_sample_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"tokenizer_bytes must be at least 1000, got 10"):
        DataConfig(tokenizer_bytes=10)
    with pytest.raises(UserError, match=r"data\.tokenizer_bytes is for tokenizers that are trained on a sample"):
        Config(data=DataConfig(tokenizer_bytes=2000))
    assert Config(data=DataConfig(tokenizer_bytes=2000, tokenizer=BytePairs())).data.tokenizer_bytes == 2000


# ---- Long texts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(long, "_LONG", 300)
    monkeypatch.setattr(long, "_PIECE", 100)


def _pretrained(pre_tokenizer):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = pre_tokenizer
    letters = [*tokenizers.pre_tokenizers.ByteLevel.alphabet(), "▁"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
    model.train_from_iterator([TEXT], trainer)
    return Pretrained().load(model.to_str())


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    ("make", "is_cut"),
    [
        (lambda: BytePairs(size=400).train([TEXT]), True),
        (lambda: Words(size=60).train([TEXT]), True),
        (lambda: _pretrained(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)), True),
        # A space is put before what has none: pieces begin with one.
        (lambda: _pretrained(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)), True),
        # A space is put before each text: no piece has the ids that it has in the whole.
        (lambda: _pretrained(tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)), False),
    ],
)
def test_a_long_text_has_the_ids_of_the_whole(monkeypatch, make, is_cut):
    tokenizer, encoded = make(), []
    expected = tokenizer.encode(TEXT)
    encode = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: encoded.append(text) or encode(self, text))
    found, short = encode_all(tokenizer, [TEXT, "one"])
    assert found.tolist() == expected.tolist()
    assert short.tolist() == encode(tokenizer, "one").tolist()
    assert (max(map(len, encoded)) < 800) == is_cut
