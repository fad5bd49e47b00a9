"""Text that tasks prepare, file by file and shard by shard, is what one process prepares, bit for bit; and how tasks fail."""

import bz2
import dataclasses
import gzip
import json
import os
import pickle
import random
import sys

import pytest
from etils import epath

from transformer.cli.main import main
from transformer.data import prepare, seen, shards, tasks, tokens
from transformer.data.registry import open_source, open_sources
from transformer.data.source_kind import SourceKind
from transformer.data.tasks import Unfinished, run_tasks
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokens import store_tokens
from transformer.types import UserError

BYTES = ByteTokenizer()


class Shuffled:
    """Runs tasks as the runner of a cluster may: pickled, in any order, some of them twice."""

    def __init__(self):
        self.calls = []

    def __call__(self, what, task, items):
        items = [*items, *items[::3]]
        random.Random(len(items)).shuffle(items)
        for item in items:
            self.calls.append((what, item))
            pickle.loads(pickle.dumps(task))(pickle.loads(pickle.dumps(item)))


@pytest.fixture
def run():
    return Shuffled()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "_SHARD_BYTES", 300)
    monkeypatch.setattr(tokens, "_SHARD_BYTES", 2000)
    monkeypatch.setattr(tokens, "_processors", lambda: 1)
    monkeypatch.setattr(tasks, "_PART_BYTES", 200)


def _rows(count, first=0):
    return [
        {"text": f"text {i}, é\n" * (1 + i % 9), "prompt": f"prompt é {i}" if i % 3 else ""}
        for i in range(first, first + count)
    ]


def _lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _folder(root):
    for number in range(12):
        path = root / "folder" / f"sub{number % 3}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"folder {number:02}\n" * (3 + number * 7 % 11))
    (root / "folder" / "blank.txt").write_text(" \n")
    (root / "folder" / "packed.txt.gz").write_bytes(gzip.compress(b"packed\n" * 50 + b"<|>\none more<|> \n<|>\nlast"))
    return root / "folder"


def _jsonl(root):
    (root / "rows.jsonl.gz").write_bytes(gzip.compress(_lines([*_rows(40), {"text": "  "}])))
    return root / "rows.jsonl.gz"


def _pattern(root):
    for number in range(5):
        (root / f"part{number}.jsonl.bz2").write_bytes(bz2.compress(_lines(_rows(9 * (number % 4), 10 * number))))
    return f"{root}/part*.jsonl.bz2"


def _one_text(root):
    (root / "text.txt").write_text("a line of one long document, é\n" * 90)
    return root / "text.txt"


def _long_and_short(root):
    rows = [*_rows(2), {"text": "long é\n" * 300, "prompt": "p"}, {"text": "longer, without newlines " * 90}]
    (root / "rows.jsonl").write_bytes(_lines(rows))
    return root / "rows.jsonl"


def _conversations(root):
    def talk(i):
        return [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i} " * (i % 7)},
        ]

    (root / "talks.jsonl").write_bytes(_lines([{"messages": talk(i)} for i in range(20)]))
    return root / "talks.jsonl"


SOURCES = [_folder, _jsonl, _pattern, _one_text, _long_and_short, _conversations]


def _files(directory):
    paths = [path for path in directory.rglob("*") if path.is_file() and "text_seen" not in path.parts]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("record_bytes", [64, 400])
@pytest.mark.parametrize("fractions", [(0.1, 0.0), (0.2, 0.15), (0.0, 0.0)])
@pytest.mark.parametrize("write", SOURCES)
def test_files_agree_with_one_process(tmp_path, make_config, run, write, fractions, record_bytes):
    source, stored = str(write(tmp_path)), write is not _conversations  # these need a chat template
    changes = {"separator": "<|>", "record_bytes": record_bytes}
    config = make_config(source, validation_fraction=fractions[0], test_fraction=fractions[1], **changes)
    alone = open_source(source, config)
    (together,) = open_sources(dataclasses.replace(config, data_dir=str(tmp_path / "others")), run)
    assert (together.fingerprint, together.description) == (alone.fingerprint, alone.description)
    if stored:
        assert store_tokens(alone, BYTES) and store_tokens(together, BYTES, run)
    expected, found = _files(tmp_path / "prepared"), _files(tmp_path / "others")
    assert found == expected
    assert sum("text_records-train" in name for name in found) > 2
    assert any("/tokens/" in name for name in found) == stored


def test_what_is_there_takes_no_task(tmp_path, make_config, run, monkeypatch):
    monkeypatch.setattr(seen, "_SETTLED_SECONDS", -60)
    config = make_config(_jsonl(tmp_path))
    (source,) = open_sources(config, run)
    store_tokens(source, BYTES, run)
    assert {what.partition(" ")[0] for what, _ in run.calls} == {"reading", "records", "tokens"}
    run.calls.clear()
    for again in (open_sources(config, run)[0], open_source(config.source[0], config)):
        assert store_tokens(again, BYTES, run)
        assert list(again.records("all")) == list(source.records("all"))
    assert run.calls == []


def test_a_user_defined_source_is_one_part(tmp_path, make_config, run):
    config = make_config("numbers", validation_fraction=0.2)
    assert Numbers().parts("numbers") == ("all",)
    together = Numbers().open_text("numbers", config, run)
    expected = Numbers().open_text("numbers", dataclasses.replace(config, data_dir=str(tmp_path / "others")))
    assert list(together.records("all")) == list(expected.records("all"))


class Numbers(SourceKind):
    is_path = False

    def rows(self, name, keys, what):
        yield from ((f"number {i}", {"text": str(i)}) for i in range(300))


