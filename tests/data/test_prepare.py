"""Sources: prepared once and whole, read at random, by path or by TFDS name."""

import os
import subprocess
import sys
import textwrap

import pytest
import tensorflow_datasets as tfds

from transformer.cli.main import main
from transformer.data import prepare
from transformer.data.builder import Examples
from transformer.data.registry import find_source, open_source, open_sources
from transformer.data.source import split_text, whole_documents
from transformer.types import UserError


def _attempts(tmp_path):
    return sorted(tmp_path.glob("prepared/text_records/*/*/text_records"))


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


def test_a_preparation_that_dies_leaves_nothing_that_is_used(tmp_path, make_config, write_folder, monkeypatch):
    folder = write_folder()
    config = make_config(folder)
    with monkeypatch.context() as patch:
        # A kill: no exception handler runs, and whatever was written stays.
        patch.setattr(prepare.epath.Path("/").__class__, "rmtree", lambda self: None)
        generate = Examples._generate_examples

        def die(self, examples):
            for count, item in enumerate(generate(self, examples)):
                if count == 3:
                    raise KeyboardInterrupt
                yield item

        patch.setattr(Examples, "_generate_examples", die)
        with pytest.raises(KeyboardInterrupt):
            open_source(str(folder), config)
    assert len(_attempts(tmp_path)) == 1
    source = open_source(str(folder), config)
    assert len(source.records("train")) == 10
    assert len(_attempts(tmp_path)) == 2


def test_a_preparation_that_is_overtaken_does_no_harm(tmp_path, make_config, write_folder, monkeypatch):
    folder = write_folder()
    config = make_config(folder)
    generate, overtaking = Examples._generate_examples, []

    def be_overtaken(self, examples):
        if not overtaking:
            overtaking.append(None)
            overtaking[0] = open_source(str(folder), config)
        yield from generate(self, examples)

    monkeypatch.setattr(Examples, "_generate_examples", be_overtaken)
    overtaken = open_source(str(folder), config)
    assert len(_attempts(tmp_path)) == 2
    for source in (overtaken, overtaking[0], open_source(str(folder), config)):
        assert len(list(split_text(source, "train"))) == 10


def test_a_preparation_that_fails_cleans_up(tmp_path, make_config, write_folder, monkeypatch):
    folder = write_folder()

    def fail(self, examples):
        raise OSError("No space left on device")

    monkeypatch.setattr(Examples, "_generate_examples", fail)
    with pytest.raises(UserError, match=r"below data\.data_dir, .* failed: .*No space left"):
        open_source(str(folder), make_config(folder))
    assert list(tmp_path.glob("prepared/text_records/*/*")) == []


def test_text_that_does_not_come_back_is_an_error_and_nothing_is_kept(tmp_path, make_config, write_folder, monkeypatch):
    folder = write_folder()
    generate = Examples._generate_examples

    def alter(self, examples):
        for number, example in generate(self, examples):
            yield number, example | ({"text": example["text"].upper()} if number == 3 else {})

    monkeypatch.setattr(Examples, "_generate_examples", alter)
    with pytest.raises(UserError, match=r"must come back as it was given, example 4 of train came back as .*FOLDER"):
        open_source(str(folder), make_config(folder))
    assert list(tmp_path.glob("prepared/text_records/*/*")) == []


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


def test_the_data_directory_falls_back_to_that_of_tfds(tmp_path, make_config, write_folder, monkeypatch):
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
def test_a_missing_path_is_told_from_a_name(source, make_config):
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


def test_datasets_of_one_name_and_size_are_told_by_their_content(tmp_path, make_config):
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
