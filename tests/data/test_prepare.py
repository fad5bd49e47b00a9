"""Sources: prepared once and whole, read at random, by path or by TFDS name."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import tensorflow_datasets as tfds
from etils import epath

from transformer.cli.main import main
from transformer.data import prepare, seen, source_kind
from transformer.data.registry import find_source, open_source, open_sources
from transformer.data.shards import Shards
from transformer.data.source import split_text, whole_documents
from transformer.data.source_kind import SourceKind
from transformer.data.stored import open_stored
from transformer.types import UserError


def _attempts(tmp_path):
    return sorted(tmp_path.glob("prepared/text_records/*/prepared.json"))


def _write_tfds(data_dir, name, examples, file_format="array_record"):
    """A dataset of the user's own, as TFDS leaves it on disk."""
    features = tfds.features.FeaturesDict({key: tfds.features.Text() for key in examples[0]})

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = "1.0.0"
        url_infos = {}  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    Builder.name = name
    Builder(data_dir=data_dir, file_format=file_format).download_and_prepare(download_dir=data_dir / "downloads")


# ---- Local text ------------------------------------------------------------------------------------------------------


def test_long_documents_are_stored_in_pieces_and_joined_again(tmp_path, make_config, write_jsonl):
    texts = ["short\n", "0123456789\n" * 30, "é" * 200, "last"]
    path = write_jsonl([{"text": text, "prompt": f"prompt {i}"} for i, text in enumerate(texts)])
    source = open_source(str(path), make_config(path, record_bytes=64, validation_fraction=0.0))
    records = source.records("train")
    assert [(r.continues, r.last, bool(r.prompt)) for r in records][:2] == [(False, True, True), (False, False, True)]
    assert all(len(record.text.encode()) <= 64 for record in records)
    assert len(records) > len(texts)
    assert sum(record.last for record in records) == sum(not record.continues for record in records) == len(texts)
    assert list(whole_documents(source, "train")) == [(f"prompt {i}", text) for i, text in enumerate(texts)]
    assert list(split_text(source, "train")) == [f"prompt {i}{text}" for i, text in enumerate(texts)]


def test_splits_hold_every_document_once(make_config, write_folder):
    folder = write_folder(files=20)
    config = make_config(folder, validation_fraction=0.2, test_fraction=0.1)
    source = open_source(str(folder), config)
    assert source.split_names == ("train", "validation", "test")
    parts = {split: list(split_text(source, split)) for split in source.split_names}
    assert {split: len(texts) for split, texts in parts.items()} == {"train": 13, "validation": 4, "test": 3}
    everything = sorted(document.text for document in find_source(str(folder)).corpus(str(folder), config).documents())
    assert sorted(text for texts in parts.values() for text in texts) == everything
    size = sum(len(text.encode()) for text in parts["train"])
    assert source.description.startswith(f"folder: train 13 documents, {size:,} bytes, validation 4 documents")


