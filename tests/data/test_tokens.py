"""Text is tokenized once: stored tokens equal encoded text, are complete or absent, and are found again after a kill."""

import dataclasses
import itertools

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.cli.main import main
from transformer.config import Config
from transformer.data import token_shards, tokens
from transformer.data.datasets import open_data
from transformer.data.encoded import Encoded, encode_records, learnt_runs, pack, token_features, token_type, unpack
from transformer.data.pipeline import evaluation_batches, train_batches
from transformer.data.registry import open_source
from transformer.data.source import Record, split_text
from transformer.data.stored import open_stored
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokenizers.characters import CharacterTokenizer
from transformer.data.tokens import document_tokens, open_tokens
from transformer.types import UserError

BYTES = ByteTokenizer()


def _lists(sequence):
    return [(part.tokens.tolist(), part.weights.tolist(), part.last) for part in sequence]


def _shards(tmp_path):
    return sorted(tmp_path.glob("prepared/text_records/*/tokens/*/*.array_record-*"))


@pytest.fixture
def open_records(tmp_path, make_config, write_jsonl):
    """A corpus of documents with and without prompts, long ones in pieces."""
    rows = [{"text": f"text {i}\n" * (1 + i % 9), "prompt": f"p{i}" if i % 3 else ""} for i in range(60)]
    path = write_jsonl(rows)

    def open_again(**changes):
        config = make_config(path, record_bytes=64, **changes)
        return open_source(str(path), config), config

    return open_again


def test_sizes_that_another_process_removes_are_counted_again(tmp_path, monkeypatch):
    """Two processes store the same tokens, and one removes the sizes of shards when the other is about to read them."""
    (tmp_path / "rows.jsonl").write_text('{"text": "some text"}\n' * 500)
    command, shards = (
        ["prepare", str(tmp_path / "rows.jsonl"), "--tokenizer", "bytes", "--data-dir"],
        token_shards.Shards,
    )
    removed = []

    def remove(paths, lengths):
        for path in map(epath.Path, paths):
            if path.name.startswith(f"{token_shards.SIZES}-"):
                path.unlink()
                removed.append(path)
        return shards(paths, lengths)

    main([*command, str(tmp_path / "alone")])
    monkeypatch.setattr(token_shards, "Shards", remove)
    main([*command, str(tmp_path / "beside")])
    alone, beside = (sorted(tmp_path.glob(f"{name}/text_records/*/tokens/*/*")) for name in ("alone", "beside"))
    assert [path.name for path in alone] == [path.name for path in beside]
    sizes = [path.read_bytes() for path in alone + beside if path.name == token_shards.SIZES]
    assert len(removed) == 2 and len(sizes) == 4 and sizes[:2] == sizes[2:]


# ---- A record --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    count=st.sampled_from([0, 1, 2, 40, 63, 64, 127, 128, 250, 8000, 16_500, 70_000]),
    runs=st.lists(st.integers(0, 300), max_size=70),
    last=st.booleans(),
    vocab_size=st.sampled_from([256, 257, 65_536, 65_537]),
)
def test_a_record_comes_back(count, runs, last, vocab_size):
    dtype = token_type(vocab_size)
    ids = np.random.default_rng(count).integers(0, vocab_size, count).astype(np.int32)
    found = unpack(pack(Encoded(ids, np.array(runs, np.uint32), last), dtype), dtype)
    assert (found.tokens.tolist(), found.learnt.tolist(), found.last) == (ids.tolist(), runs, last)
    assert found.tokens.dtype == dtype


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (2**24, "uint32")],
)
def test_the_type_is_the_smallest_that_holds_the_vocabulary(vocab_size, expected):
    assert token_type(vocab_size) == expected
    assert np.dtype(token_features(vocab_size)["tokens"].np_dtype) == expected


@given(learnt=st.lists(st.booleans(), max_size=30))
def test_runs_give_the_weights_that_they_were_made_of(learnt):
    encoded = Encoded(np.zeros(len(learnt) + 1, np.int32), learnt_runs(np.array(learnt, bool)), True)
    assert encoded.weights.tolist() == [float(one) for one in learnt]


# ---- A corpus --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "bpe"])
def test_what_is_stored_is_what_would_be_encoded(tmp_path, open_records, tokenizer):
    source, _ = open_records()
    texts = list(split_text(source, "all"))
    made = {
        "bytes": lambda: BYTES,
        "characters": lambda: CharacterTokenizer("".join(sorted(set("".join(texts))))),
        "bpe": lambda: BytePairs(size=300).train(texts),
    }[tokenizer]()
    anew = dataclasses.replace(source, tokens_in=None)
    for split in ("train", "validation"):
        assert _lists(open_tokens(source, split, made)) == _lists(open_tokens(anew, split, made))
        assert _lists(document_tokens(source, split, made)) == _lists(document_tokens(anew, split, made))
    assert _lists(document_tokens(source, "all", made)) == _lists(document_tokens(anew, "all", made))
    assert len(_shards(tmp_path)) == 4


