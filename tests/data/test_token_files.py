"""Files of token ids as other programs write them: headers, documents, and batches equal to the text's batches."""

import dataclasses
import json
import pickle
import time

import numpy as np
import pytest
from etils import epath
from tokenizers.processors import TemplateProcessing

from tests.shared.tiny_tokenizers import byte_level
from transformer.config import Config, DataConfig
from transformer.data.datasets import data_of, describe_data
from transformer.data.registry import find_source, open_source, open_sources
from transformer.data.token_stream import TokenStream, read_header
from transformer.data.tokenizers.auto import Auto
from transformer.data.tokenizers.bytes import Bytes
from transformer.data.tokenizers.ids import IdNumbers
from transformer.tokenizer import TOKENIZERS
from transformer.types import UserError

TEXTS = [f"document {i}, the café number {i * i}\n" * (1 + i % 5) for i in range(40)]
GPT2, LLAMA = (20240520, 1, "<u2"), (20240801, 7, "<u4")


def with_header(ids, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.asarray(ids, dtype).tobytes()


def make_folder(path, around="$A"):
    """A pretrained tokenizer as Hugging Face lays it out, with ids around a text."""
    path.mkdir()
    tokenizer, end = byte_level(), "</s>"
    special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", end)]
    tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=special)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end, "bos_token": "<s>"}))
    (path / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id(end)}))
    return path


def config_of(tmp_path, *source, **changes):
    changes = {"validation_fraction": 0.0, "data_dir": str(tmp_path / "data"), "sequence_length": 32} | changes
    return Config(data=DataConfig(source=tuple(map(str, source)), batch_size=4, **changes))


def stream_of(tokenizer, style):
    """Ids as nanoGPT (`after` each document), llm.c (`before` each) or we (`both`) put them in a stream."""
    start = tokenizer.begin[-1] if getattr(tokenizer, "begin", ()) else tokenizer.end_of_text
    ids = []
    for text in TEXTS:
        ids += [start] * (style != "after") + tokenizer.encode(text).tolist()
        ids += [tokenizer.end_of_text] * (style != "before")
    return ids


def batches(config, count=12, split=None):
    data = data_of(config)
    tokenizer = data.make_tokenizer()
    if split is not None:
        return list(data.evaluation_batches(tokenizer, split))
    iterator = data.train_batches(tokenizer)
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for name, a, b in zip(one._fields, one, other, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("style", ["after", "before", "both"])
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("header", [None, GPT2, LLAMA])
def test_ids_give_the_batches_of_the_text(tmp_path, style, around, header):
    kind = Auto(folder=str(make_folder(tmp_path / "model", around)))
    tokenizer = kind.train(())
    assert bool(tokenizer.begin) == ("<s>" in around)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    ids = stream_of(tokenizer, style)
    content = np.array(ids, "<u2").tobytes() if header is None else with_header(ids, *header)
    (tmp_path / "train.bin").write_bytes(content)
    of_text, of_ids = (config_of(tmp_path, tmp_path / name, tokenizer=kind) for name in ("text.jsonl", "train.bin"))
    assert_equal(batches(of_ids), batches(of_text))
    assert_equal(batches(of_ids, split="train"), batches(of_text, split="train"))
    records = data_of(of_ids).sources[0].encoded("train", tokenizer)
    assert records.sizes().tolist() == [encoded.num_targets for encoded in records]


def test_shards_are_one_stream(tmp_path):
    ids = stream_of(Bytes().train(()), "before")
    (tmp_path / "whole.bin").write_bytes(with_header(ids))
    for number, start in enumerate(range(0, len(ids), 999)):  # within documents
        (tmp_path / f"fineweb_train_{number:06}.bin").write_bytes(with_header(ids[start : start + 999]))
    config, sharded = (
        config_of(tmp_path, tmp_path / name, tokenizer=Bytes()) for name in ("whole.bin", "fineweb_train_*.bin")
    )
    assert_equal(batches(sharded), batches(config))
    assert describe_data(data_of(sharded))[0]["fingerprint"] == describe_data(data_of(config))[0]["fingerprint"]


@pytest.mark.parametrize("names", [("train.bin", "val.bin"), ("fineweb_train_000001.bin", "fineweb_val_000000.bin")])
def test_a_folder_has_its_own_validation_file_and_nothing_is_unpickled(tmp_path, names):
    folder = tmp_path / "corpus"
    folder.mkdir()
    ids = stream_of(Bytes().train(()), "after")
    for name, part in zip(names, (ids[:3000], ids[3000:]), strict=True):
        (folder / name).write_bytes(np.array(part, "<u2").tobytes())
    (folder / "prepare.py").write_text("raise SystemExit")
    (folder / "meta.pkl").write_bytes(pickle.dumps(Explosive()))
    data = data_of(config_of(tmp_path, folder, tokenizer=Bytes(), validation_fraction=0.1))
    assert describe_data(data)[0]["splits"] == {"train": 3000, "validation": len(ids) - 3000}
    scored = sum(
        int((batch.weights > 0).sum()) for batch in data.evaluation_batches(data.make_tokenizer(), "validation")
    )
    assert len(ids) - 3000 <= scored <= len(ids) - 2998  # ids[3000] may be within a document, which ends with the file


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("it is unpickled",))