def test_text_is_prepared_once_and_anew_when_it_changes(tmp_path, make_config, write_folder):
    folder = write_folder()
    config = make_config(folder)
    first = open_source(str(folder), config)
    again = open_source(str(folder), config)
    assert (again.name, again.fingerprint, again.description) == (first.name, first.fingerprint, first.description)
    assert len(_attempts(tmp_path)) == 1
    file = folder / "sub1" / "01.txt"
    stat = file.stat()
    file.write_text(file.read_text().replace("folder", "FOLDER"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither size nor date tell
    changed = open_source(str(folder), config)
    assert changed.fingerprint != first.fingerprint
    assert any("FOLDER" in text for text in split_text(changed, "train"))
    assert not any("FOLDER" in text for text in split_text(first, "train"))
    for changes in ({"validation_fraction": 0.3}, {"test_fraction": 0.1}, {"record_bytes": 64}):
        open_source(str(folder), make_config(folder, **changes))
    assert len(_attempts(tmp_path)) == 5


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "_SHARD_BYTES", 100)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("finished", [0, 1, 3, 6])
def test_a_preparation_that_dies_is_gone_on_with(tmp_path, make_config, write_folder, monkeypatch, finished):
    folder = write_folder()
    config = make_config(folder, record_bytes=64)
    expected = list(
        open_source(str(folder), dataclasses.replace(config, data_dir=str(tmp_path / "other"))).records("all")
    )
    write, begun = prepare.write_shard, []

    def die(path, records):
        begun.append(path)
        if len(begun) > finished:
            path.with_name(f"{path.name}-0123.unfinished").write_bytes(b"what a kill left")
            raise KeyboardInterrupt  # no exception handler runs, and whatever was written stays
        write(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_shard", die)
        with pytest.raises(KeyboardInterrupt):
            open_source(str(folder), config)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("prepared/text_records/*/text/*-of-?????")}
    assert len(kept) == finished
    assert _attempts(tmp_path) == []
    source = open_source(str(folder), config)
    assert list(source.records("all")) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(source.records("train").shards.paths) > 6
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.usefixtures("small_shards")
def test_a_shard_of_another_text_is_written_anew(tmp_path, make_config, write_folder, monkeypatch):
    folder = write_folder()
    config = make_config(folder)
    expected = list(open_source(str(folder), config).records("all"))
    (pointer,) = _attempts(tmp_path)
    pointer.unlink()
    shards = sorted(pointer.parent.glob("text/*-of-?????"))
    shards[1].write_bytes(shards[0].read_bytes())
    shards[2].write_bytes(b"damaged")
    assert list(open_source(str(folder), config).records("all")) == expected


def test_a_preparation_that_is_overtaken_does_no_harm(tmp_path, make_config, write_folder, monkeypatch):
    folder = write_folder()
    config = make_config(folder)
    write, overtaking = prepare.write_shard, []

    def be_overtaken(path, records):
        if not overtaking:
            overtaking.append(None)
            overtaking[0] = open_source(str(folder), config)
        write(path, records)

    monkeypatch.setattr(prepare, "write_shard", be_overtaken)
    overtaken = open_source(str(folder), config)
    for source in (overtaken, overtaking[0], open_source(str(folder), config)):
        assert len(list(split_text(source, "train"))) == 10
    assert len(_attempts(tmp_path)) == 1


def test_a_preparation_that_fails_cleans_up(tmp_path, make_config, write_folder, monkeypatch):
    folder = write_folder()

    def fail(path, records):
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare, "write_shard", fail)
    with pytest.raises(UserError, match=r"below data\.data_dir, .* failed: .*No space left"):
        open_source(str(folder), make_config(folder))
    assert list(tmp_path.glob("prepared/text_records/*")) == []


def test_text_that_does_not_come_back_is_an_error_and_nothing_is_kept(tmp_path, make_config, write_folder, monkeypatch):
    folder = write_folder()
    read = Shards.__getitem__
    monkeypatch.setattr(Shards, "__getitem__", lambda self, index: read(self, index) + b"x" * (index == 3))
    with pytest.raises(UserError, match=r"must come back as it was given, record 3 of .*text_records-train"):
        open_source(str(folder), make_config(folder))
    assert list(tmp_path.glob("prepared/text_records/*")) == []


def test_text_that_changes_while_it_is_prepared_is_an_error_and_nothing_is_kept(
    tmp_path, make_config, write_folder, monkeypatch
):
    folder = write_folder()
    write = prepare.write_shard

    def change(path, records):
        write(path, records)
        for file in folder.rglob("11.txt"):
            file.write_text("another text")

    monkeypatch.setattr(prepare, "write_shard", change)
    monkeypatch.setattr(prepare, "_SHARD_BYTES", 100)
    with pytest.raises(UserError, match="must stay as it is while it is prepared, folder changed; start again"):
        open_source(str(folder), make_config(folder))
    assert list(tmp_path.glob("prepared/text_records/*")) == []
    monkeypatch.setattr(prepare, "write_shard", write)
    assert "another text" in set(split_text(open_source(str(folder), make_config(folder)), "all"))


