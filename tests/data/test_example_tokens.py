"""Examples are stored once, and as tokens once: batches and fingerprints equal those without stored tokens."""

import ast
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from tiny_tokenizers import make_folder

from transformer.config import DataConfig
from transformer.data import example_store, seen, tables, token_shards
from transformer.data import files as files_module
from transformer.data.datasets import Reader
from transformer.data.identity import ContentHash
from transformer.data.stored import open_stored
from transformer.data.tokenizers import PairTokenizer
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokenizers.folder import from_folder
from transformer.data.tokenizers.words import Words
from transformer.form import FORMS
from transformer.types import UserError

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def sentence(number, salt):
    return " ".join(WORDS[(number * salt + place * place) % len(WORDS)] for place in range(1 + number * salt % 13))


@pytest.fixture
def files(tmp_path):
    """Labelled texts of three classes, one spelled in two ways, and pairs, two of which have an empty side."""
    labelled = [{"text": sentence(i, 7), "label": ("b", "a", " b", 3)[i % 4]} for i in range(90)]
    pairs = [{"source": sentence(i, 5) * (i % 11 > 0), "target": sentence(i, 3).upper()} for i in range(90)]
    for name, rows in (("labelled", labelled), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "source.txt").write_text("".join(pair["source"] + "\n" for pair in pairs))
    (tmp_path / "target.txt").write_text("".join(pair["target"] + "\n" for pair in pairs))
    return tmp_path


def opened(files, kind, name, class_names=(), **changes):
    names = [str(files / one) for one in name.split()]
    settings = {"sequence_length": 24, "batch_size": 4, "shuffle_seed": 3, "tokenizer": Words(size=40)} | changes
    config = DataConfig(source=tuple(names), data_dir=str(files / "prepared"), **settings)
    return Reader(config, class_names=class_names).examples(FORMS.find(kind)())


def tokenizer_of(files, data, name):
    if name == "own":
        return data.make_tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    kind, content = from_folder(make_folder(files, name))
    return kind.load(content["tokenizer.json"].decode())


def digest(batches):
    content = hashlib.sha256()
    for batch in batches:
        for field in batch:
            content.update(repr((field.shape, field.dtype)).encode() + np.ascontiguousarray(field).tobytes())
    return content.hexdigest()[:12]


CASES = {
    "words": ("labelled", "labelled.jsonl", "own", {}),
    "bytes": ("labelled", "labelled.jsonl", "bytes", {"truncate": "head_tail", "validation_fraction": 0.3}),
    "no validation": ("labelled", "labelled.jsonl", "bytes", {"truncate": "tail", "validation_fraction": 0.0}),
    "llama": ("labelled", "labelled.jsonl", "llama", {"truncate": "tail"}),
    "one vocabulary": ("pairs", "pairs.jsonl", "own", {}),
    "two vocabularies": ("pairs", "pairs.jsonl", "own", {"share_vocabulary": False}),
    "two files": ("pairs", "source.txt target.txt", "bytes", {"truncate": "tail"}),
}
BEFORE = {
    "words": ("bed3dcbf3d0d", "3c53c44a3d8d", "cc9d39a2cbce"),
    "bytes": ("3a87de3e0b26", "9ff28fb8e870", "ecf94f4fee89"),
    "no validation": ("6735b4441a1f", "7d035c8ee747", "9b510c0c0e3a"),
    "llama": ("bed3dcbf3d0d", "6c72d5623f68", "608218aa08ad"),
    "one vocabulary": ("bf13f3cb845e", "52e7b17b7d58", "4d5db8a31e0b"),
    "two vocabularies": ("bf13f3cb845e", "5f667393d4d8", "8eb790503ece"),
    "two files": ("bf13f3cb845e", "e21f6461a5f8", "2536575c2b0c"),
}
"""Of each case, as it was when every example was encoded each time it was read: the fingerprint, and digests of the training
batches of three epochs and of an evaluation of all splits."""
# Tiny tokenizers of these kinds differ from one making to the next.
UNLIKE = {
    "bert": ("labelled", "labelled.jsonl", "bert", {"sequence_length": 12}),
    "t5": ("pairs", "pairs.jsonl", "t5", {"sequence_length": 16}),
}


