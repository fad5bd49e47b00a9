"""Datasets of TFDS are tokenized once too: batches and fingerprints equal those without stored tokens."""

import hashlib
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds

from transformer.config import DataConfig
from transformer.data.builder import builder_class
from transformer.data.datasets import open_data
from transformer.data.encoded import pack_fields
from transformer.data.example_parts import unpack_parts
from transformer.data.shards import Shards, write_shard
from transformer.data.token_shards import TextRecords
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.objective import OBJECTIVES
from transformer.types import UserError

TEXT, LABEL = tfds.features.Text(), tfds.features.ClassLabel(names=["no", "yes"])


def words(number):
    return " ".join(f"{number * place % 17}é" for place in range(1 + number % 9))


def write(folder, name, features, rows):
    splits = {"train": lambda: iter(rows), "test": lambda: iter(rows[:7])}
    builder = builder_class(name)(features=features, splits=splits, version="1.0.0", data_dir=str(folder))
    builder.download_and_prepare()


@pytest.fixture
def folder(tmp_path):
    texts = [{"text": words(i), "prompt": "ask " * (i % 3)} for i in range(100)]
    write(tmp_path, "many", {"text": TEXT, "prompt": TEXT}, texts)
    write(tmp_path, "few", {"text": TEXT, "label": LABEL}, [{"text": words(i) * 9, "label": "no"} for i in range(8)])
    labelled = [{"text": words(i), "label": ("no", "yes")[i % 3 > 0]} for i in range(80)]
    write(tmp_path, "labelled", {"text": TEXT, "label": LABEL}, labelled)
    write(
        tmp_path, "pairs", {"text": TEXT, "more": TEXT}, [{"text": words(i), "more": words(i + 3)} for i in range(80)]
    )
    return tmp_path


CASES = {
    "many": ("next_token", "many", {}),
    "few": ("next_token", "few", {}),
    "labelled": ("classification", "labelled", {}),
    "pairs": ("seq2seq", "pairs", {"source_key": "text", "target_key": "more"}),
}
BEFORE = {
    "many": ("dcea10d6cc5c", "f6684afa7e54", "c3d08e9c60bf"),
    "few": ("5ce86060f6b5", "eb0fd67cc6ef", "47b272f726d4"),
    "labelled": ("0da7f877001c", "4abcd76f39c8", "9514e2f8478b"),
    "pairs": ("53b22d58f24c", "927304ef7ec2", "1f60e1b4ce80"),
}
"""Of each case, as it was when every example was encoded each time it was read: the fingerprint, and digests of training batches
and of an evaluation of both splits."""


def opened(folder, case, class_names=(), **changes):
    objective, name, keys = CASES[case]
    settings = {"sequence_length": 24, "batch_size": 4, "shuffle_seed": 3, "record_bytes": 64} | keys | changes
    config = DataConfig(source=(name,), data_dir=str(folder), **settings)
    return open_data(config, OBJECTIVES.find(objective)(), class_names)


def digest(batches):
    content = hashlib.sha256()
    for batch in batches:
        for field in batch:
            content.update(repr((field.shape, field.dtype)).encode() + np.ascontiguousarray(field).tobytes())
    return content.hexdigest()[:12]


def digests(data, tokenizer):
    trained = itertools.islice(data.train_batches(tokenizer), 40)
    scored = itertools.chain.from_iterable(data.evaluation_batches(tokenizer, split) for split in ("train", "test"))
    return data.sources[0].fingerprint[:12], digest(trained), digest(scored)


@pytest.mark.parametrize("case", CASES)
def test_a_dataset_is_tokenized_once_and_its_batches_are_what_they_were(folder, case, monkeypatch):
    assert digests(opened(folder, case), ByteTokenizer()) == BEFORE[case]
    encoded = []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: encoded.append(text))
    assert digests(opened(folder, case), ByteTokenizer()) == BEFORE[case]
    assert encoded == []
    assert not any("tokens" in path.name for path in (folder / CASES[case][1]).rglob("*")), (
        "the dataset is nobody's to write into"
    )


@pytest.mark.parametrize("case", CASES)
def test_where_nothing_can_be_written_it_is_encoded_each_time(folder, case, monkeypatch):
    def refuse(path, records):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("transformer.data.token_shards.write_shard", refuse)
    assert digests(opened(folder, case), ByteTokenizer()) == BEFORE[case]


def test_other_fields_and_another_way_to_cut_have_tokens_of_their_own(folder):
    data = opened(folder, "few")
    list(data.evaluation_batches(ByteTokenizer(), "test"))
    list(opened(folder, "few", record_bytes=100).evaluation_batches(ByteTokenizer(), "test"))
    assert len(list(folder.glob("text_records/few_1_0_0-*"))) == 2
    for keys in ({}, {"source_key": "more", "target_key": "text"}):
        list(opened(folder, "pairs", **keys).evaluation_batches(ByteTokenizer(), "test"))
    assert len(list(folder.glob("example_records/pairs_1_0_0-*"))) == 2


def test_its_labels_have_the_numbers_of_the_run(folder):
    batches = list(opened(folder, "labelled", ("yes", "other", "no")).evaluation_batches(ByteTokenizer(), "test"))
    labels = np.concatenate([batch.labels[batch.weights > 0] for batch in batches])
    assert sorted(labels) == [0, 0, 0, 0, 2, 2, 2]


def test_a_class_outside_the_classes_is_refused(tmp_path):
    rows = [{"text": words(i), "label": i % 2} for i in range(80)]
    write(tmp_path, "labelled", {"text": TEXT, "label": LABEL}, [{**row, "label": row["label"] or -1} for row in rows])
    data = opened(tmp_path, "labelled", validation_fraction=0.0)
    for _ in range(2):
        with pytest.raises(UserError, match="one of the 2 classes of 'labelled', got label -1"):
            list(data.evaluation_batches(ByteTokenizer(), "train"))


def test_a_record_without_its_text_is_refused(tmp_path):
    shards = Shards([tmp_path / "records"], [1])
    write_shard(tmp_path / "records", [pack_fields({"prompt": "p"})])
    with pytest.raises(UserError, match="must be whole, example 0 has no 'text'"):
        TextRecords(shards, ("text", "prompt"))[0]
    with pytest.raises(UserError, match="must be whole, one example has no value"):
        unpack_parts(shards[0], {"text": "text"})
