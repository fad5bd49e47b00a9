"""Files as people have them: compressed with zstd, Parquet, Arrow, what `datasets` saves, and several by one pattern."""

import bz2
import contextlib
import datetime
import decimal
import gzip
import json
import lzma
import random
import sys
import time
import tracemalloc

import pytest
from etils import epath

from transformer.cli.main import main
from transformer.config import DataConfig
from transformer.data.files import open_file, read_file
from transformer.data.frames import open_zstd
from transformer.data.registry import find_source, open_source
from transformer.data.sources.folders import Folder
from transformer.data.sources.globs import Pattern
from transformer.types import UserError

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"text": f"text {i} über\n" * 3, "label": "ab"[i % 2]} for i in range(7)]
KEYS = ("text", "label")


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts_of(name, **settings):
    config = DataConfig(**settings)
    return [document.text for document in find_source(str(name)).documents(str(name), config)]


def table(rows=ROWS):
    return pa.Table.from_pylist(rows)


def write_stream(path, rows=ROWS):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table().schema) as writer:
        for row in rows:
            writer.write_table(table([row]))


def write_file(path, rows=ROWS):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table().schema) as writer:
        writer.write_table(table(rows), max_chunksize=3)


WRITERS = {
    "rows.parquet": lambda path: pq.write_table(table(), path, row_group_size=3),
    "stream.arrow": write_stream,
    "file.arrow": write_file,
    "rows.feather": write_file,
    "rows.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(as_jsonl(ROWS))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_agree_with_jsonl(tmp_path, name):
    (tmp_path / "rows.jsonl").write_bytes(as_jsonl(ROWS))
    WRITERS[name](tmp_path / name)
    found, expected = (
        [*find_source(str(p)).rows(str(p), KEYS, "")] for p in (tmp_path / name, tmp_path / "rows.jsonl")
    )
    assert [row for _, row in found] == [row for _, row in expected] == ROWS
    assert [place for place, _ in found] == [f"{tmp_path / name}, line {i}" for i in range(1, 8)]
    assert texts_of(tmp_path / name) == texts_of(tmp_path / "rows.jsonl") == [row["text"] for row in ROWS]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("part", ["cut", "empty", "noise"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, part):
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": content[:4] + b"\x01" * 200}[part])
    with pytest.raises(UserError) as refusal:
        open_source(str(path), DataConfig(data_dir=str(tmp_path / "data")))
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow"])
def test_a_column_that_is_not_there_is_named(tmp_path, name):
    WRITERS[name](tmp_path / name)
    with pytest.raises(UserError, match=r"has no body but text, label"):
        texts_of(tmp_path / name, text_key="body")


def test_values_are_as_in_json(tmp_path):
    row = {
        "text": "a",
        "when": datetime.date(2026, 1, 2),
        "raw": b"\0\1",
        "more": {"cost": decimal.Decimal("1.5"), "n": [1, None]},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    ((_, found),) = find_source(str(tmp_path / "rows.parquet")).rows(str(tmp_path / "rows.parquet"), ("text",), "")
    expected = {"text": "a", "when": "2026-01-02", "raw": "AAE=", "more": {"cost": "1.5", "n": [1, None]}}
    assert found == json.loads(json.dumps(found)) == expected


def test_zstd_of_any_length_in_frames_and_with_a_mark(tmp_path):
    draw = random.Random(0)
    text = "".join(draw.choice("abcdefgh \n") for _ in range(700_000)).encode()
    path = epath.Path(tmp_path / "text.txt.zst")
    for marked in (b"", b"\xef\xbb\xbf"):
        whole = marked + text
        path.write_bytes(b"".join(zstandard.compress(whole[i : i + 300_000]) for i in range(0, len(whole), 300_000)))
        assert read_file(path) == text
    with path.open("rb") as file:
        unpacked = open_zstd(file)
        assert unpacked.read(200_000) == whole[:200_000]
        unpacked.seek(0)
        assert unpacked.read() == whole
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"must be whole, .* it ends within a frame"):
        read_file(path)


PACK = {"bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress, "gz": gzip.compress}


def rows_in_frames(pack, count):
    content = as_jsonl([{"text": f"{index} {index * 7919}"} for index in range(count)])
    middle = content.index(b"\n", len(content) // 2) + 1
    return content, pack(content[:middle]), pack(content[middle:])


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("between", [0, 4, 300_000])
def test_frames_and_padding_are_one_file(tmp_path, suffix, between):
    content, first, second = rows_in_frames(PACK[suffix], 20_000)
    path = epath.Path(tmp_path / f"rows.jsonl.{suffix}")
    for after in (second, second + bytes(between)):
        path.write_bytes(first + bytes(between) + after)
        assert read_file(path) == content


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["first bytes", "cut", "other data"])
def test_a_damaged_later_frame_loses_no_text_in_silence(tmp_path, suffix, damage, capfd):
    _, first, second = rows_in_frames(PACK[suffix], 200)
    after = {"first bytes": b"\xff\xff\xff" + second[3:], "cut": second[:9], "other data": b"other data"}[damage]
    (tmp_path / f"rows.jsonl.{suffix}").write_bytes(first + after)
    with pytest.raises(SystemExit):
        main(["prepare", str(tmp_path / f"rows.jsonl.{suffix}"), "--data-dir", str(tmp_path / "data")])
    assert "must be whole" in (message := capfd.readouterr().err) and f"rows.jsonl.{suffix}" in message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("suffix", ["bz2", "xz"])
def test_unpacking_takes_little_memory_whatever_the_ratio(tmp_path, suffix):
    (tmp_path / "zeros").write_bytes(PACK[suffix](bytes(100_000_000)))
    tracemalloc.start()
    with open_file(epath.Path(tmp_path / "zeros")) as file:
        assert sum(len(piece) for piece in iter(lambda: file.read(1 << 16), b"")) == 100_000_000
    peak, _ = tracemalloc.get_traced_memory()[1], tracemalloc.stop()
    assert peak < 20_000_000


def prepared(tmp_path, capfd, *arguments):
    """What `transformer prepare` printed: its result, or its message."""
    with contextlib.suppress(SystemExit):
        main(["prepare", *map(str, arguments), "--data-dir", str(tmp_path / "data")])
    printed = " ".join("".join(capfd.readouterr()).split())
    assert printed.startswith("error:") != (tmp_path / "data" / "text_records").exists()
    return printed


def test_text_in_columns_of_bytes_is_text(tmp_path, capfd):
    columns = {"text": [row["text"].encode() for row in ROWS], "raw": [b"ab"] * len(ROWS)}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_bytes(as_jsonl(ROWS))
    found = [prepared(tmp_path, capfd, tmp_path / name) for name in ("rows.parquet", "rows.jsonl")]
    assert found[0].partition(":")[2] == found[1].partition(":")[2]
    assert texts_of(tmp_path / "rows.parquet") == [row["text"] for row in ROWS]
    pq.write_table(pa.table({"text": [b"\xe4 text"]}), tmp_path / "latin.parquet")
    assert "must be UTF-8, text of" in prepared(tmp_path / "other", capfd, tmp_path / "latin.parquet")


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        (["a.jsonl", "b.jsonl"], "*.jsonl"),
        (["a.txt", "deep/b.JSONL.gz"], "deep/*.JSONL.gz"),
        (["README.md", "data/a.parquet"], "data/*.parquet"),
        (["a.csv", "b.csv"], "*.csv"),
    ],
)
def test_a_folder_of_rows_is_not_read_as_text(tmp_path, capfd, files, pattern):
    for file in files:
        (tmp_path / "folder" / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "folder" / file).write_bytes(as_jsonl(ROWS))
    message = prepared(tmp_path, capfd, tmp_path / "folder")
    assert f"has rows of fields: give a pattern of such files, {tmp_path / 'folder'}/{pattern};" in message
    with pytest.raises(UserError, match="has rows of fields"):
        list(Folder().parts(str(tmp_path / "folder")))


def test_tables_beside_texts_are_read_as_they_are(tmp_path, capfd):
    (tmp_path / "code").mkdir()
    for name in ("code.py", "table.csv"):
        (tmp_path / "code" / name).write_text("some text\n" * 9)
    assert "train" in prepared(tmp_path, capfd, tmp_path / "code")


def test_a_mistake_in_validation_files_is_found_before_the_corpus_is_prepared(tmp_path, capfd):
    (tmp_path / "rows.jsonl").write_bytes(as_jsonl(ROWS))
    message = prepared(tmp_path, capfd, tmp_path / "rows.jsonl", "--validation", tmp_path / "not there.jsonl")
    assert "not there.jsonl" in message


def saved(folder, rows=ROWS):
    """As `datasets` 4 lays it out."""
    folder.mkdir(parents=True)
    for index, part in enumerate((rows[:4], rows[4:])):
        write_stream(folder / f"data-0000{index}-of-00002.arrow", part)
    files = [{"filename": f"data-0000{index}-of-00002.arrow"} for index in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "0"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_dataset_is_its_rows(tmp_path):
    assert texts_of(saved(tmp_path / "saved")) == [row["text"] for row in ROWS]
    saved(tmp_path / "both" / "train")
    saved(tmp_path / "both" / "test", ROWS[:5])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(texts_of(tmp_path / "both" / "test")) == 5
    with pytest.raises(UserError, match=r"must be one dataset, .* has test, train; give one, such as .*/both/train"):
        texts_of(tmp_path / "both")


@pytest.mark.parametrize("filename", ["../data.arrow", "/etc/passwd", 3])
def test_a_saved_dataset_names_files_of_its_folder(tmp_path, filename):
    folder = saved(tmp_path / "saved")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": filename}]}))
    with pytest.raises(UserError, match=r"must name files of its folder"):
        texts_of(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}'])
def test_a_saved_dataset_whose_state_is_damaged_is_refused(tmp_path, content):
    folder = saved(tmp_path / "saved")
    (folder / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json"):
        texts_of(folder)


def test_a_pattern_is_its_files_in_order(tmp_path):
    for index in (2, 0, 1):
        (tmp_path / f"{index}.jsonl.gz").write_bytes(gzip.compress(as_jsonl(ROWS[2 * index : 2 * index + 2])))
        (tmp_path / f"{index}.txt").write_text(f"plain {index}")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert texts_of(tmp_path / "*.jsonl.gz") == [row["text"] for row in ROWS[:6]]
    assert texts_of(tmp_path / "[12].txt") == ["plain 1", "plain 2"]
    rows = find_source(f"{tmp_path}/?.jsonl.gz").rows(f"{tmp_path}/?.jsonl.gz", KEYS, "")
    assert [place for place, _ in rows][::2] == [f"{tmp_path}/{index}.jsonl.gz, line 1" for index in range(3)]


def test_a_pattern_below_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.txt").write_text(name)
    assert texts_of(tmp_path / "*" / "part.txt") == ["a", "b"]
    assert texts_of(tmp_path / "**" / "*.txt") == ["a", "b"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.none", "must match a file, .* matches none"),
        ("*", r"must be of one kind, .* matches .*a\.jsonl and .*b\.txt"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused(tmp_path, pattern, message):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / pattern)


def test_a_name_with_the_signs_of_a_pattern_is_a_file_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("itself")
    (tmp_path / "a1.txt").write_text("another")
    assert texts_of(tmp_path / "a[1].txt") == ["itself"]


def test_a_pattern_is_prepared_once_and_anew_where_a_file_comes(tmp_path):
    for index in range(2):
        (tmp_path / f"{index}.txt").write_text(f"plain {index}")
    config = DataConfig(data_dir=str(tmp_path / "data"), validation_fraction=0.0)
    first = open_source(f"{tmp_path}/*.txt", config).fingerprint
    assert open_source(f"{tmp_path}/*.txt", config).fingerprint == first
    (tmp_path / "2.txt").write_text("plain 2")
    assert open_source(f"{tmp_path}/*.txt", config).fingerprint != first


def test_files_of_a_pattern_are_not_read_again_where_none_has_changed(tmp_path, monkeypatch):
    for index in range(2):
        (tmp_path / f"{index}.txt").write_text(f"plain {index}")
    config, name = DataConfig(data_dir=str(tmp_path / "data")), f"{tmp_path}/*.txt"
    now = time.time()
    monkeypatch.setattr("transformer.data.seen.time.time", lambda: now + 10)  # files that have just changed are read
    first = open_source(name, config).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(Pattern, "documents", lambda *_: pytest.fail("it is read"))
        assert open_source(name, config).fingerprint == first
    (tmp_path / "1.txt").write_text("another")
    assert open_source(name, config).fingerprint != first


def test_without_the_packages_the_command_that_installs_them_is_named(tmp_path, monkeypatch):
    WRITERS["rows.parquet"](tmp_path / "rows.parquet")
    WRITERS["rows.jsonl.zst"](tmp_path / "rows.jsonl.zst")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr("transformer.data.frames.zstandard", None)
    for name in ("rows.parquet", "rows.jsonl.zst"):
        with pytest.raises(UserError, match=r'pip install -e "\.\[formats\]"'):
            texts_of(tmp_path / name)