def digests(data, tokenizer):
    trained = itertools.islice(data.train_batches(tokenizer), 60)
    scored = itertools.chain.from_iterable(data.evaluation_batches(tokenizer, split) for split in data.split_names)
    return data.source.fingerprint[:12], digest(trained), digest(scored)


@pytest.mark.parametrize("case", CASES)
def test_batches_and_fingerprints_are_what_they_were(files, case):
    kind, name, tokenizer, changes = CASES[case]
    for _ in range(2):  # the first stores, the second reads
        data = opened(files, kind, name, **changes)
        assert digests(data, tokenizer_of(files, data, tokenizer)) == BEFORE[case]
    assert len(list(files.glob("prepared/example_records/*/tokens/*-train"))) == 1


@pytest.mark.parametrize("case", [*CASES, *UNLIKE])
def test_what_is_stored_gives_the_batches_of_what_is_encoded(files, case):
    kind, name, tokenizer, changes = (CASES | UNLIKE)[case]
    data = opened(files, kind, name, **changes)
    anew = dataclasses.replace(data, source=dataclasses.replace(data.source, tokens=None))
    made = tokenizer_of(files, data, tokenizer)
    expected = digests(anew, made), anew.count_cut(made, "all")
    assert not list(files.glob("prepared/example_records/*/tokens"))
    assert (digests(data, made), data.count_cut(made, "all")) == expected
    assert list(files.glob("prepared/example_records/*/tokens"))
    longer = opened(files, kind, name, **changes | {"sequence_length": 40, "truncate": "tail"})
    assert digest(longer.evaluation_batches(made, "train")) != expected[0][2]
    assert len(list(files.glob("prepared/example_records/*/tokens/*"))) == 1, "of rows of any length"


def test_what_is_said_at_each_start_is_the_same(files):
    for _ in range(2):
        assert opened(files, "labelled", "labelled.jsonl").description == (
            "labelled.jsonl: train 81 examples, validation 9 examples; classes 3, a, b\nclass 'b': ' b', 'b' in the files"
        )
        assert opened(files, "pairs", "source.txt target.txt").description == (
            "source.txt and target.txt: train 73 examples, validation 8 examples\n9 pairs with an empty side are left out"
        )


@pytest.fixture
def old(files):
    """Files that did not change just now."""
    for path in files.glob("*.*"):
        os.utime(path, (1, 1))
    return files


@pytest.mark.parametrize("case", ["words", "two vocabularies", "two files"])
def test_a_later_start_neither_reads_the_files_nor_encodes_a_text(old, case, monkeypatch):
    monkeypatch.setattr(seen, "_SETTLED_SECONDS", -10)
    kind, name, tokenizer, changes = CASES[case]
    data = opened(old, kind, name, **changes)
    made = tokenizer_of(old, data, tokenizer)
    first = digests(data, made)
    with monkeypatch.context() as patch:
        patch.setattr(files_module, "file_lines", None)
        patch.setattr(tables, "file_lines", None)
        again = opened(old, kind, name, **changes)
        encoded = []
        for one in (made, getattr(made, "source", made), getattr(made, "target", made)):
            patch.setattr(type(one), "encode", lambda self, text: encoded.append(text))
            patch.setattr(type(one), "encode_batch", lambda self, texts: encoded.extend(texts), raising=False)
        assert digests(again, made) == first
        assert encoded == []
    # The same content at another time is the same; other content is not.
    path = old / name.split()[0]
    os.utime(path, (2, 2))
    assert digests(opened(old, kind, name, **changes), made) == first
    assert len(list(old.glob("prepared/example_records/*"))) == 1
    path.write_text(path.read_text().replace("five", "six"))
    assert opened(old, kind, name, **changes).source.fingerprint[:12] != first[0]
    assert len(list(old.glob("prepared/example_records/*"))) == 2


