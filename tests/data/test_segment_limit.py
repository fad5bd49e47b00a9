"""Rows have at most `data.max_segments` documents, and a promise of it is held where batches are placed."""

import dataclasses
import itertools

import numpy as np
import pytest

from transformer.config import Config, DataConfig, ParallelConfig
from transformer.data.datasets import open_data
from transformer.data.pipeline import evaluation_batches, train_batches
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.objectives.span_corruption import SpanCorruption
from transformer.parts import Steps, resolve
from transformer.types import Batch, UserError

BYTES = ByteTokenizer()
MOST = 3


@pytest.fixture
def short(write_jsonl):
    """Documents of one to nine bytes."""
    return write_jsonl([{"text": "x" * (1 + i % 9)} for i in range(200)])


def taken(iterator, count=30):
    return list(itertools.islice(iterator, count))


def test_training_rows_end_after_so_many_documents(make_config, short):
    config = make_config(short, sequence_length=32, max_segments=MOST)
    limited = taken(train_batches(config, BYTES))
    free = taken(train_batches(dataclasses.replace(config, max_segments=0), BYTES))
    assert max(batch.segment_ids.max() for batch in free) > MOST
    assert {int(row.max()) for batch in limited for row in batch.segment_ids} == {MOST}
    for batch in limited:
        padding = batch.segment_ids == 0
        assert padding.any(axis=1).all() and not padding[:, 0].any()
        assert np.all(np.diff(padding.astype(int), axis=1) >= 0)  # at the end alone
        assert not any(field[padding].any() for field in batch)


def test_no_text_is_lost_and_none_is_read_twice(make_config, short):
    config = make_config(short, sequence_length=32, batch_size=1, num_streams=1, validation_fraction=0.0)

    def targets(most):
        batches = taken(train_batches(dataclasses.replace(config, max_segments=most), BYTES))
        return np.concatenate([batch.targets[batch.weights > 0] for batch in batches])

    limited, free = targets(MOST), targets(0)
    assert len(limited) < len(free)
    np.testing.assert_array_equal(limited, free[: len(limited)])


def test_evaluation_rows_end_too_and_every_target_counts_once(make_config, short):
    config = make_config(short, sequence_length=32, max_segments=MOST)
    limited = list(evaluation_batches(config, BYTES, "validation"))
    free = list(evaluation_batches(dataclasses.replace(config, max_segments=0), BYTES, "validation"))
    assert max(batch.segment_ids.max() for batch in limited) == MOST < max(batch.segment_ids.max() for batch in free)
    for batch in limited:
        padding = batch.segment_ids == 0
        assert np.all(np.diff(padding.astype(int), axis=1) >= 0)

    def counted(batches):
        return np.concatenate([batch.targets[batch.weights > 0] for batch in batches])

    np.testing.assert_array_equal(counted(limited), counted(free))


