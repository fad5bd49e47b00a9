"""Sources in a bucket are read through epath alone: a `gs://` whose objects lie in a folder of this machine."""

import gzip
import json
import os
import sys

import numpy as np
import pytest
from buckets import make_bucket
from etils import epath

from transformer.cli.main import main
from transformer.config import DataConfig
from transformer.data.registry import find_source, open_source

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"text": f"text {i}, über\n" * 9, "label": "ab"[i % 2]} for i in range(30)]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is also `gs://b`."""
    return make_bucket(tmp_path, monkeypatch)


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WRITERS = {
    "a.txt": lambda path: path.write_text("one\n" * 50),
    "a.jsonl": lambda path: path.write_bytes(as_jsonl(ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(as_jsonl(ROWS))),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(as_jsonl(ROWS))),
    "a.csv": lambda path: path.write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in ROWS)),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_what_it_is_on_the_disk(tmp_path, bucket, name):
    WRITERS[name](bucket / name)
    config = DataConfig(data_dir=str(tmp_path / "prepared"), validation_fraction=0.0)
    there, here = open_source(f"gs://b/{name}", config), open_source(str(bucket / name), config)
    assert there.fingerprint == here.fingerprint
    assert list(there.records("train")) == list(here.records("train"))


def test_folders_and_patterns(tmp_path, bucket):
    for name in ("parts", "texts"):
        (bucket / name).mkdir()
    for number in range(3):
        (bucket / "parts" / f"{number}.jsonl.gz").write_bytes(gzip.compress(as_jsonl(ROWS[number * 10 :][:10])))
        (bucket / "texts" / f"{number}.txt").write_text(f"text {number}\n" * 40)
    config = DataConfig(data_dir=str(tmp_path / "prepared"), validation_fraction=0.0)
    for name in ("texts", "parts/*.jsonl.gz"):
        there, here = open_source(f"gs://b/{name}", config), open_source(str(bucket / name), config)
        assert there.fingerprint == here.fingerprint, name
        assert there.sizes == here.sizes


def test_examples(tmp_path, bucket):
    (bucket / "a.jsonl").write_bytes(as_jsonl(ROWS))
    rows = find_source("gs://b/a.jsonl").rows("gs://b/a.jsonl", ("text", "label"), "")
    places, found = zip(*rows, strict=True)
    assert list(found) == ROWS
    assert places[2] == "gs://b/a.jsonl, line 3"


def test_token_files(tmp_path, bucket):
    np.arange(0, 200, dtype="<u2").tofile(bucket / "train.bin")
    config = DataConfig(data_dir=str(tmp_path / "prepared"), validation_fraction=0.0)
    there, here = open_source("gs://b/train.bin", config), open_source(str(bucket / "train.bin"), config)
    assert there.fingerprint == here.fingerprint


def test_the_fake_is_one(bucket):
    (bucket / "x").write_text("x")
    assert epath.Path("gs://b/x").read_text() == "x"
    assert not os.path.exists("gs://b/x")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://example.org/a.txt", "must begin with gs://"),
        ("file:///a.txt", "must begin with gs://"),
        ("gs://bucket/a.txt", "pip install gcsfs"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused_in_a_sentence(address, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for command in (["prepare", address, "--data-dir", str(tmp_path)], ["prepare", __file__, "--data-dir", address]):
        with pytest.raises(SystemExit) as refusal:
            main(command)
        assert refusal.value.code == 2 and message in capsys.readouterr().err
