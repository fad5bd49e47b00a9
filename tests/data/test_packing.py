"""The line about training rows: padding, cut documents and lost context, counted as rows are made."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer.config import Config
from transformer.data.datasets import open_data
from transformer.data.encoded import Encoded
from transformer.data.packing import Document, describe_packing, packed_tokens, packing_of, sample_documents
from transformer.data.pipeline import train_batches
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.objectives.classification import Classification
from transformer.objectives.seq2seq import Seq2Seq
from transformer.objectives.span_corruption import SpanCorruption

BYTES = ByteTokenizer()


def whole(sizes):
    return [Document([size], True) for size in sizes]


def by_token(sizes, length, most):
    """Padding, documents cut and context lost of documents in rows that are filled token by token."""
    rows, cut, lost = [[]], set(), 0
    for document, size in enumerate(sizes):
        for index in range(size):
            if len(rows[-1]) == length or (most and document not in rows[-1] and len(set(rows[-1])) == most):
                rows.append([])
            lost += index - rows[-1].count(document)
            if index > 0 and document not in rows[-1]:
                cut.add(document)
            rows[-1].append(document)
    total = (len(rows) - 1) * length + len(rows[-1])
    return 1 - sum(sizes) / total, len(cut) / len(sizes), lost / sum(sizes)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(2, 12), st.integers(0, 4))
def test_rows_in_order_are_counted_as_they_are_filled(sizes, length, most):
    assert packing_of(whole(sizes), length, most, 0) == pytest.approx(by_token(sizes, length, most))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(2, 12), st.integers(1, 3))
def test_best_fit_cuts_what_is_longer_than_a_row(sizes, length, streams):
    found = packing_of(whole(sizes), length, 0, streams)
    assert found.cut == sum(size > length for size in sizes) / len(sizes)
    lost = sum(index - index % length for size in sizes for index in range(size))
    assert found.lost == pytest.approx(lost / sum(sizes))


def test_the_rows_of_an_epoch_are_those_that_training_makes(make_config, write_jsonl):
    path = write_jsonl([{"text": "x" * (1 + 7 * i % 45)} for i in range(200)])
    for streams in (1, 4):
        data = make_config(path, sequence_length=32, batch_size=4, num_streams=streams, best_fit=True)
        steps = open_data(data, Config().objective).batches_of_epoch(BYTES)
        rows = list(itertools.islice(train_batches(data, BYTES), round(steps)))
        tokens = sum(int(np.count_nonzero(batch.segment_ids)) for batch in rows)
        assert packed_tokens([tokens], 32, 0) / 128 == pytest.approx(open_plain(data), rel=0.02)
        assert steps > open_plain(data)


def open_plain(data):
    return open_data(dataclasses.replace(data, best_fit=False, max_segments=0), Config().objective).batches_of_epoch(
        BYTES
    )


# ---- The sample ------------------------------------------------------------------------------------------------------


class Counted(list):
    """Records, and which of them were read."""

    def __init__(self, records):
        super().__init__(records)
        self.read = set()

    def __getitem__(self, index):
        self.read.add(index)
        return super().__getitem__(index)


def records_of(*documents):
    return Counted(
        Encoded(np.zeros(size + 1, np.uint16), np.zeros(0, np.uint32), index == len(sizes) - 1)
        for sizes in documents
        for index, size in enumerate(sizes)
    )


def test_a_small_split_is_read_whole():
    documents = [[5], [3, 3, 2], [0], [7], [1, 4]] * 9
    found = sample_documents(records_of(*documents), 1000)
    # At the border of two regions a document may be in two parts.
    assert sum(map(sum, (document.sizes for document in found))) >= 0.8 * sum(map(sum, documents))
    assert all(
        document.whole == (len(document.sizes) == 1) for document in found if document.sizes in ([5], [7], [3, 3, 2])
    )
    assert [0] not in [document.sizes for document in found]
    assert sample_documents(records_of(*[[5]] * 99), 1000) == whole([5] * 99)


def test_a_large_split_is_read_at_a_few_positions():
    records = records_of(*[[100 + i // 1000] for i in range(16_000)])
    found = sample_documents(records, 1000)
    assert found == whole([100 + 2 * place for place in range(8) for _ in range(125)])
    assert len(records.read) <= 1010
    records = records_of(*[[1 << 16]] * 1000)
    sample_documents(records, 1000)
    assert len(records.read) <= 3 * 8 + 10, "a million tokens are enough"


def test_documents_in_pieces_are_cut():
    found = sample_documents(records_of([10] * 400, *[[10]] * 400), 80)
    assert [(document.whole, len(document.sizes)) for document in found if not document.whole] == [(False, 10)] * 4
    assert sum(document.whole for document in found) == 40
    # Behind the first hundred tokens of a document, a target lacks its part before the row.
    assert packing_of(found[:1], 100, 0, 1) == (0, 1, pytest.approx((10 * sum(range(0, 100, 10))) / 100))


# ---- The line --------------------------------------------------------------------------------------------------------


def describe(data, objective=None, **settings):
    return open_data(data, objective or Config().objective, **settings).describe_rows(BYTES)


def test_a_line_says_what_becomes_of_running_text(make_config, write_jsonl):
    path = write_jsonl([{"text": "x" * 19} for _ in range(110)])
    data = make_config(path, sequence_length=32)
    # Of twenty tokens each, in rows of 32: of eight documents that five rows hold, four are cut.
    assert describe(data).startswith("rows of 99 documents: 0% padding, 49% cut, mean context lost 2 tokens")
    fitted = dataclasses.replace(data, best_fit=True)
    assert (
        describe(fitted)
        == "rows of 99 documents: 38% padding, 0% cut, mean context lost 0 tokens\nEach of 4 streams fills few "
        "rows; a smaller data.num_streams packs more."
    )
    joined = describe(data, SpanCorruption(mean_span_length=2.0, noise_density=0.2))
    assert joined == describe(dataclasses.replace(data, max_segments=0))
    assert describe(dataclasses.replace(data, pack=False)) == describe(data, continued=True) == ""


def test_the_remedy_fits_the_cause():
    short = whole([2] * 200)
    assert describe_packing(short, 32, 16, 0).count("\n") == 0
    limited = describe_packing(short, 32, 4, 0).split("\n")
    assert limited[0] == "rows of 200 documents: 75% padding, 0% cut, mean context lost 0 tokens"
    assert limited[1].startswith("A row ends after 4 documents; a larger data.max_segments packs more")
    assert len(limited[0]) <= 80
    few = describe_packing(whole([30, 3] * 8), 32, 4, 4).split("\n")
    assert few[1] == "Each of 4 streams fills few rows; a smaller data.num_streams packs more."
    assert describe_packing(whole([20] * 50), 32, 4, 1).count("\n") == 0
    assert describe_packing([], 32, 4, 1) == ""


def test_a_line_says_what_becomes_of_examples(make_config, write_jsonl):
    texts = write_jsonl([{"text": "x" * (5 + 14 * (i % 2)), "label": i % 3} for i in range(80)], "texts.jsonl")
    data = make_config(texts, sequence_length=16, validation_fraction=0.0, buckets=(8, 16))
    line, remedy = describe(data, Classification()).split("\n")
    lengths, room = [6, 16], [8, 16]
    assert line == f"batches of 80 texts: {1 - sum(lengths) / sum(room):.0%} padding, 50% of texts cut"
    assert remedy == "A row has room for 15 tokens; a longer data.sequence_length cuts fewer."
    longer = describe(dataclasses.replace(data, sequence_length=32, buckets=()), Classification())
    assert longer.endswith("% padding, none cut")
    pairs = write_jsonl([{"source": "x" * 40, "target": "y" * (40 * (i % 2) + 1)} for i in range(60)], "pairs.jsonl")
    told = describe(make_config(pairs, validation_fraction=0.0), Seq2Seq()).split("\n")[0]
    assert told.startswith("batches of 60 pairs: ") and told.endswith(
        " padding, 100% of sources and 50% of targets cut"
    )
    assert len(told) <= 80
