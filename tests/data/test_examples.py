"""Datasets made of files: read back exactly, by TFDS too; splits that do not overlap; names that are not clobbered."""

import dataclasses
import doctest
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from transformer.config import Config, DataConfig
from transformer.data import examples as prepared
from transformer.data import registry, stored
from transformer.data.examples import open_examples, prepare_examples
from transformer.data.forms import examples
from transformer.data.forms.examples import clean_label
from transformer.data.forms.labelled import LabelledText, LabelledTexts
from transformer.data.forms.pairs import Pairs, TextPair
from transformer.form import FORMS
from transformer.objectives.classification import Classification
from transformer.types import UserError

LABELLED, PAIRS = LabelledTexts(), Pairs()


@pytest.fixture
def config(tmp_path):
    return DataConfig(data_dir=str(tmp_path / "data"), validation_fraction=0.25)


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{('10', '9', 'x')[i % 3]}\n" for i in range(12)))
    return {"train": [str(path)], "test": [str(path)]}


def test_labelled_texts_come_back(config, labelled):
    described = prepare_examples(LABELLED, "mine", labelled, config)
    assert described == "mine/1.0.0: train 12 examples, test 12 examples; classes 9, 10, x"
    source = open_examples(["mine"], LABELLED, config)
    assert source.class_names == ("9", "10", "x")
    assert list(source.examples("test")) == [LabelledText(f"text {i}", (1, 0, 2)[i % 3]) for i in range(12)]


def test_tfds_reads_it_by_name(config, labelled):
    prepare_examples(LABELLED, "mine", labelled, config)
    data = tfds.data_source("mine", split="train", data_dir=config.data_dir)
    assert len(data) == 12
    assert data[1] == {"text": b"text 1", "label": 0}


def test_validation_is_taken_from_training(config, labelled):
    prepare_examples(LABELLED, "mine", labelled, config)
    source = open_examples(["mine"], LABELLED, config)
    assert source.split_names == ("train", "test", "validation")
    train, validation = (list(source.examples(split)) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (9, 3)
    assert sorted(example.text for example in train + validation) == sorted(f"text {i}" for i in range(12))
    assert list(open_examples(["mine"], LABELLED, config).examples("validation")) == validation


def test_a_validation_split_of_its_own_is_left_alone(config, labelled):
    prepare_examples(LABELLED, "mine", labelled | {"validation": labelled["test"]}, config)
    source = open_examples(["mine"], LABELLED, config)
    assert [len(source.examples(split)) for split in ("train", "validation", "test")] == [12, 12, 12]


def test_pairs_come_back(config, tmp_path):
    (tmp_path / "a").write_text("one\ntwo\n")
    (tmp_path / "b").write_text("eins\nzwei\n")
    prepare_examples(PAIRS, "numbers", {"train": [str(tmp_path / "a"), str(tmp_path / "b")]}, config)
    source = open_examples(["numbers"], PAIRS, config)
    everything = [*source.examples("train"), *source.examples("validation")]
    assert sorted(everything) == [TextPair("one", "eins"), TextPair("two", "zwei")]


# ---- Labels and texts that are stored otherwise than they look -------------------------------------------------------

LABELS = [
    "neg\nclass",
    "pos\nclass",
    " a",
    "a",
    "a ",
    "b\r\nc",
    "d\re",
    "f\tg",
    "h\x85i",
    "j  k",
    "\xa0l",
    "m\x00n",
    "ö",
]
LABELS += ["\x1b[1mo", "[/bold]", "p\u2028q", "\x1cr", "0.0", "0", "-1", "#", '"', ","]


def _jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"train": [str(path)]}


def test_labels_come_back_trimmed_and_joined_and_it_is_said(config, tmp_path):
    files = _jsonl(tmp_path / "a.jsonl", [{"text": str(i), "label": label} for i, label in enumerate(LABELS)])
    described = prepare_examples(LABELLED, "mine", files, config)
    for data in (open_examples(["mine"], LABELLED, config), tfds.data_source("mine", data_dir=config.data_dir)):
        if isinstance(data, dict):
            names = tfds.builder("mine", data_dir=config.data_dir).info.features["label"].names
            found = {int(example["text"]): names[example["label"]] for example in data["train"]}
        else:
            names, found = data.class_names, {}
            for split in data.split_names:
                found |= {int(example.text): data.class_names[example.label] for example in data.examples(split)}
        assert len(set(names)) == len(names)
        assert found == {i: clean_label(label) for i, label in enumerate(LABELS)}
    assert "class 'a': ' a', 'a', 'a ' in the files" in described
    assert r"class 'neg class': 'neg\nclass' in the files" in described
    assert "j  k" not in described.split("\n", 1)[1]


@given(st.text())
def test_a_clean_label_is_one_line_of_a_file_of_names(label):
    clean = clean_label(label)
    assert clean_label(clean) == clean
    # As TFDS writes and reads them.
    assert [name.strip() for name in f"{clean}\n".replace("\r", "\n").split("\n") if name.strip()] == [clean][
        : len(clean)
    ]
    assert "".join(clean.split()) == "".join(label.split())


def test_docstring_examples():
    assert all(doctest.testmod(module).failed == 0 for module in (examples, registry))


TEXTS = ["\r", "a\r\nb", "\x00", "lone \ud800", "\ufeffa", "  a  ", "\u2028", "é", ""]


