"""A corpus is identified by its content and its split: a moved corpus is the same, a changed one is another, under any name."""

import gzip
import json
import shutil

import pytest

from transformer.config import DataConfig
from transformer.data.datasets import describe_data, open_data
from transformer.data.examples import prepare_examples
from transformer.data.identity import ContentHash, sampled
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.form import FORMS
from transformer.objective import OBJECTIVES
from transformer.objectives.next_token import NextToken

LINES = [f"line {i} of a text\n" for i in range(400)]


def _file(root):
    path = root / "text.txt"
    path.write_text("".join(LINES))
    return path, lambda: path.write_text("".join(LINES).replace("line 7", "LINE 7"))


def _folder(root):
    path = root / "texts"
    path.mkdir()
    for i in range(4):
        (path / f"{i}.txt").write_text("".join(LINES[i * 100 : i * 100 + 100]))
    return path, lambda: (path / "2.txt").write_text("".join(LINES[200:300]).replace("line 207", "LINE 207"))


def _jsonl(root):
    path = root / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line, "prompt": "p"}) + "\n" for line in LINES))
    return path, lambda: path.write_text(path.read_text().replace('"prompt": "p"', '"prompt": "q"', 1))


LOCAL = {"file": _file, "folder": _folder, "jsonl": _jsonl}


def _describe(source, data_dir, **changes):
    config = DataConfig(source=(str(source),), data_dir=str(data_dir), sequence_length=16, batch_size=4, **changes)
    return describe_data(open_data(config, NextToken()))


def _iterator(source, data_dir):
    config = DataConfig(source=(str(source),), data_dir=str(data_dir), sequence_length=16, batch_size=4)
    return open_data(config, NextToken()).train_batches(ByteTokenizer())


@pytest.mark.parametrize("make", LOCAL.values(), ids=LOCAL)
def test_a_corpus_that_moved_is_the_same_and_its_iterator_goes_on(tmp_path, monkeypatch, make):
    path, _ = make(tmp_path)
    before = _describe(path, tmp_path / "prepared")
    iterator = _iterator(path, tmp_path / "prepared")
    next(iterator)
    state, following = json.loads(json.dumps(iterator.get_state())), next(iterator)
    assert str(tmp_path) not in json.dumps([before, state])
    monkeypatch.chdir(tmp_path)
    assert _describe(path.name, tmp_path / "prepared") == before
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(path, tmp_path / "elsewhere" / f"renamed{path.suffix}")
    there = _describe(moved, tmp_path / "another")
    assert [source | {"name": ""} for source in there] == [source | {"name": ""} for source in before]
    resumed = _iterator(moved, tmp_path / "another")
    resumed.set_state(state)
    assert next(resumed).targets.tolist() == following.targets.tolist()


@pytest.mark.parametrize("make", LOCAL.values(), ids=LOCAL)
def test_changed_content_or_another_split_is_another_corpus(tmp_path, make):
    path, change = make(tmp_path)
    seen = [_describe(path, tmp_path / "prepared", validation_fraction=share)[0] for share in (0.05, 0.1)]
    seen.append(_describe(path, tmp_path / "prepared", test_fraction=0.1)[0])
    change()
    seen.append(_describe(path, tmp_path / "prepared")[0])
    assert len({source["fingerprint"] for source in seen}) == len(seen)
    assert [sorted(source["splits"]) for source in seen[1:3]] == [
        ["train", "validation"],
        ["test", "train", "validation"],
    ]


def test_records_of_another_size_and_a_packed_file_are_the_same_corpus(tmp_path):
    path, _ = _file(tmp_path)
    before = _describe(path, tmp_path / "prepared")
    assert _describe(path, tmp_path / "prepared", record_bytes=64) == before
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert _describe(tmp_path / "packed.txt.gz", tmp_path / "prepared")[0]["fingerprint"] == before[0]["fingerprint"]


@pytest.mark.parametrize(("kind", "objective"), [("labelled", "classification"), ("pairs", "seq2seq")])
def test_a_prepared_dataset_of_the_same_name_and_size_differs_by_content(tmp_path, kind, objective):
    header = {"labelled": "text,label", "pairs": "source,target"}[kind]

    def prepared(where, last, **changes):
        path, data_dir = tmp_path / f"{where}.csv", tmp_path / where
        path.write_text("\n".join([header, *(f"text {i},{i % 2}" for i in range(19)), last]))
        config = DataConfig(source=("mine",), data_dir=str(data_dir), **changes)
        if not data_dir.exists():
            prepare_examples(FORMS.find(kind)(), "mine", {"train": [str(path)]}, config)
        return describe_data(open_data(config, OBJECTIVES.find(objective)()))

    first = prepared("one", "text a,1")
    assert first == prepared("two", "text a,1")
    others = [prepared("three", "text b,1"), prepared("four", "text a,0"), prepared("one", "", validation_fraction=0.3)]
    assert len({json.dumps(described) for described in [first, *others]}) == 4


def test_neighbouring_parts_are_distinguished():
    seen = set()
    for parts in ([("a", "b")], [("ab",)], [("a",), ("b",)], [("", "ab")], [("a", "b", "")]):
        content = ContentHash()
        for part in parts:
            content.add(*part)
        seen.add(content.hexdigest())
    assert len(seen) == 5


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (1024, 1024), (100_000, 1024)])
def test_a_sample_is_bounded_and_has_both_ends(count, expected):
    indices = sampled(count)
    assert len(indices) == expected
    assert count == 0 or {0, count - 1} <= set(indices)