def test_tfds_reads_prepared_text(tmp_path, make_config, write_jsonl):
    path = write_jsonl([{"text": f"text {i}\n" * 20, "prompt": f"é{i}"} for i in range(20)])
    source = open_source(str(path), make_config(path, record_bytes=64, validation_fraction=0.0))
    examples = open_stored(epath.Path(_attempts(tmp_path)[0].parent / "text")).as_data_source("train")
    found = [
        (example["text"].decode(), example["prompt"].decode(), bool(example["continues"]), bool(example["last"]))
        for example in examples
    ]
    assert found == [tuple(record) for record in source.records("train")]
    assert [example["name"].decode() for example in examples if example["last"]][::19] == [
        "records.jsonl:1",
        "records.jsonl:20",
    ]


# ---- What has been read before ---------------------------------------------------------------------------------------


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(seen, "_SETTLED_SECONDS", -60)


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("form", ["folder", "jsonl"])
def test_a_text_that_has_not_changed_is_not_read_again(make_config, write_folder, write_jsonl, monkeypatch, form):
    path = write_folder() if form == "folder" else write_jsonl([{"text": f"text {i}"} for i in range(40)])
    config = make_config(path)
    first = open_source(str(path), config)
    with monkeypatch.context() as patch:
        patch.setattr(source_kind, "make_corpus", None)
        again = open_source(str(path), config)
        assert (again.name, again.fingerprint, again.description) == (first.name, first.fingerprint, first.description)
        assert find_source(str(path)).fingerprint(str(path), config) == first.fingerprint
        assert list(again.records("all")) == list(first.records("all"))
    other = open_source(str(path), make_config(path, validation_fraction=0.3))  # prepared anew
    assert list(split_text(other, "all")) != [] and other.fingerprint != first.fingerprint


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("change", ["content", "size", "another", "separator", "replaced"])
def test_what_may_have_changed_is_hashed_again(make_config, write_folder, change):
    folder = write_folder()
    config = make_config(folder)
    first = open_source(str(folder), config)
    file = folder / "sub1" / "01.txt"
    stat, text = file.stat(), file.read_text()
    if change == "content":
        file.write_text(text.replace("folder", "FOLDER"))
    elif change == "size":
        file.write_text(text + "more")
    elif change == "another":
        (folder / "sub1" / "new.txt").write_text("new")
    elif change == "separator":
        config = dataclasses.replace(config, separator="0")
    else:
        other = folder / "sub1" / "02.txt"
        other.write_text(text.replace("folder", "FOLDER"))
        other.replace(file)
    if change != "separator":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_source(str(folder), config).fingerprint != first.fingerprint