def test_tfds_reads_what_is_stored(files):
    data = opened(files, "labelled", "labelled.jsonl", validation_fraction=0.0)
    made = data.make_tokenizer()
    list(data.evaluation_batches(made, "train"))
    (folder,) = files.glob("prepared/example_records/*")
    stored = open_stored(epath.Path(folder / "examples"))
    found = [(row["text"].decode(), int(row["label"])) for row in stored.as_data_source("train")]
    assert found == [tuple(example) for example in data.source.examples("train")]
    assert stored.info.features["label"].names == ["3", "a", "b"]
    (folder,) = folder.glob("tokens/*")
    for row, (text, label) in zip(open_stored(epath.Path(folder)).as_data_source("train"), found, strict=True):
        assert (row["text"].tolist(), row["label"]) == (made.encode(text).tolist(), label)
        assert row["text"].dtype == np.uint8


def test_each_side_of_a_pair_has_the_smallest_type(files):
    data = opened(files, "pairs", "pairs.jsonl")
    made = PairTokenizer(ByteTokenizer(), data.make_tokenizer())
    list(data.evaluation_batches(made, "train"))
    (folder,) = files.glob("prepared/example_records/*/tokens/*")
    features = open_stored(epath.Path(folder)).info.features
    assert [np.dtype(features[side].np_dtype) for side in ("source", "target")] == [np.uint16, np.uint8]


class Own(ByteTokenizer):
    """A tokenizer whose code is not known."""

    def encode(self, text):
        return super().encode(text.upper())


@pytest.mark.parametrize("made", [Own(), PairTokenizer(Own(), ByteTokenizer()), PairTokenizer(ByteTokenizer(), Own())])
def test_a_user_defined_tokenizer_runs_each_time(files, made):
    data = opened(files, "pairs", "pairs.jsonl")
    list(data.evaluation_batches(made, "train"))
    assert not list(files.glob("prepared/example_records/*/tokens"))


# ---- Classes of a run ------------------------------------------------------------------------------------------------


def test_labels_have_the_numbers_of_the_run_that_scores_them(files):
    own = opened(files, "labelled", "labelled.jsonl", validation_fraction=0.0)
    names = ("b", "other", "3", "a")
    for _ in range(2):
        scored = opened(files, "labelled", "labelled.jsonl", names, validation_fraction=0.0)
        assert scored.class_names == names
        pairs = zip(own.source.examples("train"), scored.source.examples("train"), strict=True)
        assert all(names[b.label] == own.class_names[a.label] and a.text == b.text for a, b in pairs)
        labels = [batch.labels[batch.weights > 0] for batch in scored.evaluation_batches(ByteTokenizer(), "train")]
        assert sorted(np.concatenate(labels)) == sorted(example.label for example in scored.source.examples("train"))
        # As it was: of the names in their order, and of the examples.
        content = ContentHash()
        content.add("labelled", *names)
        for example in own.source.examples("train"):
            content.add(example.text, own.class_names[example.label])
        content.add(2, "train", 90)
        assert scored.source.fingerprint == content.hexdigest()


@pytest.mark.parametrize("stored", [False, True])
def test_a_class_that_the_run_has_not_is_named_with_its_location(old, stored, monkeypatch):
    monkeypatch.setattr(seen, "_SETTLED_SECONDS", -10)
    if stored:
        opened(old, "labelled", "labelled.jsonl")
    with pytest.raises(UserError, match=r"one of the run's classes, a, b, .*labelled\.jsonl, line 4 has '3'"):
        opened(old, "labelled", "labelled.jsonl", ("a", "b"))