def test_files_are_read_in_groups_of_about_one_size(tmp_path):
    paths = []
    for number, size in enumerate([50, 150, 1, 500, 100, 0, 100, 1]):
        paths.append(epath.Path(tmp_path / f"{number}"))
        paths[-1].write_bytes(b"x" * size)
    groups = tasks.by_size(paths)
    assert [[int(os.path.basename(name)) for name in group] for group in groups] == [[0, 1], [2], [3], [4, 5, 6], [7]]
    assert tasks.by_size([]) == []


# ---- What goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("finished", [0, 1, 3, 6, 9])
def test_a_run_that_dies_is_gone_on_with(tmp_path, make_config, run, monkeypatch, finished, settled):
    monkeypatch.setattr(seen, "_SETTLED_SECONDS", -60 if settled else 60)
    config = make_config(_folder(tmp_path), record_bytes=64)
    expected = list(
        open_source(config.source[0], dataclasses.replace(config, data_dir=str(tmp_path / "o"))).records("all")
    )
    done = []

    def die(what, task, items):
        for item in items:
            if len(done) == finished:
                raise Unfinished("a worker died")
            task(item)
            done.append((what, item))

    with pytest.raises(Unfinished, match="a worker died"):
        open_sources(config, die)
    assert not list(tmp_path.glob("prepared/text_records/*/prepared.json"))
    left = list(tmp_path.glob("prepared/text_tasks/*/*"))
    assert bool(left) == settled
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("prepared/text_records/*/text/*-of-?????")}
    (source,) = open_sources(config, run)
    assert list(source.records("all")) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = [call for call in run.calls if call in done and call[0].startswith("reading")]
    assert (again == []) == (settled or finished == 0)
    assert not list(tmp_path.glob("prepared/text_tasks/*"))
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_damaged_file_is_the_users_sentence(tmp_path, make_config, run):
    config = make_config(_pattern(tmp_path))
    path = tmp_path / "part2.jsonl.bz2"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"compressed file must be whole, .*part2\.jsonl\.bz2 is not") as found:
        open_sources(config, run)
    assert not isinstance(found.value, Unfinished)
    assert not list(tmp_path.glob("prepared/text_tasks/*"))
    assert not list(tmp_path.glob("prepared/text_records/*"))


def test_the_first_error_ends_what_has_not_begun(tmp_path):
    folder, begun = epath.Path(tmp_path), []

    def fail(item):
        begun.append(item)
        raise UserError(f"item {item} is wrong")

    for _ in range(2):  # what a run has left is no matter of the next one
        with pytest.raises(UserError, match="item 1 is wrong"):
            run_tasks(lambda what, task, items: [task(item) for item in items], "failing", fail, [1, 2, 3], folder)
    assert begun == [1, 1]
    with pytest.raises(OSError, match="a disk"):  # may pass: the runner tries it again
        run_tasks(lambda what, task, items: task(1), "failing", _break, [1], folder)


def _break(item):
    raise OSError("a disk")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_a_source_without_text_is_refused(tmp_path, make_config, run, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"must hold text, .* has 1 file and no text"):
        open_sources(make_config(tmp_path / "empty.txt"), run)


def test_a_split_without_text_is_refused(tmp_path, make_config, run):
    (tmp_path / "short.txt").write_text("ab")
    config = make_config(tmp_path / "short.txt", validation_fraction=0.3, test_fraction=0.3)
    with pytest.raises(UserError, match=r"must leave text for each split, .* none for"):
        open_source(str(tmp_path / "short.txt"), config)
    with pytest.raises(UserError, match=r"must leave text for each split, .* none for"):
        open_sources(config, run)


def test_a_shard_of_another_text_is_written_anew(tmp_path, make_config, run):
    config = make_config(_folder(tmp_path))
    expected = list(open_sources(config, run)[0].records("all"))
    (pointer,) = tmp_path.glob("prepared/text_records/*/prepared.json")
    pointer.unlink()
    shards = sorted(pointer.parent.glob("text/*-of-?????"))
    shards[1].write_bytes(shards[0].read_bytes())
    shards[2].write_bytes(b"damaged")
    assert list(open_sources(config, run)[0].records("all")) == expected


def test_a_shard_in_a_bucket_is_written_here_and_copied(tmp_path, monkeypatch):
    """ArrayRecord opens objects for reading only."""
    written = []
    real = shards.ArrayRecordWriter
    monkeypatch.setattr(shards, "ArrayRecordWriter", lambda path, how: written.append(path) or real(path, how))
    bucket = epath.Path(tmp_path / "bucket")
    bucket.mkdir()
    monkeypatch.setattr(shards, "is_local", lambda path: not str(path).startswith(str(bucket)))
    for content in ([b"one", b"two"], [b"three"]):
        shards.write_shard(bucket / "shard", iter(content))
        assert list(shards.Shards([bucket / "shard"], [len(content)])) == content
    assert [path.name for path in bucket.iterdir()] == ["shard"]
    assert len(written) == 2 and not any(path.startswith(str(bucket)) for path in written)


def test_the_package_is_requested(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    (tmp_path / "text.txt").write_text("text\n" * 100)
    arguments = ["prepare", str(tmp_path / "text.txt"), "--data-dir", str(tmp_path / "p")]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--beam-pipeline-options", "runner=DirectRunner"])
    assert capsys.readouterr().err == (
        'error: This needs the package apache-beam; in a copy of the repository: pip install -e ".[beam]".\n'
    )
    assert not (tmp_path / "p").exists()
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--kind", "pairs", "--name", "p", "--beam-pipeline-options", "runner=DirectRunner"])
    assert "is for --kind text" in capsys.readouterr().err
