"""Small corpora, and a config that prepares them below the test's own folder."""

import json

import pytest

from transformer.config import DataConfig


@pytest.fixture
def make_config(tmp_path):
    def make(*source, **changes):
        changes = {"data_dir": str(tmp_path / "prepared"), "sequence_length": 16, "batch_size": 4} | changes
        return DataConfig(source=tuple(str(s) for s in source), **changes)

    return make


@pytest.fixture
def write_folder(tmp_path):
    """Writes a folder of text files of uneven lengths, each of which says its number again and again."""

    def write(name="folder", files=12):
        folder = tmp_path / name
        for number in range(files):
            path = folder / f"sub{number % 3}" / f"{number:02}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} {number:02}\n" * (3 + number * 7 % 11))
        return folder

    return write


@pytest.fixture
def write_jsonl(tmp_path):
    def write(records, name="records.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