def test_tfds_reads_what_is_stored(tmp_path, open_records):
    source, _ = open_records()
    stored = open_tokens(source, "train", BYTES)
    directory = next(tmp_path.glob("prepared/text_records/*/tokens/*-train"))
    examples = open_stored(epath.Path(directory)).as_data_source("train")
    assert len(examples) == len(stored) > 50
    for example, encoded in zip(examples, stored, strict=True):
        assert example["tokens"].tolist() == encoded.tokens.tolist()
        assert example["learnt"].tolist() == encoded.learnt.tolist()
        assert example["last"] == encoded.last
        assert example["tokens"].dtype == np.uint16


def test_text_is_encoded_by_the_first_that_reads_it_and_by_nobody_after(open_records, monkeypatch):
    source, config = open_records()

    def read():
        batches = itertools.islice(train_batches(config, BYTES, sources=[source]), 20)
        scored = evaluation_batches(config, BYTES, "validation", sources=[source])
        return [[field.tolist() for field in batch] for batch in (*batches, *scored)]

    first = read()
    encoded = []
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text))
    assert read() == first
    assert encoded == []
    list(evaluation_batches(dataclasses.replace(config, limit=9), BYTES, "train", sources=[source]))
    assert 0 < len(encoded) < 4, "a limit needs no more than the first documents"


def test_another_tokenizer_and_another_text_have_tokens_of_their_own(tmp_path, open_records):
    source, _ = open_records()
    letters = "".join(sorted(set("".join(split_text(source, "all")))))
    for number, tokenizer in enumerate((BYTES, CharacterTokenizer(letters), CharacterTokenizer(letters + "é")), 1):
        open_tokens(source, "train", tokenizer)
        open_tokens(source, "train", tokenizer)
        assert len(_shards(tmp_path)) == number
    open_tokens(open_records(validation_fraction=0.3)[0], "train", BYTES)
    assert len(_shards(tmp_path)) == 4


def test_a_user_defined_tokenizer_runs_each_time(tmp_path, open_records):
    class Own(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.upper())

    source, _ = open_records()
    plain, own = (_lists(open_tokens(source, "train", tokenizer)) for tokenizer in (BYTES, Own()))
    assert own == _lists(open_tokens(dataclasses.replace(source, tokens_in=None), "train", Own())) != plain
    assert len(_shards(tmp_path)) == 1


@pytest.mark.parametrize("longest", [7, 64])
def test_a_long_document_is_stored_in_parts_and_read_whole(open_records, monkeypatch, longest):
    source, _ = open_records()
    monkeypatch.setattr(token_shards, "LONGEST", longest)
    anew = dataclasses.replace(source, tokens_in=None)
    assert _lists(document_tokens(source, "all", BYTES)) == _lists(document_tokens(anew, "all", BYTES))


# ---- Shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(tokens, "_SHARD_BYTES", 1500)
    monkeypatch.setattr(tokens, "_processors", lambda: 1)
    monkeypatch.setattr(tokens.random, "randrange", lambda stop: 2)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("finished", range(6))
def test_a_second_start_goes_on_from_the_shards_that_are_finished(tmp_path, open_records, monkeypatch, finished, whole):
    def read(source):
        return _lists(document_tokens(source, "train", BYTES) if whole else open_tokens(source, "train", BYTES))

    source, _ = open_records()
    expected = read(dataclasses.replace(source, tokens_in=None))
    write, begun = token_shards.write_shard, []

    def die(path, records):
        if path.name.startswith("sizes"):
            return write(path, records)
        begun.append(path.name)
        if len(begun) > finished:
            path.with_name(f"{path.name}-0123.unfinished").write_bytes(b"what a kill left")
            next(iter(records), None)
            raise KeyboardInterrupt
        return write(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "write_shard", die)
        with pytest.raises(KeyboardInterrupt):
            read(source)
    kept = {path: path.stat().st_mtime_ns for path in _shards(tmp_path) if path.suffix != ".unfinished"}
    assert len(kept) == finished
    assert not list(tmp_path.glob("prepared/text_records/*/tokens/*/dataset_info.json"))
    assert read(source) == expected
    assert len(_shards(tmp_path)) > 6
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.usefixtures("small_shards")
def test_several_processes_write_the_same_shards(tmp_path, open_records, monkeypatch):
    source, _ = open_records()
    bpe = BytePairs(size=300).train(split_text(source, "train"))
    alone = {path.name: path.read_bytes() for path in _stored_files(source, bpe, tmp_path)}
    for path in _shards(tmp_path):
        path.unlink()
    for path in tmp_path.glob("prepared/text_records/*/tokens/*/dataset_info.json"):
        path.unlink()
    monkeypatch.setattr(tokens, "_processors", lambda: 2)
    monkeypatch.setattr(tokens, "write_tokens", None)
    assert {path.name: path.read_bytes() for path in _stored_files(source, bpe, tmp_path)} == alone
    assert len(alone) > 6


