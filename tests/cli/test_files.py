"""Files as they lie, on the command line: trained on without being prepared, and scored whole."""

import bz2
import json
import random

import pytest

from transformer.cli.main import main
from transformer.runs.saved import load

CONFIG = """
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.optimizers.adamw import AdamW

def get_config(kind):
    objective = OBJECTIVES.find(kind)()
    block = BlockConfig(AttentionConfig(num_heads=2))
    return Config(
        model=ModelConfig(architecture=objective.architecture, num_layers=1, embed_dim=16, pattern=(block,)),
        data=DataConfig(sequence_length=24, batch_size=8, buckets=() if kind == "next_token" else (8, 24), record_bytes=256),
        objective=objective,
        optimizer=AdamW(learning_rate=1e-2),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=30, log_every=30, eval_every=0, checkpoint_every=0, sample_length=0),
    )
"""
TELLING = {"good": "yes", "bad": "no", "so-so": "hm"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of every kind, and a config with a variant for each objective."""
    directory, words = tmp_path_factory.mktemp("files"), random.Random(0)
    (directory / "config.py").write_text(CONFIG)
    texts = []
    for index in range(120):
        label = list(TELLING)[index % 3]
        line = [TELLING[label], *(words.choice("abcde") for _ in range(words.randint(1, 8)))]
        texts.append((" ".join(line), label))
    table = "id,text,label\n" + "".join(f'{i},"{text}",{label}\n' for i, (text, label) in enumerate(texts))
    (directory / "train.csv").write_text(table)
    (directory / "train.tsv.bz2").write_bytes(bz2.compress(table.replace(",", "\t").replace('"', "").encode()))
    (directory / "test.jsonl").write_text(
        "".join(json.dumps({"n": i, "text": text, "label": label}) + "\n" for i, (text, label) in enumerate(texts[:60]))
    )
    (directory / "good.csv").write_text("words,class\n" + "".join(f"{t},{c}\n" for t, c in texts[:30] if c == "good"))
    (directory / "other.csv").write_text("text,label\nyes a,good\nno b,awful\n")
    (directory / "train.en").write_text("".join(f"{text}\n" for text, _ in texts))
    (directory / "train.de").write_text("".join(f"{text.upper()}\n" for text, _ in texts))
    (directory / "more.en").write_text("yes a\n\nno b\n")
    (directory / "more.de").write_text("YES A\nHM\nNO B\n")
    (directory / "other.txt").write_text("yes a b c. " * 30)
    return directory


def train(place, kind, *sources):
    sources = [str(place / source) for source in sources]
    main(
        [
            *("train", f"{place / 'config.py'}:{kind}", "--data.source", *sources),
            *("--data.data-dir", str(place / "prepared"), "--workdir", str(place / kind)),
        ]
    )
    return place / kind


@pytest.fixture(scope="module")
def classifier(place):
    return train(place, "classification", "train.csv")


@pytest.fixture(scope="module")
def translator(place):
    return train(place, "seq2seq", "train.en", "train.de")


@pytest.fixture(scope="module")
def language_model(place):
    return train(place, "next_token", "train.tsv.bz2")


def evaluated(capsys, *arguments):
    capsys.readouterr()
    main(["evaluate", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    """The message of a command that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.split())


def test_a_run_scores_what_it_held_out_and_another_file_whole(place, classifier, capsys):
    held_out = evaluated(capsys, classifier)
    assert (held_out["split"], held_out["targets"], held_out["scored"]) == ("validation", 12, "12 texts")
    scores = evaluated(capsys, classifier, "--data.source", place / "test.jsonl")
    assert (scores["split"], scores["targets"], scores["scored"]) == ("all", 60, "60 texts")
    assert scores["classes"] == list(load(classifier).class_names) == ["bad", "good", "so-so"]
    assert [of_class["support"] for of_class in scores["per_class"].values()] == [20, 20, 20]
    assert evaluated(capsys, classifier, "--data.source", place / "test.jsonl", "--split", "validation")["targets"] == 6
    # By whatever name: it was trained on most of this.
    (place / "renamed.csv").write_bytes((place / "train.csv").read_bytes())
    assert evaluated(capsys, classifier, "--data.source", place / "renamed.csv") == held_out | {
        "source": [str(place / "renamed.csv")]
    }


def test_a_file_of_one_class_is_scored_under_the_names_of_the_run(place, classifier, capsys):
    keys = ("--data.text-key", "words", "--data.label-key", "class")
    scores = evaluated(capsys, classifier, "--data.source", place / "good.csv", *keys)
    assert scores["scored"] == "10 texts"
    assert [sum(row) for row in scores["confusion"]] == [0, 10, 0]
    told = refused(capsys, "evaluate", classifier, "--data.source", place / "other.csv")
    assert "must be one of the run's classes, bad, good, so-so" in told
    assert "other.csv, line 3 has 'awful'" in told


def test_a_prepared_dataset_is_scored_whole_too(place, classifier, capsys):
    data = ("--data-dir", place / "prepared")
    options = ("--kind", "labelled", "--name", "test60", "--test", place / "train.csv", *data)
    main([str(word) for word in ("prepare", place / "test.jsonl", *options)])
    by_name = ("--data.source", "test60", "--data.data-dir", place / "prepared")
    scores = evaluated(capsys, classifier, *by_name)
    assert (scores["split"], scores["scored"]) == ("all", "180 texts")
    assert evaluated(capsys, classifier, *by_name, "--split", "test")["scored"] == "120 texts"
    both = refused(capsys, "evaluate", classifier, "--data.source", "test60", place / "test.jsonl", *by_name[2:])
    assert "from one dataset, or from files" in both


def test_pairs_are_scored_whole_and_blank_ones_counted(place, translator, capsys):
    assert evaluated(capsys, translator)["scored"] == "12 pairs"
    main(["evaluate", str(translator), "--data.source", str(place / "more.en"), str(place / "more.de")])
    scores, told = capsys.readouterr()
    assert json.loads(scores)["scored"] == "2 pairs"
    assert "bleu" in json.loads(scores)
    assert "1 pairs with an empty side are left out" in told


def test_running_text_is_scored_whole(place, language_model, capsys):
    held_out = evaluated(capsys, language_model)
    assert held_out["split"] == "validation"
    scores = evaluated(capsys, language_model, "--data.source", place / "other.txt", "--data.data-dir", place / "other")
    assert (scores["split"], scores["bytes"]) == ("all", (place / "other.txt").stat().st_size)
    assert scores["scored"] == f"{scores['bytes'] + 1:,} tokens"
    own = evaluated(capsys, language_model, "--data.source", place / "train.tsv.bz2")
    assert own == held_out | {"source": own["source"]}
    part = evaluated(capsys, language_model, "--data.source", place / "other.txt", "--split", "validation")
    assert 0 < part["bytes"] < 50


def test_all_of_the_own_corpus_is_scored_when_it_is_asked_for(classifier, language_model, capsys):
    assert evaluated(capsys, classifier, "--split", "all")["scored"] == "120 texts"
    parts = [evaluated(capsys, language_model, "--split", split)["bytes"] for split in ("train", "validation", "all")]
    assert parts[0] + parts[1] == parts[2]
