"""Hidden spans: as many and as long as asked for, and nothing of a row is lost between its source and its target."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.data.datasets import open_data
from transformer.data.rows import empty_batch
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.objectives.next_token import NextToken
from transformer.objectives.span_corruption import SpanCorruption, hide_spans, span_pairs
from transformer.types import PairBatch

BYTES = ByteTokenizer()
E = BYTES.end_of_text
V = BYTES.vocab_size
OBJECTIVE = SpanCorruption()


def row(tokens, config=OBJECTIVE, *, length=None, place=(0, 0), seed=0):
    """A row of tokens with its spans hidden."""
    batch = empty_batch(1, length or len(tokens))
    batch.inputs[0, : len(tokens)], batch.segment_ids[0, : len(tokens)] = tokens, 1
    hide_spans(config, seed)(batch, 0, place)
    return batch


def pairs(batch, config=OBJECTIVE):
    return span_pairs(config, BYTES, batch.inputs.shape[1])(batch)


def sequences(pair_batch, row):
    """Source, inputs and targets of a row without their padding."""
    if pair_batch.segment_ids is None:
        return tuple(tokens[row].tolist() for tokens in (pair_batch.source, pair_batch.inputs, pair_batch.targets))
    source = pair_batch.source[row][pair_batch.source_segment_ids[row] > 0].tolist()
    at = pair_batch.segment_ids[row] > 0
    np.testing.assert_array_equal(pair_batch.weights[row], at.astype(np.float32))
    return source, pair_batch.inputs[row][at].tolist(), pair_batch.targets[row][at].tolist()


def spans_of(tokens):
    """{sentinel: the tokens behind it}, and the sentinels in order."""
    spans, order = {}, []
    for token in tokens:
        if token >= V:
            order.append(token)
            spans[token] = []
        else:
            spans[order[-1]].append(token)
    return spans, order


def restored(source, targets):
    spans, order = spans_of(targets[:-1])
    assert order == list(range(V, V + len(order)))
    assert [token for token in source if token >= V] == order
    assert all(spans.values())
    assert source[-1] == targets[-1] == E
    return [part for token in source[:-1] for part in (spans[token] if token >= V else [token])]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, V - 1), min_size=2, max_size=60),
    padding=st.integers(0, 9),
    density=st.sampled_from([0.15, 0.3, 0.5]),
    mean=st.sampled_from([2.0, 3.0, 5.5]),
    place=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_source_and_target_make_the_row(tokens, padding, density, mean, place):
    config = SpanCorruption(noise_density=density, mean_span_length=mean)
    source, inputs, targets = sequences(
        pairs(row(tokens, config, length=len(tokens) + padding, place=place), config), 0
    )
    assert restored(source, targets) == tokens
    assert inputs == [E, *targets[:-1]]
    hidden, spans = config.num_hidden(len(tokens))
    assert len(targets) == hidden + spans + 1
    assert len(source) == len(tokens) - hidden + spans + 1


def test_a_frozen_draw():
    tokens = np.frombuffer(b"Thank you for inviting me to your party last week", np.uint8)
    source, _, targets = sequences(pairs(row(tokens, place=(3, 4), seed=5)), 0)
    assert shown(source) == "Thank you for inviting <0>to your pa<1>last week."
    assert shown(targets) == "<0>me <1>rty ."


def shown(tokens):
    return "".join(chr(token) if token < 256 else "." if token == E else f"<{token - V}>" for token in tokens)


def test_density_and_lengths_of_spans():
    starts, lengths = np.zeros(200), []
    for place in range(500):
        batch = row(np.zeros(200, np.int32), place=(0, place))
        assert batch.weights.sum() == 30
        edges = np.diff(batch.weights[0], prepend=0, append=0)
        begin, end = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        assert len(begin) == 10
        starts += batch.weights[0]
        lengths += (end - begin).tolist()
    assert np.mean(lengths) == 3
    # One of the 29 choose 9 ways to cut 30 in ten: a length of 1 in 9 of 29.
    np.testing.assert_allclose(np.mean(np.array(lengths) == 1), 9 / 29, atol=0.03)
    # Every place is hidden about as often, those at the ends too.
    np.testing.assert_allclose(starts.reshape(10, 20).mean(axis=1) / 500, 0.15, atol=0.03)
    assert starts[[0, -1]].min() > 0


def test_place_and_seed_decide():
    draws = [
        [row(np.zeros(60, np.int32), place=place, seed=seed).weights.tolist() for place in ((1, 2), (2, 1), (1, 3))]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1] != draws[0][2] != draws[0][0]


def test_rows_with_nothing_to_hide_are_filler():
    for tokens in ([], [7]):
        batch = pairs(row(np.array(tokens, np.int32), length=30))
        assert batch.weights.sum() == batch.segment_ids.sum() == batch.source_segment_ids.sum() == 0


@pytest.fixture
def config(make_config, write_folder):
    return make_config(write_folder(), sequence_length=40, validation_fraction=0.3)


@pytest.fixture
def data(config):
    return open_data(config, OBJECTIVE)


def assert_equal(actual, expected):
    for name, a, b in zip(PairBatch._fields, actual, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_training_rows_agree_with_the_text(config, data):
    corrupted, plain = data.train_batches(BYTES), open_data(config, NextToken()).train_batches(BYTES)
    for _ in range(5):
        pair_batch, batch = next(corrupted), next(plain)
        assert isinstance(pair_batch, PairBatch)
        assert [field.dtype for field in pair_batch if field is not None] == [np.int32] * 3 + [np.float32]
        assert pair_batch.source.shape == (4, 40 - 6 + 2 + 1)
        assert pair_batch.targets.shape == (4, 6 + 2 + 1)
        # Training rows are full, and so are their sources and targets.
        assert pair_batch.weights.min() == 1
        assert pair_batch.source_segment_ids is pair_batch.segment_ids is None
        for index in range(4):
            source, _, targets = sequences(pair_batch, index)
            assert restored(source, targets) == batch.inputs[index].tolist()
        assert corrupted.get_state() == plain.get_state()


def test_any_number_of_processes_and_a_restart_give_the_same(data):
    iterator = data.train_batches(BYTES)
    batches = [next(iterator) for _ in range(6)]
    halves = [data.train_batches(BYTES, process_index=i, process_count=2) for i in (0, 1)]
    for batch in batches:
        parts = [next(half) for half in halves]
        joined = jax.tree.map(lambda *fields: np.concatenate(fields), *parts)
        assert joined.segment_ids is None
        jax.tree.map(np.testing.assert_array_equal, joined, batch)
    fresh = data.train_batches(BYTES)
    for _ in range(3):
        next(fresh)
    again = data.train_batches(BYTES)
    again.set_state(fresh.get_state())
    jax.tree.map(np.testing.assert_array_equal, next(again), batches[3])
    assert not np.array_equal(batches[0].source, batches[1].source)


def test_evaluation_has_the_whole_split_the_same_each_time(config, data):
    batches = data.evaluation_batches(BYTES, "validation")
    first = list(batches)
    for a, b in zip(first, list(batches), strict=True):
        assert_equal(a, b)
    plain = list(open_data(config, NextToken()).evaluation_batches(BYTES, "validation"))
    for pair_batch, batch in zip(first, plain, strict=True):
        for index in range(4):
            source, _, targets = sequences(pair_batch, index)
            if targets:
                assert restored(source, targets) == batch.inputs[index][batch.segment_ids[index] > 0].tolist()
    halves = [list(data.evaluation_batches(BYTES, "validation", process_index=i, process_count=2)) for i in (0, 1)]
    for batch, *parts in zip(first, *halves, strict=True):
        assert_equal([np.concatenate(fields) for fields in zip(*parts, strict=True)], batch)


def test_padding_is_zeros_on_both_sides():
    """A row that is shorter than the others, and one without tokens: ids of no word, segment 0, weight 0."""
    batch = empty_batch(3, 40)
    for index, length in enumerate((40, 12, 0)):
        batch.inputs[index, :length], batch.segment_ids[index, :length] = 7, 1
        hide_spans(OBJECTIVE, 0)(batch, index, (0, index))
    made = pairs(batch)
    assert (made.segment_ids[0] == 1).all() and (made.source_segment_ids[0] == 1).all()
    assert 0 < made.segment_ids[1].sum() < made.segment_ids.shape[1]
    for ids, valid in ((made.source, made.source_segment_ids), (made.inputs, made.segment_ids)):
        assert not ids[valid == 0].any()
        assert not valid[2].any()
    assert not made.targets[made.segment_ids == 0].any()
    np.testing.assert_array_equal(made.weights, made.segment_ids)
