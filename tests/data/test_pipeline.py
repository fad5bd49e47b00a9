"""The pipeline: packing, windows, mixtures, exact state, and an order that no number of processes changes."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.config import DataConfig
from transformer.data.pipeline import evaluation_batches, train_batches
from transformer.data.registry import open_source
from transformer.data.source import Record, Source, split_text
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokenizers.characters import CharacterTokenizer
from transformer.types import Batch, CheckpointableIterator, UserError

BYTES = ByteTokenizer()
E = BYTES.end_of_text


def _take(iterator, count):
    return list(itertools.islice(iterator, count))


def _concatenate(batches):
    return Batch(*(np.concatenate(fields) for fields in zip(*batches, strict=True)))


def _assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        for name, x, y in zip(Batch._fields, a, e, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


every_packing = pytest.mark.parametrize("best_fit", [False, True], ids=["as they come", "best fit"])


def _segments(batch):
    """(inputs, targets, weights, positions) of each segment of each row."""
    for row in range(batch.inputs.shape[0]):
        ids = batch.segment_ids[row]
        for segment in range(1, ids.max() + 1):
            at = ids == segment
            yield tuple(field[row][at] for field in (batch.inputs, batch.targets, batch.weights, batch.positions))


def _documents(targets):
    """The texts in a stream of targets that begins with a document; what follows the last end of text is left out."""
    ends = np.flatnonzero(targets == E)
    return [BYTES.decode(part) for part in np.split(targets, ends + 1)[: len(ends)]]


# ---- What is in a batch ----------------------------------------------------------------------------------------------


@every_packing
def test_a_batch_has_the_shapes_and_dtypes_of_its_contract(make_config, write_folder, best_fit):
    iterator = train_batches(make_config(write_folder(), batch_size=8, best_fit=best_fit), BYTES)
    assert isinstance(iterator, CheckpointableIterator)
    batch = next(iterator)
    assert isinstance(batch, Batch)
    assert {field.shape for field in batch} == {(8, 16)}
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]


@every_packing
def test_packed_documents_are_segments_that_count_from_zero(make_config, write_folder, best_fit):
    batches = _take(train_batches(make_config(write_folder(), sequence_length=50, best_fit=best_fit), BYTES), 20)
    starts = 0
    for batch in batches:
        assert best_fit or batch.segment_ids.min() == 1  # training rows are full
        assert np.all(batch.segment_ids[:, 0] == 1)
        padding = batch.segment_ids == 0
        assert np.all(np.diff(np.where(padding, 99, batch.segment_ids), axis=1) >= 0)
        assert not any(field[padding].any() for field in batch)
        for inputs, targets, weights, positions in _segments(batch):
            assert positions.tolist() == list(range(len(inputs)))
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            assert E not in inputs[1:]
            assert np.all(weights == 1)
            starts += inputs[0] == E
    assert starts > 20
    assert any(batch.segment_ids.max() > 1 for batch in batches)


def test_windows_are_contiguous_and_read_across_documents(make_config, write_folder):
    config = make_config(write_folder(), pack=False, num_streams=2)
    batches = _take(train_batches(config, BYTES), 30)
    ends = 0
    for batch in batches:
        assert batch.segment_ids is None  # each row is one document
        np.testing.assert_array_equal(batch.positions, np.tile(np.arange(16), (4, 1)))
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        ends += np.count_nonzero(batch.inputs[:, 1:-1] == E)
    assert ends > 3


def test_windows_of_a_long_text_are_scattered_over_it(make_config, tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(2000))  # every character once, so that a window tells its place
    (tmp_path / "long.txt").write_text(text)
    tokenizer = CharacterTokenizer(text)
    config = make_config(tmp_path / "long.txt", pack=False, record_bytes=600)
    batches = _take(train_batches(config, tokenizer), 60)
    places = np.concatenate([batch.inputs for batch in batches])
    steps = np.diff(places, axis=1)
    at_end = (places[:, 1:] == tokenizer.end_of_text) | (places[:, :-1] == tokenizer.end_of_text)
    assert np.mean((steps == 1) | at_end) > 0.99  # only a text's last piece runs on into another
    first = places[:, 1]
    assert np.mean(np.abs(np.diff(first)) < 16) < 0.1, "rows follow each other in the text"
    assert len(set(first.tolist())) > 150, "epochs repeat the same windows"
    assert len(np.unique(places)) > 0.85 * 0.9 * len(text), "parts of the text are never read"


def test_each_epoch_has_every_document_once_in_another_order(make_config, write_folder):
    folder = write_folder()
    config = make_config(folder, num_streams=1, batch_size=1)
    documents = list(split_text(open_source(str(folder), config), "train"))
    targets = np.concatenate([batch.targets[0] for batch in _take(train_batches(config, BYTES), 300)])
    read = _documents(targets)
    epochs = [read[i : i + len(documents)] for i in range(0, len(read) - len(documents), len(documents))]
    assert len(epochs) > 2
    for epoch in epochs:
        assert sorted(epoch) == sorted(documents)
    assert epochs[0] != documents
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_streams_share_the_documents_out(make_config, write_folder):
    folder = write_folder()
    config = make_config(folder, num_streams=4, batch_size=4)
    documents = list(split_text(open_source(str(folder), config), "train"))
    batches = _take(train_batches(config, BYTES), 60)
    of_stream = [set(_documents(np.concatenate([batch.targets[row] for batch in batches]))) for row in range(4)]
    assert sum(len(part) for part in of_stream) == len(documents)
    assert set().union(*of_stream) == set(documents)


@every_packing
def test_the_seed_decides_the_order(make_config, write_folder, best_fit):
    folder = write_folder()
    one, same, other = (
        _take(train_batches(make_config(folder, shuffle_seed=seed, best_fit=best_fit), BYTES), 5)
        for seed in (0, 0, 2**40)
    )
    _assert_equal(one, same)
    assert any(np.any(a.inputs != b.inputs) for a, b in zip(one, other, strict=True))


def test_pieces_of_long_documents_are_segments_without_a_start(tmp_path, make_config):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {i:03}\n" for i in range(100)))
    config = make_config(path, record_bytes=90, validation_fraction=0.0, num_streams=1, batch_size=1)
    records = list(open_source(str(path), config).records("train"))
    batches = _take(train_batches(config, BYTES), 300)
    first_inputs = [BYTES.decode(inputs[:1]) for batch in batches for inputs, *_ in _segments(batch)]
    assert first_inputs.count("") > 1  # end of text, before the document
    assert first_inputs.count("l") > 20  # pieces are cut at newlines
    assert sum(np.count_nonzero(batch.targets == E) for batch in batches) > 1
    # An epoch has every byte as a target but the first of each piece but the document's own, and one end of text.
    total = 900 + 1 - (len(records) - 1)
    per_epoch = np.concatenate([batch.targets[0] for batch in batches])[:total]
    expected = "".join(record.text[record.continues :] for record in records).encode()
    assert sorted(per_epoch.tolist()) == sorted([*expected, E])


@every_packing
def test_prompts_have_no_weight(make_config, write_jsonl, best_fit):
    path = write_jsonl([{"prompt": f"<{i}>", "text": f"[{i}]"} for i in range(20)])
    for batch in _take(train_batches(make_config(path, num_streams=2, best_fit=best_fit), BYTES), 10):
        prompted = np.array([[chr(t) in "<>" if t < 256 else False for t in row] for row in batch.targets])
        learnt = np.array([[chr(t) in "[]" if t < 256 else True for t in row] for row in batch.targets])
        assert np.all(batch.weights[prompted] == 0)
        assert np.all(batch.weights[learnt] == 1)
        assert prompted.any()
        assert learnt.any()


def test_continued_rows_go_on_where_the_batch_before_ended(make_config, write_folder):
    config = make_config(write_folder())
    batches = _take(train_batches(config, BYTES, continued=True), 40)
    plain = _take(train_batches(dataclasses.replace(config, num_streams=4), BYTES), 40)
    going_on = 0
    for before, batch, other in zip(batches, batches[1:], plain[1:], strict=False):
        for field in ("inputs", "targets", "weights", "segment_ids"):
            np.testing.assert_array_equal(getattr(batch, field), getattr(other, field))
        for row in range(4):
            first, last = batch.positions[row, 0], before.positions[row, -1]
            # The token after the last target of a document begins another.
            ended = before.targets[row, -1] == E
            assert first == (0 if ended else last + 1)
            assert ended or batch.inputs[row, 0] == before.targets[row, -1]
            going_on += not ended
            steps = np.diff(batch.positions[row])
            starts = np.diff(batch.segment_ids[row]) == 1
            assert np.all(steps[~starts] == 1)
            assert np.all(batch.positions[row, 1:][starts] == 0)
    assert going_on > 40
    assert max(batch.positions.max() for batch in batches) > 2 * 16


def test_continued_rows_need_a_stream_each(make_config, write_folder):
    config = make_config(write_folder(), batch_size=16)
    with pytest.raises(UserError, match=r"a stream of text for each of 16 rows, folder has \d+ records: set a smaller"):
        train_batches(config, BYTES, continued=True)


# ---- Mixtures --------------------------------------------------------------------------------------------------------


@every_packing
def test_mixtures_keep_their_shares_at_any_time_and_in_any_stream(make_config, write_folder, best_fit):
    sources = [write_folder(name) for name in ("x", "y", "z")]
    config = make_config(*sources, weights=(5.0, 2.0, 1.0), batch_size=8, sequence_length=64, best_fit=best_fit)
    batches = _take(train_batches(config, BYTES), 200)
    # Text of another source would be in the row only if rows mixed sources.
    names = np.array([[set(BYTES.decode(row)) & set("xyz") for row in batch.inputs] for batch in batches])
    assert all(len(name) == 1 for name in names.ravel())
    drawn = np.vectorize(lambda name: min(name))(names)
    for name, share in zip("xyz", (5 / 8, 2 / 8, 1 / 8), strict=True):
        is_drawn = drawn == name
        assert abs(is_drawn.mean() - share) < 0.01
        assert np.all(np.abs(is_drawn.mean(axis=0) - share) < 0.03)  # of each row, over time
        assert np.all(np.abs(is_drawn.sum(axis=1) - 8 * share) <= 1)  # of each batch


def test_equal_weights_are_the_default(make_config, write_folder):
    sources = [write_folder(name) for name in ("x", "y")]
    one = _take(train_batches(make_config(*sources), BYTES), 5)
    two = _take(train_batches(make_config(*sources, weights=(3.0, 3.0)), BYTES), 5)
    _assert_equal(one, two)


# ---- Processes and state ---------------------------------------------------------------------------------------------

every_num_streams = pytest.mark.parametrize("num_streams", [1, 2, 4, 8, 16])


@every_num_streams
@every_packing
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_data_does_not_depend_on_the_number_of_processes(
    make_config, write_folder, num_streams, process_count, best_fit
):
    folders = write_folder("x", 24), write_folder("y", 24)
    config = make_config(*folders, batch_size=8, num_streams=num_streams, weights=(2.0, 1.0), best_fit=best_fit)
    alone = _take(train_batches(config, BYTES), 12)
    together = [
        _take(train_batches(config, BYTES, process_index=index, process_count=process_count), 12)
        for index in range(process_count)
    ]
    _assert_equal([_concatenate(parts) for parts in zip(*together, strict=True)], alone)


def test_a_process_reads_its_own_streams_only(make_config, write_folder):
    config = make_config(write_folder(), batch_size=8, num_streams=8)
    state = train_batches(config, BYTES, process_index=1, process_count=4).get_state()
    assert sorted(state["streams"]) == ["2", "3"]


@every_num_streams
@every_packing
@settings(max_examples=5, deadline=None)
@given(before=st.integers(0, 12), after=st.integers(1, 12))
def test_a_restored_iterator_goes_on_exactly(module_config, num_streams, best_fit, before, after):
    config = dataclasses.replace(module_config(num_streams), best_fit=best_fit)
    iterator = train_batches(config, BYTES)
    _take(iterator, before)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state["step"] == before  # not the state of a prefetched batch
    expected = _take(iterator, after)
    iterator.set_state(state)
    assert iterator.get_state() == state
    _assert_equal(_take(iterator, after), expected)
    fresh = train_batches(config, BYTES)
    fresh.set_state(state)
    _assert_equal(_take(fresh, after), expected)


@pytest.fixture(scope="module")
def module_config(tmp_path_factory):
    """The config of a corpus prepared once: hypothesis runs a test many times in one temporary folder."""
    root = tmp_path_factory.mktemp("corpus")
    for name in ("x", "y"):
        (root / name).mkdir()
        for i in range(20):
            (root / name / f"{i:02}.txt").write_text(f"{name} {i:02}\n" * (1 + i * 7 % 11))
    return lambda num_streams: DataConfig(
        source=(str(root / "x"), str(root / "y")),
        data_dir=str(root / "prepared"),
        sequence_length=16,
        batch_size=8,
        num_streams=num_streams,
    )


@every_num_streams
@every_packing
def test_a_state_is_read_by_another_number_of_processes(module_config, num_streams, best_fit):
    config = dataclasses.replace(module_config(num_streams), best_fit=best_fit)
    pair = [train_batches(config, BYTES, process_index=index, process_count=2) for index in range(2)]
    for iterator in pair:
        _take(iterator, 5)
    states = [iterator.get_state() for iterator in pair]
    merged = states[0] | {"streams": states[0]["streams"] | states[1]["streams"]}
    expected = [_concatenate(parts) for parts in zip(*(_take(iterator, 7) for iterator in pair), strict=True)]
    for process_count in (1, 4):
        restored = [
            train_batches(config, BYTES, process_index=index, process_count=process_count)
            for index in range(process_count)
        ]
        for iterator in restored:
            iterator.set_state(merged)
        parts = zip(*(_take(iterator, 7) for iterator in restored), strict=True)
        _assert_equal([_concatenate(part) for part in parts], expected)


def test_a_state_without_the_streams_of_the_process_is_refused(module_config):
    half = train_batches(module_config(8), BYTES, process_index=0, process_count=2)
    with pytest.raises(ValueError, match=r"streams \[4, 5, 6, 7\] are missing: merge"):
        train_batches(module_config(8), BYTES).set_state(half.get_state())


def test_a_state_of_other_text_is_refused(make_config, write_folder):
    folder = write_folder()
    config = make_config(folder)
    state = train_batches(config, BYTES).get_state()
    (folder / "sub0" / "00.txt").write_text("changed")
    with pytest.raises(UserError, match="must continue with the text it began with"):
        train_batches(config, BYTES).set_state(state)


# ---- Evaluation ------------------------------------------------------------------------------------------------------


def _evaluated(config, split="validation", **processes):
    return list(evaluation_batches(config, BYTES, split, **processes))


def test_evaluation_has_every_target_once_and_in_order(make_config, write_folder):
    folder = write_folder()
    config = make_config(folder, validation_fraction=0.4, record_bytes=64)
    batches = _evaluated(config)
    everything = _concatenate(batches)
    valid = everything.segment_ids > 0
    np.testing.assert_array_equal(everything.weights, valid.astype(np.float32))
    documents = list(split_text(open_source(str(folder), config), "validation"))
    assert _documents(everything.targets[valid]) == documents
    assert everything.weights.sum() == sum(len(text.encode()) + 1 for text in documents)
    assert {batch.inputs.shape for batch in batches} == {(4, 16)}
    np.testing.assert_array_equal(everything.segment_ids[:, 0], valid[:, 0])
    assert len(batches) == -(-int(everything.weights.sum()) // 64)
    for inputs, targets, _, positions in _segments(everything):
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        assert positions.tolist() == list(range(len(inputs)))


def test_evaluation_does_not_depend_on_how_text_is_stored_or_read_in_training(make_config, write_folder):
    folder = write_folder()
    expected = _evaluated(make_config(folder))
    for changes in ({"record_bytes": 64}, {"pack": False}, {"shuffle_seed": 3}, {"num_streams": 2}):
        _assert_equal(_evaluated(make_config(folder, **changes)), expected)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_with_a_stride_every_target_is_scored_once_behind_almost_a_whole_window(make_config, write_folder, stride):
    folder = write_folder()
    config = make_config(folder, validation_fraction=0.4, stride=stride)
    everything = _concatenate(_evaluated(config))
    scored = everything.weights > 0
    documents = list(split_text(open_source(str(folder), config), "validation"))
    assert _documents(everything.targets[scored]) == documents
    context = np.broadcast_to(np.arange(16), scored.shape)[scored]
    place_in_document = np.concatenate([np.arange(len(text.encode()) + 1) for text in documents])
    np.testing.assert_array_equal(context >= np.minimum(place_in_document, 16 - stride), True)
    for row in np.flatnonzero(scored.any(axis=1)):
        valid = everything.segment_ids[row] > 0
        assert set(everything.segment_ids[row][valid]) == {1}
        assert everything.positions[row][valid].tolist() == list(range(valid.sum()))


@pytest.mark.parametrize("stride", [0, 5])
def test_a_limit_cuts_the_split_short(make_config, write_folder, stride):
    config = make_config(write_folder(), validation_fraction=0.4, stride=stride)
    everything, cut = (_concatenate(_evaluated(dataclasses.replace(config, limit=limit))) for limit in (0, 77))
    targets, first = (batch.targets[batch.weights > 0] for batch in (everything, cut))
    assert first.tolist() == targets[:77].tolist()
    batches = evaluation_batches(dataclasses.replace(config, limit=77), BYTES, "validation")
    assert sum(len(pairs.targets) for pairs in batches.documents()) == 77


@pytest.mark.parametrize("limit", [0, 150])
def test_continued_evaluation_reads_the_split_in_equal_parts(make_config, write_folder, limit):
    config = make_config(write_folder(), validation_fraction=0.4, limit=limit)
    batches = _evaluated(config, continued=True)
    plain = _concatenate(_evaluated(config))
    # Each row's own text, one batch after the other.
    parts = Batch(*(np.concatenate(fields, axis=1) for fields in zip(*batches, strict=True)))
    assert parts.inputs.shape == (4, 16 * len(batches))
    assert len(batches) == -(-int(plain.weights.sum()) // 64)
    scored = parts.weights > 0
    for field in ("inputs", "targets"):
        whole = getattr(plain, field)[plain.weights > 0]
        np.testing.assert_array_equal(getattr(parts, field)[scored], whole)
    np.testing.assert_array_equal(scored, parts.segment_ids > 0)
    begins = parts.inputs == E
    begins[:, 0] = True
    for row in range(4):
        starts = np.flatnonzero(begins[row])
        expected = np.arange(parts.inputs.shape[1]) - np.repeat(starts, np.diff([*starts, parts.inputs.shape[1]]))
        np.testing.assert_array_equal(parts.positions[row][scored[row]], expected[scored[row]])
    for batch in batches:
        for row in np.flatnonzero(batch.segment_ids[:, 0]):
            valid = batch.segment_ids[row] > 0
            numbers = 1 + np.cumsum(np.r_[False, batch.inputs[row, 1:] == E])
            np.testing.assert_array_equal(batch.segment_ids[row][valid], numbers[valid])
    assert begins[:, 1:].any()


def test_evaluation_can_be_iterated_again(make_config, write_folder):
    batches = evaluation_batches(make_config(write_folder()), BYTES, "validation")
    _assert_equal(list(batches), list(batches))


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("process_count", [2, 4])
def test_evaluation_is_shared_by_rows(make_config, write_folder, process_count, continued):
    config = make_config(write_folder(), validation_fraction=0.4)
    shares = (
        {"process_index": i, "process_count": process_count, "continued": continued} for i in range(process_count)
    )
    parts = [_evaluated(config, **share) for share in shares]
    _assert_equal([_concatenate(part) for part in zip(*parts, strict=True)], _evaluated(config, continued=continued))


def test_rows_that_fill_a_batch_exactly_are_not_followed_by_an_empty_one(tmp_path, make_config):
    path = tmp_path / "a.txt"
    path.write_text("x" * 640)
    config = make_config(path, validation_fraction=63.5 / 640)
    batches = _evaluated(config)
    assert [batch.weights.sum() for batch in batches] == [64, 1]
    config = make_config(path, validation_fraction=63 / 640)
    assert [batch.weights.sum() for batch in _evaluated(config)] == [64]


def test_prompts_have_no_weight_in_evaluation(make_config, write_jsonl):
    path = write_jsonl([{"prompt": "<prompt>", "text": f"[{i}]"} for i in range(20)])
    learnt = [list(b"[0]"), [E], list(b"[10]"), [E]]
    assert sum(batch.weights.sum() for batch in _evaluated(make_config(path))) == sum(map(len, learnt))


@pytest.mark.parametrize(("limit", "expected"), [(0, "[0][10]"), (len("<prompt>[0]E<prompt>[1"), "[0][1")])
def test_compressors_are_given_what_is_scored(make_config, write_jsonl, limit, expected):
    path = write_jsonl([{"prompt": "<prompt>", "text": f"[{i}]"} for i in range(20)])
    assert "".join(evaluation_batches(make_config(path, limit=limit), BYTES, "validation").texts()) == expected


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 4000}, r"must fill at least one sequence, .* has \d+ tokens .*sequence_length is 4000"),
        ({"batch_size": 16, "num_streams": 16}, r"num_streams must not exceed .* 16 streams and folder has 10 records"),
    ],
)
def test_a_corpus_that_is_too_small_is_refused(make_config, write_folder, changes, message):
    folder = write_folder()
    with pytest.raises(UserError, match=message):
        train_batches(make_config(folder, **changes), BYTES)


def test_rows_that_processes_cannot_share_are_refused(make_config, write_folder):
    config = make_config(write_folder())
    for batches in (train_batches, lambda *a, **k: evaluation_batches(*a, "validation", **k)):
        with pytest.raises(
            UserError, match=re.escape("batch_size must be divisible by the number of processes (3), got 4")
        ):
            batches(config, BYTES, process_index=0, process_count=3)


def test_a_missing_split_is_refused_before_the_first_evaluation(make_config, write_folder):
    with pytest.raises(UserError, match="must be one of train, validation"):
        evaluation_batches(make_config(write_folder()), BYTES, "test")


@every_packing
def test_a_stream_without_any_text_is_refused_instead_of_searched_for_ever(best_fit):
    records = [Record("some text " * 10, "", False, True), Record("", "", False, True)]
    source = Source("records", "", {"train": 0}, "", lambda split: records)
    config = DataConfig(sequence_length=16, batch_size=2, num_streams=2, best_fit=best_fit)
    with pytest.raises(UserError, match="A stream must hold text"):
        next(train_batches(config, BYTES, sources=[source]))


@pytest.mark.parametrize(("records", "batch_size", "streams"), [(100, 16, 16), (100, 100, 50), (10, 16, 8), (1, 4, 1)])
def test_streams_are_as_many_as_divide_the_batch_up_to_64_and_the_records(records, batch_size, streams):
    source = Source("records", "", {"train": 0}, "", lambda split: [Record("some text", "", False, True)] * records)
    config = DataConfig(sequence_length=8, batch_size=batch_size)
    state = train_batches(config, BYTES, sources=[source]).get_state()
    assert state["num_streams"] == len(state["streams"]) == streams


def test_the_order_of_data_is_frozen():
    """A resumed run must find the data it left, whatever versions of NumPy and Grain it is resumed with."""
    records = [Record(chr(97 + i) * (i % 5 + 1), "", False, True) for i in range(26)]
    source = Source("records", "", {"train": 0}, "", lambda split: records)
    config = DataConfig(sequence_length=12, batch_size=4, num_streams=2, shuffle_seed=1)
    batch = next(train_batches(config, BYTES, sources=[source]))
    assert [BYTES.decode(row) for row in batch.targets] == ["zjjjjjfxx", "xxyyyyybb", "nnnnpkiii", "icccqqul"]
