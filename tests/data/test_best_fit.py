"""Best-fit packing: documents that fit in a row are whole, each once an epoch, in chunks that a small state goes on from."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer.config import Config, DataConfig
from transformer.data import packing, streams
from transformer.data.packing import best_fit
from transformer.data.pipeline import evaluation_batches, train_batches
from transformer.data.registry import open_source
from transformer.data.source import Record, Source
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.objectives.masked_lm import MaskedLM
from transformer.objectives.prefix_lm import PrefixLM
from transformer.objectives.span_corruption import SpanCorruption
from transformer.types import UserError

BYTES = ByteTokenizer()
E = BYTES.end_of_text
LENGTH = 16
ROWS_OF_CHUNK = streams.ROWS_OF_CHUNK


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that a small corpus has several."""
    for module in (packing, streams):
        monkeypatch.setattr(module, "ROWS_OF_CHUNK", 4)


def source_of(texts, **fields):
    records = [Record(text, fields.get("prompt", ""), False, True) for text in texts]
    return [Source("records", "", {"train": 0}, "", lambda split: records)]


def config_of(**changes):
    settings = {"sequence_length": LENGTH, "batch_size": 1, "num_streams": 1, "best_fit": True} | changes
    return DataConfig(**settings)


TEXTS = [chr(97 + i % 26) * (1 + 7 * i % 45) + str(i) for i in range(60)]


def segments(batches):
    """(inputs, targets, weights, positions) of each document of each row."""
    for batch in batches:
        for row, ids in enumerate(batch.segment_ids):
            for segment in range(1, ids.max() + 1):
                at = ids == segment
                yield tuple(field[row][at] for field in (batch.inputs, batch.targets, batch.weights, batch.positions))


def until_epoch(iterator, tokens):
    """Batches of one row until so many targets have come."""
    batches, seen = [], 0
    while seen < tokens:
        batches.append(next(iterator))
        seen += np.count_nonzero(batches[-1].segment_ids)
    assert seen == tokens, "an epoch ends with a row"
    return batches


# ---- Rows from sizes -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 5))
def test_rows_hold_each_piece_once_and_no_more_than_fits(sizes, most):
    rows = best_fit(sizes, 40, most)
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    assert all(0 < sum(sizes[piece] for piece in row) <= 40 for row in rows)
    assert most == 0 or all(len(row) <= most for row in rows)
    if most == 0:
        # No two rows would fit in one: a piece went to a new row only where none had room.
        full = sorted(sum(sizes[piece] for piece in row) for row in rows)
        assert len(full) < 2 or full[0] + full[1] > 40


def test_each_piece_goes_to_the_fullest_row_that_has_room():
    # 9 and 8 open rows with 1 and 2 left; 2 fits the second alone, and 1 the fuller first.
    assert best_fit([2, 9, 1, 8], 10, 0) == [[1, 2], [3, 0]]
    # A row that is full of documents takes no more, although there is room.
    assert best_fit([2, 9, 1, 8], 10, 1) == [[1], [3], [0], [2]]


# ---- What training rows hold -----------------------------------------------------------------------------------------


def test_documents_that_fit_are_whole_and_longer_ones_are_cut_into_rows():
    tokens = sum(len(text) + 1 for text in TEXTS)
    iterator = train_batches(config_of(), BYTES, sources=source_of(TEXTS))
    orders = []
    for _ in range(3):
        read = collections.Counter()
        batches = until_epoch(iterator, tokens)
        for inputs, targets, weights, positions in segments(batches):
            assert positions.tolist() == list(range(len(inputs))) and np.all(weights == 1)
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            whole = inputs[0] == E and targets[-1] == E
            assert whole or targets[-1] == E or len(inputs) == LENGTH, "a piece that is no end fills its row"
            read[tuple(targets.tolist())] += 1
        expected = collections.Counter()
        for text in TEXTS:
            ids = [*text.encode(), E]
            expected.update(tuple(ids[start : start + LENGTH]) for start in range(0, len(ids), LENGTH))
        assert read == expected
        orders.append([batch.targets.tobytes() for batch in batches])
    assert len({tuple(order) for order in orders}) == 3


def test_rows_are_fuller_than_whole_documents_in_order_would_be_and_cut_fewer_than_today():
    sources = source_of(TEXTS)
    tokens = sum(len(text) + 1 for text in TEXTS)
    rows = len(until_epoch(train_batches(config_of(), BYTES, sources=sources), tokens))
    assert tokens / (rows * LENGTH) > 0.85

    def cut(best):
        batches = list(itertools.islice(train_batches(config_of(best_fit=best), BYTES, sources=sources), rows))
        return sum(targets[-1] != E for _, targets, _, _ in segments(batches))

    assert cut(True) < cut(False)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_row_holds_at_most_so_many_documents(most):
    texts = ["x" * (1 + i % 5) for i in range(60)]
    iterator = train_batches(config_of(max_segments=most), BYTES, sources=source_of(texts))
    batches = until_epoch(iterator, sum(len(text) + 1 for text in texts))
    assert max(batch.segment_ids.max() for batch in batches) == most
    assert sum(batch.segment_ids.max() for batch in batches) == len(texts)


def test_rows_of_a_chunk_come_in_a_random_order():
    """The longest documents are packed first; they are not read first."""
    texts = ["x" * (1 + i) for i in range(14)]
    iterator = train_batches(config_of(max_segments=1), BYTES, sources=source_of(texts))
    sizes = [np.count_nonzero(batch.segment_ids) for batch in (next(iterator) for _ in range(14))]
    assert sorted(sizes) == list(range(2, 16))
    assert sum(a < b for a, b in itertools.pairwise(sizes)) > 4


