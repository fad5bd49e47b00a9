"""Splits that have their shares of the text, never overlap and leave nothing out; pieces that make up the text."""

import doctest

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transformer.data import splits
from transformer.data.documents import Corpus, Document
from transformer.data.splits import SPLITS, assign, cut, divide, hold_out, split_documents
from transformer.types import UserError


def _corpus(*texts):
    documents = [Document(text, f"prompt{i} ", f"{i}") for i, text in enumerate(texts)]
    return Corpus("corpus", "1.0.0", "", np.array([len(text.encode()) for text in texts]), lambda: iter(documents))


def _split(corpus, validation_fraction, test_fraction):
    parts = divide(corpus.sizes, validation_fraction, test_fraction)
    found = list(split_documents(corpus, parts))
    return {split: [document for of, document in found if of == split] for split in SPLITS}


def test_docstring_examples():
    assert doctest.testmod(splits).failed == 0


@pytest.mark.parametrize("now", [["one"], ["one", "two", "three"]], ids=["fewer", "more"])
def test_texts_that_come_or_go_meanwhile_are_an_error(now):
    before, after = _corpus("one", "two"), _corpus(*now)
    with pytest.raises(UserError, match="must stay as it is while it is prepared"):
        list(split_documents(after, divide(before.sizes, 0.1, 0.0)))


# ---- Shares ----------------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.lists(st.integers(1, 100_000), min_size=1, max_size=60),
    st.lists(st.sampled_from([1, 20, 4_000, 31_000, 10_000_000]), min_size=1, max_size=60),
    st.builds(lambda count, size: [size] * count, st.integers(1, 300), st.integers(1, 1000)),
)
SHARES = st.sampled_from([0.0, 0.0005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45])


@given(sizes=SIZES, validation=SHARES, test=SHARES)
@example([31_000, 4_000], 0.1, 0.0)
@example([4_000, 31_000], 0.1, 0.1)
@example([10_000_000] + [2_000] * 50, 0.05, 0.05)
@example([2_000] * 50 + [10_000_000], 0.05, 0.05)
@example([1] * 200 + [1000] * 800, 0.05, 0.0)
@example([5, 5], 0.1, 0.1)
@example([1, 1, 1], 0.45, 0.45)
def test_each_split_has_its_share_of_the_text(sizes, validation, test):
    parts = divide(sizes, validation, test)
    assert parts.min() >= 0
    assert parts.sum(axis=1).tolist() == sizes
    assert np.sum((parts > 0).sum(axis=1) > 1) <= (validation > 0) + (
        test > 0
    )  # a document cut for each split, at most
    total = sum(sizes)
    shares = (1 - validation - test, validation, test)
    for share, size in zip(shares, parts.sum(axis=0), strict=True):
        if total < 3:
            continue
        assert (size > 0) == (share > 0)
        if share * total >= 2:  # less than a byte is rounded up to one
            assert share * total / 1.5 - 1 <= size <= share * total * 1.5 + 1


def test_short_documents_are_not_all_held_out_beside_a_long_one():
    parts = divide([1_000_000] + [1_000] * 40, 0.05, 0.0)
    assert 1 <= np.sum(parts[1:, 1] > 0) <= 4
    assert parts[0, 1] > 0


def test_documents_of_one_length_are_held_out_whole_at_an_even_stride():
    parts = divide([7] * 601, 0.05, 0.0)
    assert np.flatnonzero(parts[:, 1]).tolist() == list(range(0, 601, 20))
    assert np.flatnonzero(parts[:, 1]).tolist() == np.flatnonzero(assign(601, 0.05, 0.0)).tolist()


@given(count=st.integers(1, 300), validation=st.floats(0, 0.49), test=st.floats(0, 0.49))
def test_a_stride_gives_each_split_its_share_of_the_documents(count, validation, test):
    assigned = assign(count, validation, test)
    assert len(assigned) == count
    for split, fraction in ((1, validation), (2, test)):
        assert abs(assigned.count(split) - fraction * count) <= 2