def test_a_lone_class_is_refused_before_anything_is_stored(files):
    (files / "one.jsonl").write_text('{"text": "a", "label": "x"}\n' * 3)
    for _ in range(2):
        with pytest.raises(UserError, match="at least two classes, the training split has x"):
            opened(files, "labelled", "one.jsonl")
    assert not (files / "prepared" / "example_records").exists()
    assert opened(files, "labelled", "one.jsonl", ("x", "y")).source.examples("train")[0].label == 0
    (files / "none.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"must hold examples, none\.jsonl has none"):
        opened(files, "labelled", "none.jsonl")


# ---- What may go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["examples", "tokens", "both"])
@pytest.mark.parametrize("case", ["bytes", "two files"])
def test_where_nothing_can_be_written_examples_are_read_and_encoded_each_time(files, case, refused, monkeypatch):
    def refuse(path, records):
        raise PermissionError(13, "Permission denied")

    for module, name in ((example_store, "examples"), (token_shards, "tokens")):
        if refused in (name, "both"):
            monkeypatch.setattr(module, "write_shard", refuse)
    kind, name, tokenizer, changes = CASES[case]
    data = opened(files, kind, name, **changes)
    assert digests(data, tokenizer_of(files, data, tokenizer)) == BEFORE[case]


def test_a_full_disk_is_an_error(files, monkeypatch):
    def fail(path, records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(example_store, "write_shard", fail)
    with pytest.raises(UserError, match=r"below data\.data_dir, .* failed: .*No space left"):
        opened(files, "labelled", "labelled.jsonl")


def test_a_file_that_changes_while_it_is_stored_is_an_error(files, monkeypatch):
    survey, path = example_store._survey, files / "labelled.jsonl"

    def change(*arguments):
        found = survey(*arguments)
        path.write_text(path.read_text().replace("five", "six"))
        return found

    monkeypatch.setattr(example_store, "_survey", change)
    with pytest.raises(UserError, match=r"must stay as it is while it is read, labelled\.jsonl changed"):
        opened(files, "labelled", "labelled.jsonl")
    assert not list(files.glob("prepared/example_records/*"))


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import pathlib
import test_example_tokens as here
from transformer.data import example_store, token_shards, tokens

left = int(sys.argv[1])
example_store._SHARD_BYTES = tokens._SHARD_BYTES = 900
tokens._processors = lambda: 1

def dying(write):
    def die(path, records):
        global left
        left -= 1
        if left < 0:
            path.with_name(path.name + "-01234567.unfinished").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, records)
    return die

example_store.write_shard, token_shards.write_shard = dying(example_store.write_shard), dying(token_shards.write_shard)
data = here.opened(pathlib.Path.cwd(), "labelled", "labelled.jsonl", **here.CASES["bytes"][3])
made = here.tokenizer_of(None, data, "bytes")
print(here.digests(data, made))
"""


@pytest.mark.parametrize("writes", [0, 1, 4, 6, 9])
def test_after_sigkill_the_next_start_gives_the_same_records(files, writes, monkeypatch):
    def run(count):
        folders = [os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "..", "shared")]
        command = [sys.executable, "-c", KILLED, str(count), *folders]
        root = pathlib.Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""}
        return subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True)

    def written():
        return {
            path.name: path.read_bytes()
            for path in files.glob("prepared/example_records/*/**/*array_record-*-of-?????")
        }

    done = run(writes)
    assert done.returncode == -9, done.stderr
    kept = written()
    again = run(1000)
    assert again.returncode == 0, again.stderr
    assert ast.literal_eval(again.stdout) == BEFORE["bytes"]
    complete = written()
    assert len(complete) > 6
    assert kept.items() <= complete.items()
    assert not list(files.rglob("*.unfinished"))
    shutil.rmtree(files / "prepared")
    assert ast.literal_eval(run(1000).stdout) == BEFORE["bytes"]
    assert written() == complete