def test_the_end_of_a_stream_is_held_out(tmp_path):
    ids = stream_of(Bytes().train(()), "after")
    (tmp_path / "some.bin").write_bytes(np.array(ids, "<u2").tobytes())
    config = config_of(tmp_path, tmp_path / "some.bin", tokenizer=Bytes(), validation_fraction=0.1, test_fraction=0.1)
    data = data_of(config)
    held_out = len(ids) // 10
    assert describe_data(data)[0]["splits"] == {
        "train": len(ids) - 2 * held_out,
        "validation": held_out,
        "test": held_out,
    }
    tokenizer = data.make_tokenizer()
    text = "".join(tokenizer.decode(ids[-held_out:]))
    assert "".join(data.evaluation_batches(tokenizer, "test").texts()) == text


def test_a_long_document_is_read_in_pieces_that_lose_no_token(tmp_path):
    draw = np.random.RandomState(0)
    ids = draw.randint(0, 256, 5000)
    (tmp_path / "one.bin").write_bytes(ids.astype("<u2").tobytes())
    source = open_source(
        str(tmp_path / "one.bin"), config_of(tmp_path, "x", record_bytes=128, validation_fraction=0.0).data
    )
    pieces = list(source.encoded("train", Bytes().train(())))
    assert len(pieces) == -(-5000 // 64)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[0].tokens[0] == 256
    np.testing.assert_array_equal(np.concatenate([piece.tokens[1:] for piece in pieces]), [*ids, 256])
    for piece, before in zip(pieces[1:], pieces, strict=False):
        assert piece.tokens[0] == before.tokens[-1]


DAMAGED = {
    "odd": (b"\1\0\2", r"must be whole, .* has 3 bytes and should have 2"),
    "empty": (b"", "must have some, .* has none"),
    "magic": (with_header([1, 2], magic=20230101), r"must begin with 20240520 .* has 20230101 and version 1"),
    "version": (with_header([1, 2], version=2), r"must begin with 20240520 .* has 20240520 and version 2"),
    "questions": (with_header([1, 2], magic=20240522), "must be of running text"),
    "short": (with_header([1, 2, 3], count=4), r"must be whole, .* has 1,030 bytes and should have 1,032, for 4 ids"),
    "long": (with_header([1, 2, 3], count=2), r"must be whole, .* has 1,030 bytes and should have 1,028"),
    "negative": (with_header([1, 2], count=-1), "must be whole"),
    "none": (with_header([], count=0), "must have some"),
    "cut": (with_header([1, 2])[:600], "header of 256 numbers must be whole"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    content, message = DAMAGED[damage]
    (tmp_path / "ids.bin").write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        data_of(config_of(tmp_path, tmp_path / "ids.bin"))
    assert "ids.bin" in str(refusal.value)


def test_an_id_that_the_tokenizer_lacks_is_named_with_its_location(tmp_path):
    ids = np.arange(250).repeat(3)
    (tmp_path / "a_0.bin").write_bytes(with_header(ids))
    ids[700] = 300
    (tmp_path / "a_1.bin").write_bytes(with_header(ids))
    data = data_of(config_of(tmp_path, tmp_path / "a_*.bin", tokenizer=Bytes()))
    for _ in range(2):  # found, and noted
        with pytest.raises(UserError, match=r"a_1\.bin, position 700 has the id 300 and the tokenizer 257 ids"):
            data.train_batches(data.make_tokenizer())


def test_files_of_other_sizes_of_ids_are_no_stream(tmp_path):
    (tmp_path / "a_0.bin").write_bytes(with_header([1, 2, 3]))
    (tmp_path / "a_1.bin").write_bytes(with_header([1, 2, 3], *LLAMA))
    with pytest.raises(UserError, match=r"ids of one size, .*a_0\.bin has 2 bytes each and .*a_1\.bin 4"):
        data_of(config_of(tmp_path, tmp_path / "a_*.bin"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("ids.bin.gz", "must not be compressed"), ("no*.bin", "matches none"), ("folder", "none named train")],
)
def test_a_name_that_cannot_be_read_is_refused(tmp_path, name, message):
    (tmp_path / "ids.bin.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "val.bin").write_bytes(b"\1\0")
    with pytest.raises(UserError, match=message):
        data_of(config_of(tmp_path, tmp_path / name))


@pytest.mark.parametrize("kind", ["bpe", "characters", "words"])
def test_a_vocabulary_of_ids_is_refused(tmp_path, kind):
    (tmp_path / "ids.bin").write_bytes(with_header(range(200)))
    with pytest.raises(UserError, match=r"trained on text, ids\.bin has ids\. Give the tokenizer"):
        data_of(config_of(tmp_path, tmp_path / "ids.bin", tokenizer=TOKENIZERS.find(kind)())).make_tokenizer()


def test_ids_of_documents_only_are_no_text(tmp_path):
    (tmp_path / "ids.bin").write_bytes(with_header([256] * 9))
    with pytest.raises(UserError, match="ids between documents only"):
        batches(config_of(tmp_path, tmp_path / "ids.bin", tokenizer=Bytes()))


def test_ids_alone_are_numbers(tmp_path):
    kind = IdNumbers()
    tokenizer = kind.train(())
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.decode([1, 50256, 20, -3, 60000]) == "1 20"
    assert tokenizer.encode("1 20 x -3 60000").tolist() == [1, 20]
    for wrong in ({"vocab_size": 10}, {"end_of_text": 50257}, {"begin": 50257}, {"vocab_size": 0, "end_of_text": 0}):
        with pytest.raises(UserError, match="IdNumbers"):
            dataclasses.replace(kind, **wrong)


def test_files_are_hashed_once_and_mapped(tmp_path, monkeypatch):
    ids = stream_of(Bytes().train(()), "after")
    (tmp_path / "ids.bin").write_bytes(with_header(ids))
    config, now = config_of(tmp_path, tmp_path / "ids.bin", tokenizer=Bytes()), time.time()
    monkeypatch.setattr("transformer.data.seen.time.time", lambda: now + 10)
    expected = batches(config)
    monkeypatch.setattr(TokenStream, "blocks", lambda self: pytest.fail("it is read whole"))
    assert_equal(batches(config), expected)
    (tmp_path / "ids.bin").write_bytes(with_header(ids[::-1]))
    monkeypatch.undo()
    assert describe_data(data_of(config))[0]["fingerprint"] != open_source(str(tmp_path / "ids.bin"), DataConfig()).name


def test_other_content_has_another_fingerprint(tmp_path):
    (tmp_path / "a.bin").write_bytes(with_header([1, 2, 3]))
    (tmp_path / "b.bin").write_bytes(with_header([1, 2, 4]))
    (tmp_path / "c.bin").write_bytes(np.array([1, 2, 3], "<u2").tobytes())
    data = config_of(tmp_path, "x").data
    found = [
        find_source(str(tmp_path / f"{name}.bin")).fingerprint(str(tmp_path / f"{name}.bin"), data) for name in "abc"
    ]
    assert found[0] == found[2] != found[1]
    assert open_source(str(tmp_path / "a.bin"), data).fingerprint == found[0]


def test_two_billion_ids_are_not_read_to_be_opened(tmp_path):
    """A sparse file of 4 GB, in a process with 1.5 GB of memory for data."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.write(with_header([], count=2**31 - 1))
        file.truncate(1024 + 2 * (2**31 - 1))
    found = read_header(epath.Path(path))
    assert found.num_ids == 2**31 - 1
    started = time.perf_counter()
    assert TokenStream([found.path]).read(2**31 - 4, 2**31 - 1).tolist() == [0, 0, 0]
    assert time.perf_counter() - started < 3


def test_prepared_in_tasks_ids_are_the_same_source(tmp_path):
    """They need no preparation: no task runs."""
    (tmp_path / "train.bin").write_bytes(with_header(stream_of(Bytes().train(()), "before")))
    config = config_of(tmp_path, tmp_path / "train.bin", tokenizer=Bytes()).data
    (source,) = open_sources(config, lambda tasks: pytest.fail("a task ran"))
    assert source.fingerprint == open_source(config.source[0], config).fingerprint


def test_without_a_tokenizer_ids_are_not_taken_for_bytes(tmp_path):
    (np.arange(4000) % 65).astype("<u2").tofile(tmp_path / "train.bin")
    config = DataConfig(source=(str(tmp_path / "train.bin"),), data_dir=str(tmp_path / "data"), tokenizer=Auto())
    with pytest.raises(UserError, match=r"Give the tokenizer that made them"):
        data_of(Config(data=config)).make_tokenizer()


@pytest.mark.parametrize("highest", [300, 50_257, 128_256])
def test_wide_ids_without_a_header_are_not_read_as_narrow_ones(tmp_path, highest):
    ids = np.random.default_rng(0).integers(0, highest, 4000)
    ids.astype("<u4").tofile(tmp_path / "wide.bin")
    ids.clip(0, 65_535).astype("<u2").tofile(tmp_path / "narrow.bin")
    with pytest.raises(UserError, match=r"wide\.bin begins with 32-bit ids"):
        read_header(epath.Path(tmp_path / "wide.bin"))
    assert read_header(epath.Path(tmp_path / "narrow.bin")).num_ids == 4000
    np.full(4000, 2, "<u2").tofile(tmp_path / "small.bin")
    assert read_header(epath.Path(tmp_path / "small.bin")).num_ids == 4000