def test_a_state_goes_on_exactly(make_config, short):
    config = make_config(short, sequence_length=32, max_segments=MOST)
    whole = taken(train_batches(config, BYTES), 12)
    first = train_batches(config, BYTES)
    taken(first, 7)
    second = train_batches(config, BYTES)
    second.set_state(first.get_state())
    for actual, expected in zip(taken(second, 5), whole[7:], strict=True):
        for name, x, y in zip(Batch._fields, actual, expected, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


def test_rows_that_are_continued_joined_or_windows_have_no_limit(make_config, short):
    config = make_config(short, sequence_length=32, max_segments=MOST)
    assert min(batch.segment_ids.min() for batch in taken(train_batches(config, BYTES, continued=True))) == 1
    changes = SpanCorruption().changes(BYTES, 32, 0)
    (few, _), (many, _) = (
        (next(train_batches(dataclasses.replace(config, max_segments=most), BYTES, **changes)), most)
        for most in (MOST, 0)
    )
    np.testing.assert_array_equal(few.source, many.source)
    windows = next(train_batches(dataclasses.replace(config, pack=False), BYTES))
    np.testing.assert_array_equal(windows.positions, np.broadcast_to(np.arange(32), windows.inputs.shape))
    assert windows.weights.min() == 1


def test_an_epoch_counts_the_padding(make_config, short):
    data = make_config(short, sequence_length=32, batch_size=1, num_streams=1, max_segments=MOST)
    steps = open_data(data, Config().objective).batches_of_epoch(BYTES)
    free = open_data(dataclasses.replace(data, max_segments=0), Config().objective).batches_of_epoch(BYTES)
    assert steps > 1.2 * free
    batches = taken(train_batches(data, BYTES), round(steps))
    targets = sum(int((batch.weights > 0).sum()) for batch in batches)
    assert targets == pytest.approx(free * 32, rel=0.05)


# ---- The promise -----------------------------------------------------------------------------------------------------


def make_steps(kind="next_token", own_batches=False, memory_length=0, **data):
    block = BlockConfig(AttentionConfig(num_heads=2))
    length = 32 if kind == "span_corruption" else 8
    config = Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(block,), memory_length=memory_length),
        data=DataConfig(sequence_length=length, batch_size=2, **data),
        objective=OBJECTIVES.find(kind)(),
        parallel=ParallelConfig(data=1),
    )
    return Steps(resolve(config, BYTES), BYTES, class_names=("a", "b"), own_batches=own_batches)


@pytest.mark.parametrize(
    ("kind", "settings", "promised"),
    [
        ("next_token", {}, 32),
        ("next_token", {"max_segments": 5}, 5),
        ("next_token", {"max_segments": 0}, 0),
        ("next_token", {"memory_length": 4}, 0),
        ("next_token", {"own_batches": True}, 0),
        ("masked_lm", {}, 32),
        ("prefix_lm", {}, 32),
        ("classification", {}, 1),
        ("seq2seq", {}, 1),
        ("seq2seq", {"own_batches": True}, 0),
        ("span_corruption", {}, 1),
    ],
)
def test_a_model_is_promised_what_its_data_keep(kind, settings, promised):
    parts = make_steps(kind, **settings).parts
    assert parts.max_segments == parts.model.max_segments == promised


@pytest.mark.parametrize(
    "row", [[1, 1, 3, 3, 3, 3, 0, 0], [2, 2, 2, 2, 2, 2, 2, 2], [1, 1, 0, 0, 2, 2, 2, 2], [1, 2, 3, 4, 4, 4, 4, 4]]
)
def test_batches_that_break_it_are_refused_where_they_are_placed(row):
    ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0], row], np.int32)
    tokens = np.ones((2, 8), np.int32)
    steps = make_steps(max_segments=MOST)
    held = "".join(rf"{number},? ?" for number in dict.fromkeys(row))
    with pytest.raises(UserError, match=rf"in order, at most 3, .* segment_ids hold \[{held}\] in row 1; number"):
        steps.runner.place_batch(Batch.of(tokens, tokens, segment_ids=ids))
    ids[1] = [1, 2, 3, 0, 0, 0, 0, 0]
    steps.runner.place_batch(Batch.of(tokens, tokens, segment_ids=ids))
    ids[1] = row
    make_steps(own_batches=True).runner.place_batch(Batch.of(tokens, tokens, segment_ids=ids))


def test_the_setting_is_of_packed_text():
    with pytest.raises(UserError, match=r"data\.max_segments is for running text, got 5 for the classification"):
        make_steps("classification", max_segments=5)
    with pytest.raises(UserError, match=r"data\.max_segments is for .*, got 5 for the span_corruption"):
        make_steps("span_corruption", max_segments=5)
    with pytest.raises(UserError, match=r"data\.max_segments is for rows that do not continue each other .*, got 5"):
        make_steps(memory_length=4, max_segments=5)
    with pytest.raises(UserError, match=r"max_segments must be at least 0, got -1"):
        DataConfig(max_segments=-1)
