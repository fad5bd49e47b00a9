"""Datasets made of files: read back exactly, by TFDS too; splits that do not overlap; names that are not clobbered."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from transformer.config import DataConfig
from transformer.data.examples import TextExample, open_examples, prepare_examples
from transformer.types import UserError


@pytest.fixture
def config(tmp_path):
    return DataConfig(data_dir=str(tmp_path / "data"), validation_fraction=0.25)


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{('10', '9', 'x')[i % 3]}\n" for i in range(12)))
    return {"train": [str(path)], "test": [str(path)]}


def test_labelled_texts_come_back(config, labelled):
    described = prepare_examples("labelled", "mine", labelled, config)
    assert described == "mine/1.0.0: train 12 examples, test 12 examples; classes 9, 10, x"
    source = open_examples("mine", "labelled", config)
    assert source.class_names == ("9", "10", "x")
    assert list(source.examples("test")) == [TextExample(f"text {i}", label=(1, 0, 2)[i % 3]) for i in range(12)]


def test_tfds_reads_it_by_name(config, labelled):
    prepare_examples("labelled", "mine", labelled, config)
    data = tfds.data_source("mine", split="train", data_dir=config.data_dir)
    assert len(data) == 12
    assert data[1] == {"text": b"text 1", "label": 0}


def test_validation_is_taken_from_training(config, labelled):
    prepare_examples("labelled", "mine", labelled, config)
    source = open_examples("mine", "labelled", config)
    assert source.split_names == ("train", "test", "validation")
    train, validation = (list(source.examples(split)) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (9, 3)
    assert sorted(example.text for example in train + validation) == sorted(f"text {i}" for i in range(12))
    assert list(open_examples("mine", "labelled", config).examples("validation")) == validation


def test_a_validation_split_of_its_own_is_left_alone(config, labelled):
    prepare_examples("labelled", "mine", labelled | {"validation": labelled["test"]}, config)
    source = open_examples("mine", "labelled", config)
    assert [len(source.examples(split)) for split in ("train", "validation", "test")] == [12, 12, 12]


def test_pairs_come_back(config, tmp_path):
    (tmp_path / "a").write_text("one\ntwo\n")
    (tmp_path / "b").write_text("eins\nzwei\n")
    prepare_examples("pairs", "numbers", {"train": [str(tmp_path / "a"), str(tmp_path / "b")]}, config)
    source = open_examples("numbers", "pairs", config)
    everything = [*source.examples("train"), *source.examples("validation")]
    assert sorted(everything) == [TextExample("one", target="eins"), TextExample("two", target="zwei")]


def test_the_same_again_is_kept_and_another_is_refused(config, labelled, tmp_path):
    first = prepare_examples("labelled", "mine", labelled, config)
    assert prepare_examples("labelled", "mine", labelled, config) == first
    (tmp_path / "other.csv").write_text("text,label\na,1\nb,2\n")
    with pytest.raises(UserError, match="holds other examples; choose another name"):
        prepare_examples("labelled", "mine", {"train": [str(tmp_path / "other.csv")]}, config)
    assert len(open_examples("mine", "labelled", config).examples("test")) == 12


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("My-Data", {"train": ["one.csv"]}, "lower-case letters, digits and underscores, got 'My-Data'"),
        ("mine", {}, "must have a training split"),
        ("mine", {"train": ["empty.csv"]}, "train from .* has none"),
        ("mine", {"train": ["one.csv"]}, "at least two classes, the training split has 1"),
        ("mine", {"train": ["two.csv"], "test": ["third.csv"]}, "test has 3 too"),
    ],
)
def test_what_is_no_dataset_is_refused(config, tmp_path, monkeypatch, name, files, message):
    monkeypatch.chdir(tmp_path)
    for file, rows in {"empty": [], "one": ["a,1"], "two": ["a,1", "b,2"], "third": ["c,3"]}.items():
        (tmp_path / f"{file}.csv").write_text("\n".join(["text,label", *rows]))
    with pytest.raises(UserError, match=message):
        prepare_examples("labelled", name, files, config)
    assert not (tmp_path / "data" / name).exists()


def test_wrong_features_are_named(config, labelled):
    prepare_examples("labelled", "mine", labelled, config)
    with pytest.raises(
        UserError, match=r"data\.source_key must be a feature of 'mine', got 'source'; it has label, text"
    ):
        open_examples("mine", "pairs", config)
    with pytest.raises(UserError, match="must name a ClassLabel of 'mine', 'text' is Text"):
        open_examples("mine", "labelled", DataConfig(data_dir=config.data_dir, label_key="text"))
    with pytest.raises(UserError, match="got 'dev'"):
        open_examples("mine", "labelled", config).examples("dev")


def test_a_share_is_held_out_at_random_and_not_by_order(config, tmp_path):
    """A file sorted by class would otherwise give a validation split of one class."""
    path = tmp_path / "sorted.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{int(i >= 500)}\n" for i in range(1000)))
    prepare_examples("labelled", "ordered", {"train": [str(path)]}, config)
    labels = [example.label for example in open_examples("ordered", "labelled", config).examples("validation")]
    assert len(labels) == 250
    assert 0.4 < np.mean(labels) < 0.6
