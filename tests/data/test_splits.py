"""Splits that never overlap, and pieces that make up the text."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer.data import splits
from transformer.data.documents import Corpus, Document
from transformer.data.splits import SPLITS, assign, cut, split_documents


def _corpus(*texts):
    documents = [Document(text, f"prompt{i} ", f"{i}") for i, text in enumerate(texts)]
    return Corpus("corpus", "1.0.0", "", len(documents), lambda: iter(documents))


def _split(corpus, validation_fraction, test_fraction):
    return {
        split: list(
            split_documents(corpus, split, validation_fraction=validation_fraction, test_fraction=test_fraction)
        )
        for split in SPLITS
    }


def test_docstring_examples():
    assert doctest.testmod(splits).failed == 0


@given(count=st.integers(1, 300), validation=st.floats(0, 0.49), test=st.floats(0, 0.49))
def test_each_document_has_one_split_and_the_splits_have_their_shares(count, validation, test):
    parts = assign(count, validation, test)
    assert len(parts) == count
    for split, fraction in (("validation", validation), ("test", test)):
        assert abs(parts.count(split) - fraction * count) <= 2
        assert (parts.count(split) > 0) == (fraction > 0) or count < 3 or fraction < 1e-6


def test_a_twentieth_is_every_twentieth_document():
    parts = assign(601, 0.05, 0.0)
    assert [i for i, split in enumerate(parts) if split == "validation"] == list(range(0, 601, 20))


def test_a_lone_document_is_cut_in_characters_train_first():
    text = "".join(chr(0x4E00 + i) for i in range(1003))
    parts = _split(_corpus(text), 0.1, 0.0)
    assert [d.text for d in parts["train"]] == [text[: int(1003 * 0.9)]]
    assert [d.text for d in parts["validation"]] == [text[int(1003 * 0.9) :]]
    assert parts["test"] == []
    parts = _split(_corpus(text), 0.2, 0.1)
    assert "".join(d.text for split in SPLITS for d in parts[split]) == text
    assert [len(parts[split][0].text) for split in SPLITS] == [702, 200, 101]
    assert [parts[split][0].prompt for split in SPLITS] == ["prompt0 ", "", ""]


@given(count=st.integers(2, 60), validation=st.floats(0, 0.49), test=st.floats(0, 0.49))
def test_splits_never_overlap_and_leave_nothing_out(count, validation, test):
    parts = _split(_corpus(*(f"text {i}" for i in range(count))), validation, test)
    names = [d.name for split in SPLITS for d in parts[split]]
    assert sorted(names, key=int) == [str(i) for i in range(count)]


@given(text=st.text(st.sampled_from("ab\né日😀"), max_size=400), size=st.integers(64, 100))
def test_pieces_join_to_the_text_and_are_not_too_long(text, size):
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= size for piece in pieces) or text == ""
    assert all(len(piece.encode()) >= size // 2 for piece in pieces[:-1])


@pytest.mark.parametrize("character", ["a", "é", "日", "😀"])
def test_a_piece_is_never_cut_inside_a_character(character):
    assert "".join(cut(character * 100, 66)) == character * 100