def test_a_file_that_has_just_changed_is_hashed_again(tmp_path, make_config, write_folder):
    folder = write_folder()
    open_source(str(folder), make_config(folder))
    assert not list(tmp_path.glob("prepared/text_seen/*"))


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("is_path", [False, True])
def test_a_user_defined_source_is_read_each_time(tmp_path, make_config, monkeypatch, is_path):
    """Also where a file has its name by chance."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numbers").write_text("a file")
    texts = ["one", "two", "three"]
    module = "own" if is_path else "transformer.data.sources.numbers"
    kind = type("Numbers", (SourceKind,), {"is_path": is_path, "__module__": module})()
    kind.rows = lambda name, keys, what: ((f"number {i}", {"text": text}) for i, text in enumerate(texts))
    config = make_config("numbers", validation_fraction=0.0)
    first = kind.open_text("numbers", config)
    texts[1] = "another"
    assert kind.open_text("numbers", config).fingerprint != first.fingerprint


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": 1, "fingerprint": 2}'])
def test_a_damaged_note_is_no_note(tmp_path, make_config, write_folder, content):
    folder = write_folder()
    first = open_source(str(folder), make_config(folder))
    (note,) = tmp_path.glob("prepared/text_seen/*")
    note.write_text(content)
    assert open_source(str(folder), make_config(folder)).fingerprint == first.fingerprint


def test_a_new_process_needs_no_tensorflow_makes_no_noise_and_ends_quietly(tmp_path, write_folder):
    folder = write_folder(files=40)
    script = textwrap.dedent(
        f"""
        import sys
        from transformer.config import DataConfig
        from transformer.data.pipeline import evaluation_batches, train_batches
        from transformer.data.tokenizers.bytes import ByteTokenizer
        config = DataConfig(source=({str(folder)!r},), data_dir={str(tmp_path / "prepared")!r}, sequence_length=16)
        iterator = train_batches(config, ByteTokenizer())
        next(iterator)
        next(iter(evaluation_batches(config, ByteTokenizer(), "validation")))
        assert "tensorflow" not in sys.modules
        """
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_source_that_cannot_be_read_is_refused(make_config, write_folder):
    folder = write_folder()
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    with pytest.raises(
        UserError, match=r"exist, .*/dangling\.txt is a link to .*/nowhere, which does not: remove the link"
    ):
        open_source(str(folder), make_config(folder))
    for source in (folder / "dangling.txt", folder / "dangling.jsonl"):
        source.unlink(missing_ok=True)
        source.symlink_to(folder / "nowhere")
        with pytest.raises(UserError, match=r"is a link to .*/nowhere, which does not"):
            open_source(str(source), make_config(folder))


def test_the_data_directory_falls_back_to_tfds(tmp_path, make_config, write_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "from_environment"))
    folder = write_folder()
    open_sources(make_config(folder, data_dir=""))
    assert len(list(tmp_path.glob("from_environment/text_records/folder-*/prepared.json"))) == 1


def test_a_split_that_is_missing_is_named_with_those_there_are(make_config, write_folder):
    folder = write_folder()
    source = open_source(str(folder), make_config(folder))
    with pytest.raises(UserError, match="must be one of train, validation for folder, got 'test'"):
        source.records("test")


def test_a_corpus_without_text_for_each_split_is_refused(tmp_path, make_config):
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(
        UserError, match=r"text for each split, a\.txt has 1 byte in 1 document and none for validation"
    ):
        open_source(str(path), make_config(path))
    assert open_source(str(path), make_config(path, validation_fraction=0.0)).split_names == ("train",)


@pytest.mark.parametrize("form", ["folder", "jsonl", "file"])
def test_what_is_held_out_is_a_share_of_the_text(tmp_path, make_config, write_jsonl, form):
    """31 kB and 4 kB: neither the first file nor as many files as the share says."""
    texts = ["a line of 31\n" * 2400, "a line of 4\n" * 340]
    path = tmp_path / "texts"
    if form == "jsonl":
        path = write_jsonl([{"text": text} for text in texts])
    elif form == "file":
        path.write_text("".join(texts))
    else:
        path.mkdir()
        for name, text in zip("ab", texts, strict=True):
            (path / name).write_text(text)
    for shares in ((0.1, 0.0), (0.1, 0.1), (0.0, 0.02)):
        source = open_source(str(path), make_config(path, validation_fraction=shares[0], test_fraction=shares[1]))
        held_out = [sum(map(len, split_text(source, split))) for split in source.split_names]
        for split, asked_for in zip(("validation", "test"), shares, strict=True):
            assert (split in source.split_names) == (asked_for > 0)
            if asked_for:
                share = held_out[source.split_names.index(split)] / sum(held_out)
                assert asked_for / 1.5 < share < asked_for * 1.5
        assert sum(held_out) == sum(map(len, texts))


# ---- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./missing.txt", "/no/such/folder", "missing.txt", "~/missing", "two words"])
def test_a_missing_path_differs_from_a_name(source, make_config):
    with pytest.raises(UserError, match=f"there is no file or folder '{source}'"):
        open_source(source, make_config(source))


@pytest.mark.parametrize("source", ["tiny_shakespear", "folder/file", "no_such:1.0.0"])
def test_an_unknown_name_is_neither_a_path_nor_a_dataset(source, make_config):
    with pytest.raises(UserError, match=f"{source}' is neither a file or folder in .* nor a dataset that TFDS knows"):
        open_source(source, make_config(source))


@pytest.mark.parametrize("source", ["tiny_shakespeare", "tiny_shakespeare:1.0.0"])
def test_a_dataset_that_is_not_on_disk_comes_with_the_command_that_prepares_it(source, make_config, capfd):
    with pytest.raises(UserError, match="`tfds build tiny_shakespeare --file_format=array_record --data_dir="):
        open_source(source, make_config(source))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("blank", ["", "  "])
@pytest.mark.parametrize(
    "arguments",
    [
        ["{blank}"],
        ["{file}", "{blank}"],
        ["{blank}", "--kind", "labelled", "--name", "x"],
        ["{file}", "--kind", "labelled", "--name", "x", "--validation", "{blank}"],
        ["{file}", "--kind", "labelled", "--name", "x", "--test", "{blank}"],
        ["{blank}", "{file}", "--kind", "pairs", "--name", "x"],
    ],
)
def test_an_empty_path_does_not_mean_the_current_folder(tmp_path, monkeypatch, capsys, arguments, blank):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\na,x\nb,y\n")
    before = sorted(tmp_path.rglob("*"))
    filled = [argument.format(blank=blank, file="a.csv") for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", *filled, "--data-dir", "data"])
    assert "must not be empty" in capsys.readouterr().err
    assert [path for path in sorted(tmp_path.rglob("*")) if "data" not in path.relative_to(tmp_path).parts] == before


def test_a_blank_data_directory_is_refused(make_config, write_folder):
    with pytest.raises(UserError, match="must not be empty"):
        open_sources(make_config(write_folder(), data_dir=" "))


# ---- TFDS datasets ---------------------------------------------------------------------------------------------------


def test_a_dataset_on_disk_is_read_by_its_name(tmp_path, make_config):
    texts = [f"text {i}" for i in range(70)]
    _write_tfds(tmp_path / "prepared", "my_texts", [{"body": text, "question": "q"} for text in texts])
    config = make_config("my_texts", text_key="body", prompt_key="question", record_bytes=64)
    source = open_source("my_texts", config)
    assert source.split_names == ("train", "test")
    assert list(whole_documents(source, "train")) == [("q", text) for text in texts]
    assert source.description == "my_texts/1.0.0: train 70 records, test 70 records"
    with pytest.raises(UserError, match=r"one of train, test for my_texts/1\.0\.0, got 'validation'"):
        source.records("validation")


def test_datasets_of_one_name_and_size_differ_by_content(tmp_path, make_config):
    for where, text in (("a", "one"), ("b", "one"), ("c", "two")):
        _write_tfds(tmp_path / where, "texts", [{"text": "zero"}, {"text": text}])
    first, same, other = (
        open_source("texts", make_config("texts", data_dir=str(tmp_path / where))).fingerprint for where in "abc"
    )
    assert first == same != other


def test_few_long_records_are_cut_so_that_there_is_something_to_shuffle(tmp_path, make_config):
    text = "a line of text\n" * 100
    _write_tfds(tmp_path / "prepared", "one_text", [{"text": text}])
    source = open_source("one_text", make_config("one_text", record_bytes=64))
    assert len(source.records("train")) == 25
    assert list(split_text(source, "train")) == [text]


def test_a_feature_that_is_missing_is_named_with_those_there_are(tmp_path, make_config):
    _write_tfds(tmp_path / "prepared", "my_texts", [{"body": "text"}])
    with pytest.raises(UserError, match=r"data\.text_key must be a feature of 'my_texts', got 'text'; it has body"):
        open_source("my_texts", make_config("my_texts"))
