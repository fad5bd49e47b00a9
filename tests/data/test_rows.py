"""Aligned pairs of tokens, and rows that they are written into."""

import numpy as np

from transformer.data.rows import empty_batch, make_pairs, write_pairs
from transformer.data.source import Record
from transformer.data.tokenizers.bytes import ByteTokenizer

BYTES = ByteTokenizer()
E = BYTES.end_of_text


def _pairs(text, prompt="", continues=False, last=True):
    pairs = make_pairs(BYTES, Record(text, prompt, continues, last))
    assert len(pairs.inputs) == len(pairs.targets) == len(pairs.weights)
    return pairs


def test_a_whole_document_stands_between_two_ends_of_text():
    pairs = _pairs("abc")
    assert pairs.inputs.tolist() == [E, *b"abc"]
    assert pairs.targets.tolist() == [*b"abc", E]
    assert pairs.weights.tolist() == [1, 1, 1, 1]


def test_pieces_meet_without_an_end_of_text():
    first, middle, last = _pairs("abc", last=False), _pairs("def", "", True, False), _pairs("ghi", "", True, True)
    assert first.inputs.tolist() == [E, *b"ab"]
    assert first.targets.tolist() == [*b"abc"]
    assert middle.inputs.tolist() == [*b"de"]
    assert middle.targets.tolist() == [*b"ef"]
    assert last.inputs.tolist() == [*b"ghi"]
    assert last.targets.tolist() == [*b"hi", E]


def test_a_prompt_is_read_and_not_learnt():
    pairs = _pairs("cd", prompt="ab")
    assert pairs.inputs.tolist() == [E, *b"abcd"]
    assert pairs.targets.tolist() == [*b"abcd", E]
    assert pairs.weights.tolist() == [0, 0, 1, 1, 1]


def test_a_document_without_text_has_no_pairs():
    assert len(_pairs("").inputs) == len(_pairs("", prompt="ab").inputs) == 0


def test_pairs_are_written_where_they_fit():
    batch = empty_batch(2, 6)
    assert write_pairs(batch, 1, 0, _pairs("ab"), 1, 1) == 2
    assert write_pairs(batch, 1, 2, _pairs("efghi", prompt="cd"), 0, 2) == 4
    assert batch.inputs.tolist() == [[0] * 6, [*b"ab", E, *b"cde"]]
    assert batch.targets.tolist() == [[0] * 6, [*b"b", E, *b"cdef"]]
    assert batch.weights.tolist() == [[0] * 6, [1, 1, 0, 0, 1, 1]]
    assert batch.segment_ids.tolist() == [[0] * 6, [1, 1, 2, 2, 2, 2]]
    assert batch.positions.tolist() == [[0] * 6, [0, 1, 0, 1, 2, 3]]
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