# ---- Classes ---------------------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 400)), min_size=1, max_size=20),
    fraction=st.sampled_from([0.01, 0.02, 0.1, 0.3, 0.5]),
    seed=st.integers(0, 5),
)
@example([990, 10], 0.02, 0)
@example([2] * 20, 0.02, 0)
@example([1, 1, 1], 0.1, 0)
def test_a_share_of_each_class_is_held_out(counts, fraction, seed):
    classes = np.random.RandomState(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    taken = hold_out(classes, fraction)
    assert taken.tolist() == sorted(set(taken.tolist())) == hold_out(classes, fraction).tolist()
    total, held_out = sum(counts), np.bincount(classes[taken], minlength=len(counts))
    if max(counts) == 1:
        assert len(taken) == min(total - 1, max(1, round(fraction * total)))
        return
    assert np.all(held_out < np.array(counts))  # training knows every class
    able = sum(count > 1 for count in counts)
    room = sum(count - 1 for count in counts)
    assert min(room, fraction * total - 0.5) <= len(taken) <= max(1, 1.5 * fraction * total, round(fraction * total))
    if able <= 1.5 * fraction * total:  # the share allows an example of each
        assert all(held > 0 for held, count in zip(held_out, counts, strict=True) if count > 1)
        if able < fraction * total:
            # Others give at most what the small classes take too much, and what the single ones do not give.
            assert np.all(held_out <= np.maximum(fraction * np.array(counts) + 2 + sum(c == 1 for c in counts), 1))


# ---- Texts -----------------------------------------------------------------------------------------------------------


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


@given(
    texts=st.lists(st.text(st.sampled_from("aé日😀"), min_size=1, max_size=30), min_size=1, max_size=12),
    validation=SHARES,
    test=SHARES,
)
@example(["日本語"], 0.1, 0.1)
@example(["😀😀"], 0.45, 0.0)
def test_splits_never_overlap_and_leave_nothing_out(texts, validation, test):
    parts = _split(_corpus(*texts), validation, test)
    for number, text in enumerate(texts):
        stretches = [d for split in SPLITS for d in parts[split] if d.name == str(number)]
        assert "".join(d.text for d in stretches) == text
        assert [d.prompt for d in stretches] == [f"prompt{number} ", "", ""][: len(stretches)]
    asked_for = {"train"} | ({"validation"} if validation else set()) | ({"test"} if test else set())
    if sum(map(len, texts)) >= 6:
        assert {split for split in SPLITS if parts[split]} == asked_for


# ---- Pieces ----------------------------------------------------------------------------------------------------------


@given(text=st.text(st.sampled_from("ab\né日😀"), max_size=400), size=st.integers(64, 100))
def test_pieces_join_to_the_text_and_are_not_too_long(text, size):
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= size for piece in pieces) or text == ""
    assert all(len(piece.encode()) >= size // 2 for piece in pieces[:-1])


@pytest.mark.parametrize("character", ["a", "é", "日", "😀"])
def test_a_piece_is_never_cut_inside_a_character(character):
    assert "".join(cut(character * 100, 66)) == character * 100


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab\ncd\nefgh", ["ab\ncd\n", "efgh"]),  # the last newline that fits
        ("a\nb\nc\nd\ne", ["a\nb\nc\nd\n", "e"]),
        ("a\nbcdefghij", ["a\nbcdefg", "hij"]),  # none in the second half
        ("abcdefg\nij", ["abcdefg\n", "ij"]),  # the last byte of a piece
        ("abcdefgh\nj", ["abcdefgh", "\nj"]),  # just behind it
        ("abcd\nfghij", ["abcd\n", "fghij"]),  # the first byte of the second half
        ("abc\nefghij", ["abc\nefgh", "ij"]),  # just before it
        ("ab\ncd\nef", ["ab\ncd\nef"]),  # short enough
    ],
)
def test_a_piece_ends_behind_the_last_newline_of_its_second_half(text, pieces):
    assert list(cut(text, 8)) == pieces


# ---- Rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "validation", "test", "expected"),
    [
        ([101], 0.1, 0.0, [[90, 11, 0]]),
        ([106], 0.1, 0.0, [[95, 11, 0]]),
        ([109], 0.05, 0.05, [[98, 5, 6]]),
        ([1007], 0.1, 0.2, [[704, 101, 202]]),
        ([9], 0.01, 0.01, [[7, 1, 1]]),
    ],
)
def test_training_is_rounded_down_to_whole_bytes(sizes, validation, test, expected):
    assert divide(sizes, validation, test).tolist() == expected


@pytest.mark.parametrize("every", [3, 5, 7, 10, 20, 30, 50])
def test_rounding_of_shares_does_not_drift(every):
    """The sum of ten times 0.1 is less than 1 in float64."""
    held_out = np.flatnonzero(assign(20 * every, 1 / every, 0.0))
    assert held_out.tolist() == list(range(0, 20 * every, every))


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(24, 0.1, 2), (26, 0.1, 3), (29, 0.1, 3), (7, 0.3, 2), (2, 0.1, 1)]
)
def test_as_many_examples_as_the_nearest_number_are_held_out(count, fraction, held_out):
    assert len(hold_out(np.zeros(count, int), fraction)) == held_out