def test_the_order_is_frozen():
    """A resumed run must find the data it left, whatever versions of NumPy and Grain it is resumed with."""
    texts = [chr(97 + i) * (i % 5 + 1) for i in range(26)]
    config = DataConfig(sequence_length=12, batch_size=4, num_streams=2, shuffle_seed=1, best_fit=True)
    batch = next(train_batches(config, BYTES, sources=source_of(texts)))
    assert ROWS_OF_CHUNK == 128
    texts = [BYTES.decode(row[weights > 0]) for row, weights in zip(batch.targets, batch.weights, strict=True)]
    assert texts == ["a", "hhhggzf", "nnnniiiip", "wwwllvvk"]


def test_pieces_of_long_documents_are_packed_as_documents(make_config, tmp_path):
    (tmp_path / "long.txt").write_text("".join(f"line {i:03}\n" for i in range(100)))
    config = make_config(tmp_path / "long.txt", record_bytes=90, validation_fraction=0.0, num_streams=1, batch_size=1)
    total = (
        900 + 1 - (len(open_source(config.source[0], config).records("train")) - 1)
    )  # but the first of each further piece
    fitted = until_epoch(train_batches(dataclasses.replace(config, best_fit=True), BYTES), total)
    plain = np.concatenate([batch.targets[0] for batch in itertools.islice(train_batches(config, BYTES), 99)])
    read = np.concatenate([batch.targets[batch.segment_ids > 0] for batch in fitted])
    assert sorted(read) == sorted(plain[:total])


def test_evaluation_does_not_change(make_config, write_folder):
    config = make_config(write_folder())
    fitted = dataclasses.replace(config, best_fit=True)
    for one, two in zip(*(evaluation_batches(c, BYTES, "validation") for c in (config, fitted)), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("objective", [MaskedLM(), PrefixLM()], ids=lambda objective: objective.kind)
def test_objectives_hide_parts_of_its_rows(objective):
    config, sources = config_of(num_streams=0, batch_size=4), source_of(TEXTS)
    changes = objective.changes(BYTES, LENGTH, 0)
    plain, hidden = (
        train_batches(config, BYTES, sources=sources),
        train_batches(config, BYTES, sources=sources, **changes),
    )
    for before, after in ((next(plain), next(hidden)) for _ in range(10)):
        np.testing.assert_array_equal(before.segment_ids, after.segment_ids)
        assert 0 < after.weights.sum() < before.weights.sum()
        assert not after.weights[after.segment_ids == 0].any()


# ---- State -----------------------------------------------------------------------------------------------------------


def test_a_state_within_a_chunk_is_two_numbers_a_stream():
    iterator = train_batches(config_of(), BYTES, sources=source_of(TEXTS))
    states = []
    for _ in range(12):
        next(iterator)
        states.append(json.loads(json.dumps(iterator.get_state())))
    assert states[0] == {**states[0], "best_fit": [LENGTH, 32], "streams": {"0": [[0, 1]]}}
    firsts = [state["streams"]["0"][0][0] for state in states]
    assert firsts == sorted(firsts) and len(set(firsts)) >= 3
    following = [next(iterator) for _ in range(6)]
    fresh = train_batches(config_of(), BYTES, sources=source_of(TEXTS))
    fresh.set_state(states[-1])
    for batch in following:
        np.testing.assert_array_equal(batch.targets, next(fresh).targets)


@pytest.mark.parametrize(
    "changes",
    [{"best_fit": False}, {"sequence_length": 17}, {"max_segments": 5}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_of_other_rows_is_refused(changes):
    ours, theirs = (train_batches(config_of(**c), BYTES, sources=source_of(TEXTS)) for c in ({}, changes))
    for iterator, state in ((ours, theirs.get_state()), (theirs, ours.get_state())):
        with pytest.raises(UserError, match="must continue with the rows it began with"):
            iterator.set_state(state)


def test_a_state_without_it_is_what_it_was():
    iterator = train_batches(config_of(best_fit=False), BYTES, sources=source_of(TEXTS))
    assert sorted(iterator.get_state()) == ["corpus", "num_streams", "step", "streams"]


# ---- Where it is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rows"), [({}, "continued"), ({"joined": True}, "joined"), ({"pack": False}, "windows")]
)
def test_rows_that_are_no_packed_documents_are_refused(changes, rows):
    config = config_of(pack=changes.pop("pack", True))
    with pytest.raises(UserError, match=f"Best-fit packing .* rows that are {rows}; set data.best_fit=False"):
        train_batches(config, BYTES, sources=source_of(TEXTS), **(changes or {"continued": rows == "continued"}))


def test_a_config_without_packed_rows_refuses_the_setting():
    data = DataConfig(best_fit=True)
    with pytest.raises(UserError, match=r"data\.best_fit is for packed rows \(data\.pack=True\), got True"):
        Config(data=dataclasses.replace(data, pack=False))
    with pytest.raises(UserError, match=r"data\.best_fit is for .*, got True for the span_corruption"):
        Config(data=data, objective=SpanCorruption())
    model = dataclasses.replace(Config().model, memory_length=8)
    with pytest.raises(UserError, match=r"data\.best_fit is for rows that do not continue each other"):
        Config(data=data, model=model)