def _stored_files(source, tokenizer, tmp_path):
    open_tokens(source, "train", tokenizer)
    return _shards(tmp_path)


@pytest.mark.usefixtures("small_shards")
def test_what_a_process_cannot_do_is_said_by_the_one_that_started_it(open_records, monkeypatch):
    def wrong(job):
        return dataclasses.replace(job, lengths=[job.lengths[0] + 1])

    source, _ = open_records()
    monkeypatch.setattr(tokens, "_processors", lambda: 2)
    save = tokens.save_job
    monkeypatch.setattr(tokens, "save_job", lambda folder, job, tokenizer: save(folder, wrong(job), tokenizer))
    with pytest.raises(UserError, match="A stored dataset must be whole"):
        open_tokens(source, "train", BYTES)


def test_a_shard_that_does_not_come_back_is_an_error_and_nothing_is_kept(tmp_path, open_records, monkeypatch):
    source, _ = open_records()
    from_disk = token_shards.Shards.__getitem__
    monkeypatch.setattr(
        "transformer.data.shards.Shards.__getitem__",
        lambda self, index: from_disk(self, index) + b"x" * ("tokens" in self.paths[0] and index == 3),
    )
    with pytest.raises(UserError, match=r"must come back as it was given, record 3 of .*tokens-train"):
        open_tokens(source, "train", BYTES)
    assert _shards(tmp_path) == []


def test_a_damaged_shard_is_refused(tmp_path, open_records):
    source, _ = open_records()
    open_tokens(source, "train", BYTES)
    (path,) = _shards(tmp_path)
    content = bytearray(path.read_bytes())
    place = content.index(pack(open_tokens(source, "train", BYTES)[30], np.dtype("uint16"))) + 40
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="A stored dataset must be whole"):
        _lists(open_tokens(source, "train", BYTES))


def test_where_nothing_can_be_written_text_is_encoded_each_time(tmp_path, open_records, monkeypatch):
    source, _ = open_records()

    def refuse(path, records):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_shards, "write_shard", refuse)
    found = _lists(open_tokens(source, "train", BYTES))
    assert found == _lists(open_tokens(dataclasses.replace(source, tokens_in=None), "train", BYTES))


def test_a_full_disk_is_an_error(open_records, monkeypatch):
    source, _ = open_records()

    def fail(path, records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_shards, "write_shard", fail)
    with pytest.raises(UserError, match=r"below data\.data_dir, .* failed: .*No space left"):
        open_tokens(source, "train", BYTES)


def test_a_record_is_encoded_alike_alone_and_among_others():
    records = [Record("one", "", False, True), Record("", "", False, True), Record("two", "ask", False, False)]
    records += [Record("three", "", True, True), Record("four", "", False, True)]
    together = _lists(encode_records(BYTES, records))
    assert together == [_lists(encode_records(BYTES, [record]))[0] for record in records]


# ---- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("missing", ["none", "one that a kill prevented", "all, as of an earlier version"])
def test_counting_reads_no_tokens(tmp_path, open_records, monkeypatch, missing):
    source, config = open_records(sequence_length=8)
    expected = [
        encoded.num_targets for encoded in open_tokens(dataclasses.replace(source, tokens_in=None), "train", BYTES)
    ]
    if missing.startswith("one"):
        write = tokens.write_sizes

        def killed(job, dtype):
            job.sizes_path(1).unlink()
            write(job, dtype)

        monkeypatch.setattr(tokens, "write_sizes", killed)
    opened = open_tokens(source, "train", BYTES)
    assert [path.name for path in tmp_path.glob("prepared/text_records/*/tokens/*/*sizes*")] == ["sizes"]
    if missing.startswith("all"):
        next(tmp_path.glob("prepared/text_records/*/tokens/*/sizes")).unlink()
        assert open_tokens(source, "train", BYTES).sizes().tolist() == expected
        return
    read, of_record = [], tokens.unpack
    monkeypatch.setattr(tokens, "unpack", lambda *record: read.append(record) or of_record(*record))
    monkeypatch.setattr(token_shards, "unpack", tokens.unpack)
    assert opened.sizes().tolist() == expected
    data = open_data(config, Config().objective)
    assert data.batches_of_epoch(BYTES) == sum(expected) / (config.batch_size * config.sequence_length)
    assert len(read) < 6, "the checks of types read a record here and there"


def test_a_limited_evaluation_reads_what_is_stored_and_stores_nothing(tmp_path, open_records, monkeypatch):
    source, config = open_records()
    limited = evaluation_batches(dataclasses.replace(config, limit=200), BYTES, "validation", sources=[source])
    expected = [[field.tolist() for field in batch] for batch in limited]
    assert _shards(tmp_path) == []
    list(document_tokens(source, "validation", BYTES))
    encoded = []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: encoded.append(text))
    assert [[field.tolist() for field in batch] for batch in limited] == expected
    assert encoded == []
