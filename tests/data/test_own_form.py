"""A user-defined form, from outside the package: two texts and the class of both, stored, trained on, shown and scored."""

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pytest

from transformer.cli.main import main
from transformer.config import DataConfig
from transformer.data.datasets import Reader
from transformer.data.forms.examples import ExampleForm, padded
from transformer.form import FORMS, Shown
from transformer.objective import OBJECTIVES
from transformer.objectives.classification import Classification
from transformer.types import LabelledBatch, UserError

CONFIG = """
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=1)),)),
        data=DataConfig(sequence_length=32, batch_size=4),
        objective=OBJECTIVES.find("follows")(),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=2, log_every=1, eval_every=0, checkpoint_every=0),
    )
"""


class Statements(NamedTuple):
    first: str
    second: str
    label: str | int


@pytest.fixture(scope="module", autouse=True)
def own_kinds():
    """They are known while this module runs."""

    @FORMS.register
    @dataclasses.dataclass(frozen=True)
    class StatementPairs(ExampleForm):
        """Two statements, and whether the second follows from the first."""

        kind = "statements"
        title = "pairs of statements"
        noun = "statement pair"
        prepares = ("name", "validation", "test", "source_key", "target_key", "label_key")

        settings = ("data.source_key", "data.target_key", "data.label_key", "data.buckets")
        keys = ("source_key", "target_key", "label_key")
        example = Statements
        class_part = 2

        def encode(self, example, tokenizer, config):
            end = [tokenizer.end_of_text]
            tokens = np.concatenate([end, tokenizer.encode(example.first), end, tokenizer.encode(example.second)])
            return tokens[: config.sequence_length].astype(np.int32), example.label

        def length(self, encoded):
            return len(encoded[0])

        def collate(self, encoded, rows, length):
            labels, weights = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
            labels[: len(encoded)], weights[: len(encoded)] = [label for _, label in encoded], 1
            return LabelledBatch(*padded([tokens for tokens, _ in encoded], rows, length), labels, weights)

        def show(self, batch, tokenizer, class_names):
            for tokens, label in zip(batch.inputs, batch.labels, strict=True):
                yield Shown(f"it {class_names[label]}", [[(tokenizer.decode(tokens), "green")]])

    @OBJECTIVES.register
    @dataclasses.dataclass(frozen=True)
    class Follows(Classification):
        """Whether a statement follows from another."""

        kind = "follows"
        reads = "statements"

    yield
    del FORMS._kinds["statements"], OBJECTIVES._kinds["follows"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    lines = [
        json.dumps({"source": f"it is {i}", "target": f"it is {j}", "label": "follows" if i == j else "does not"})
        for i, j in [*((i, i) for i in range(10)), *((i, i + 1) for i in range(10))]
    ]
    (tmp_path / "statements.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_one_file_brings_a_form(files, capsys):
    config, run = str(files / "config.py"), str(files / "run")
    places = ["--data.data-dir", str(files / "data"), "--data.source"]
    prepare = ["prepare", str(files / "statements.jsonl"), "--kind", "statements", "--data-dir", str(files / "data")]
    main([*prepare, "--name", "follows"])
    assert "follows/1.0.0: train 20 examples; classes does not, follows" in capsys.readouterr().out
    main(["inspect", config, *places, "follows"])
    shown = capsys.readouterr().out
    assert "it does not" in shown or "it follows" in shown
    main(["train", config, *places, "follows", "--workdir", run])
    capsys.readouterr()
    main(["evaluate", run])
    main(["evaluate", run, "--data.source", str(files / "statements.jsonl")])
    held_out, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert (held_out["scored"], other["scored"]) == ("2 statement pairs", "20 statement pairs")
    with pytest.raises(SystemExit):
        main(prepare)
    assert "A dataset of pairs of statements needs a name" in capsys.readouterr().err


def test_files_and_the_stored_dataset_hold_the_same(files):
    path, form = str(files / "statements.jsonl"), FORMS.find("statements")()

    def reader(*source):
        return Reader(DataConfig(source=source, data_dir=str(files / "data"), validation_fraction=0.0))

    reader("stored").store(form, "stored", {"train": [path]})
    of_files, stored = reader(path).examples(form), reader("stored").examples(form)
    assert stored.class_names == of_files.class_names == ("does not", "follows")
    assert list(stored.source.examples("train")) == list(of_files.source.examples("train"))
    assert of_files.source.examples("train")[0] == Statements("it is 0", "it is 0", 1)
    assert of_files.make_tokenizer().vocab_size == stored.make_tokenizer().vocab_size


def test_a_form_that_nobody_brought_is_named():
    with pytest.raises(UserError, match=r"form.kind must be one of text, labelled, pairs.*, got 'triples'"):
        FORMS.find("triples")