@pytest.mark.parametrize(("kind", "fields"), [("labelled", ("text", "label")), ("pairs", ("source", "target"))])
def test_texts_come_back_to_the_byte(config, tmp_path, kind, fields):
    seconds = TEXTS if kind == "pairs" else ["class"] * len(TEXTS)
    values = [(f"{text}{i}", f"{second}{i}") for i, (text, second) in enumerate(zip(TEXTS, seconds, strict=True))]
    records = [dict(zip(fields, value, strict=True)) for value in values]
    prepare_examples(FORMS.find(kind)(), "mine", _jsonl(tmp_path / "a.jsonl", records), config)
    source = open_examples(["mine"], FORMS.find(kind)(), DataConfig(data_dir=config.data_dir, validation_fraction=0.0))
    for record, example in zip(records, source.examples("train"), strict=True):
        first, second = example
        assert (first, source.class_names[second] if kind == "labelled" else second) == tuple(
            value.replace("\ud800", "?") for value in record.values()
        )


@pytest.mark.parametrize("kind", ["labelled", "pairs"])
def test_what_does_not_come_back_as_it_was_given_leaves_nothing(config, tmp_path, monkeypatch, kind):
    fields = {"labelled": ("text", "label"), "pairs": ("source", "target")}[kind]
    files = _jsonl(tmp_path / "a.jsonl", [dict(zip(fields, (f"{i}", f"l\n{i % 2}"), strict=True)) for i in range(4)])
    if kind == "labelled":
        monkeypatch.setattr(examples, "clean_label", str)
    else:
        read = stored.in_order
        monkeypatch.setattr(stored, "in_order", lambda data: list(read(data))[:-1])
    with pytest.raises(
        UserError, match=r"must come back as it was given, (the classes|example 4 of train) came back as"
    ):
        prepare_examples(FORMS.find(kind)(), "mine", files, config)
    assert list((tmp_path / "data").iterdir()) == []


def test_blank_pairs_are_left_out_and_counted(config, tmp_path):
    (tmp_path / "a").write_text("one\n\n \nfour\n")
    (tmp_path / "b").write_text("eins\nzwei\n\n\t\n")
    described = prepare_examples(PAIRS, "numbers", {"train": [str(tmp_path / "a"), str(tmp_path / "b")]}, config)
    assert described.splitlines() == [
        "numbers/1.0.0: train 1 example",
        "train: 3 pairs with an empty side are left out",
    ]


def test_a_share_for_testing_is_refused_instead_of_ignored(config):
    asked_for = dataclasses.replace(config, source=("mine",), test_fraction=0.1)
    with pytest.raises(UserError, match=r"data\.test_fraction is for running text, got 0\.1 for the class"):
        Config(data=asked_for, objective=Classification())


def test_fields_of_one_name_are_refused(config, labelled):
    with pytest.raises(
        UserError, match=r"names of their own, data\.text_key and data\.label_key are 'label' and 'label'"
    ):
        prepare_examples(LABELLED, "mine", labelled, DataConfig(data_dir=config.data_dir, text_key="label"))


def test_the_same_again_is_kept_and_another_is_refused(config, labelled, tmp_path):
    first = prepare_examples(LABELLED, "mine", labelled, config)
    assert prepare_examples(LABELLED, "mine", labelled, config) == first
    (tmp_path / "other.csv").write_text("text,label\na,1\nb,2\n")
    with pytest.raises(UserError, match="holds other examples; choose another name"):
        prepare_examples(LABELLED, "mine", {"train": [str(tmp_path / "other.csv")]}, config)
    assert len(open_examples(["mine"], LABELLED, config).examples("test")) == 12


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
        prepare_examples(LABELLED, name, files, config)
    assert not (tmp_path / "data" / name).exists()


def test_wrong_features_are_named(config, labelled):
    prepare_examples(LABELLED, "mine", labelled, config)
    with pytest.raises(
        UserError, match=r"data\.source_key must be a feature of 'mine', got 'source'; it has label, text"
    ):
        open_examples(["mine"], PAIRS, config)
    with pytest.raises(UserError, match="must name a ClassLabel of 'mine', 'text' is Text"):
        open_examples(["mine"], LABELLED, DataConfig(data_dir=config.data_dir, label_key="text"))
    with pytest.raises(UserError, match="got 'dev'"):
        open_examples(["mine"], LABELLED, config).examples("dev")


def test_a_share_is_held_out_at_random_and_not_by_order(config, tmp_path):
    """A file sorted by class would otherwise give a validation split of one class."""
    path = tmp_path / "sorted.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{int(i >= 500)}\n" for i in range(1000)))
    prepare_examples(LABELLED, "ordered", {"train": [str(path)]}, config)
    labels = [example.label for example in open_examples(["ordered"], LABELLED, config).examples("validation")]
    assert len(labels) == 250
    assert 0.4 < np.mean(labels) < 0.6


def test_every_class_is_held_out(config, tmp_path):
    """Of 1,000 texts with 10 positives, 20 drawn at random have none eight times in ten."""
    path = tmp_path / "rare.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{int(i % 100 == 7)}\n" for i in range(1000)))
    prepare_examples(LABELLED, "rare", {"train": [str(path)]}, config)
    source = open_examples(["rare"], LABELLED, DataConfig(data_dir=config.data_dir, validation_fraction=0.02))
    held_out = [example.label for example in source.examples("validation")]
    assert (len(held_out), sum(held_out)) == (20, 1)
    assert sum(example.label for example in source.examples("train")) == 9


def test_files_that_change_while_they_are_prepared_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    files = _jsonl(path, [{"text": f"text {i}", "label": f"{i % 2}"} for i in range(9)])
    read = prepared._read_draft

    def change(*arguments):
        found = read(*arguments)
        path.write_text(path.read_text().replace("text 3", "text 4"))
        return found

    monkeypatch.setattr(prepared, "_read_draft", change)
    with pytest.raises(UserError, match="must stay as they are while they are prepared, the files of mine changed"):
        prepare_examples(FORMS.find("labelled")(), "mine", files, DataConfig(data_dir=str(tmp_path / "data")))
    assert not list((tmp_path / "data").glob("*"))
