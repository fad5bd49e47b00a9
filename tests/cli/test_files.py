"""Files as they lie, on the command line: trained on without being prepared, scored whole, predicted row by row."""

import bz2
import csv
import dataclasses
import gc
import io
import json
import random
import signal
import time

import jax
import numpy as np
import pytest

from transformer.cli.main import main
from transformer.runs.saved import load

CONFIG = """
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.optimizers.adamw import AdamW

CUTS = {"buckets": (8, 24)}, {"record_bytes": 256}

def get_config(kind):
    objective = OBJECTIVES.find(kind)()
    block = BlockConfig(AttentionConfig(num_heads=2))
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(block,)),
        data=DataConfig(sequence_length=24, batch_size=8, **CUTS[kind == "next_token"]),
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
    assert "1 pair with an empty side is left out" in told


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


def test_all_of_the_own_corpus_is_scored_if_requested(classifier, language_model, capsys):
    assert evaluated(capsys, classifier, "--split", "all")["scored"] == "120 texts"
    parts = [evaluated(capsys, language_model, "--split", split)["bytes"] for split in ("train", "validation", "all")]
    assert parts[0] + parts[1] == parts[2]


# ---- predict ---------------------------------------------------------------------------------------------------------


def predicted(capsys, *arguments):
    capsys.readouterr()
    main(["predict", *map(str, arguments)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predictions_are_what_evaluate_scores_whatever_the_batch(place, classifier, capsys):
    rows = predicted(capsys, classifier, place / "test.jsonl")
    given = [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in ("n", "text", "label")} for row in rows] == given
    assert [list(row) for row in rows] == [["n", "text", "label", "class", "probability"]] * 60
    right = sum(row["class"] == row["label"] for row in rows)
    assert right / 60 == pytest.approx(evaluated(capsys, classifier, "--data.source", place / "test.jsonl")["accuracy"])
    assert right > 20
    run = load(classifier)
    texts = [row["text"] for row in given]
    for batch_size in (7, 64):
        again = run.predict(texts, batch_size=batch_size)
        assert [row["class"] for row in again] == [row["class"] for row in rows]
        assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in rows], abs=1e-5)
    for index in (0, 31, 59):
        (alone,) = run.predict([texts[index]], batch_size=1, top_k=9)
        assert alone["class"] == rows[index]["class"]
        assert alone["probability"] == pytest.approx(rows[index]["probability"], abs=1e-5)
        assert {alone["class"], alone["class_2"], alone["class_3"]} == {"good", "bad", "so-so"}
        probabilities = [alone[name] for name in ("probability", "probability_2", "probability_3")]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_every_kind_of_input_and_output_gives_the_same(place, classifier, capsys, tmp_path, monkeypatch):
    expected = predicted(capsys, classifier, place / "train.csv", "--top-k", "2")
    assert list(expected[0]) == ["id", "text", "label", "class", "probability", "class_2", "probability_2"]
    assert predicted(capsys, classifier, place / "train.tsv.bz2", "--top-k", "2") == expected
    main(["predict", str(classifier), str(place / "train.csv"), "--top-k", "2", "-o", str(tmp_path / "out.csv")])
    told = capsys.readouterr()
    assert told.out == "" and "120 texts of" in told.err
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [{name: str(value) for name, value in row.items()} for row in expected]
    main(["predict", str(classifier), str(place / "train.csv"), "--top-k=2", "--output", str(tmp_path / "out.jsonl")])
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected
    plain = [{name: row[name] for name in ("text", "class", "probability")} for row in expected]
    for name, content in (
        ("txt", "".join(f"{row['text']}\n" for row in plain)),
        ("csv", (place / "train.csv").read_text()),
    ):
        piped = io.TextIOWrapper(io.BytesIO(("\ufeff" + content).encode()))
        monkeypatch.setattr("sys.stdin", piped)
        rows = predicted(capsys, classifier, *(["-"] if name == "txt" else []), "--format", name)
        assert [{name: row[name] for name in plain[0]} for row in rows] == plain
    (tmp_path / "other.jsonl").write_text(
        json.dumps({"words": plain[0]["text"], "text": [1, None], "e": "\ud800"}) + "\n"
    )
    (row,) = predicted(capsys, classifier, tmp_path / "other.jsonl", "--text-key", "words")
    assert (row["text"], row["e"], row["class"]) == ([1, None], "\ud800", plain[0]["class"])


def shaken(run):
    """With random parameters."""
    random = np.random.RandomState(0)
    return dataclasses.replace(
        run, params=jax.tree.map(lambda x: random.standard_normal(x.shape).astype(x.dtype), run.params)
    )


@pytest.mark.parametrize("column", ["translation", "continuation"])
def test_a_translator_and_a_language_model_predict(place, translator, language_model, capsys, column):
    workdir, key = {"translation": (translator, "source"), "continuation": (language_model, "text")}[column]
    texts = (place / "train.en").read_text().splitlines()
    rows = predicted(capsys, workdir, place / "train.en", "--max-new-tokens", "6")
    assert [list(row) for row in rows] == [[key, column]] * 120
    assert [row[key] for row in rows] == texts
    run = load(workdir)
    assert run.predict(texts[:3], max_new_tokens=6, batch_size=2) == [{column: row[column]} for row in rows[:3]]
    # One that says something else of each text.
    run = shaken(run)
    texts = [*texts[:20], "yes " * 5 + "a", "no " * 6 + "a", "b"]
    together = run.predict(texts, max_new_tokens=6, batch_size=5)
    assert together == [run.predict([text], max_new_tokens=6, batch_size=1)[0] for text in texts]
    assert len({said[column] for said in together}) > 5


def test_a_continuation_ends_where_the_model_does(language_model):
    run = load(language_model)
    run = shaken(run)
    room = run.config.model.max_length - len(run.encode("yes " * 5))
    (said,) = run.predict(["yes " * 5])
    assert 0 < len(run.tokenizer.encode(said["continuation"])) <= room == 3


def test_what_cannot_be_predicted_is_refused_with_its_line(place, classifier, language_model, capsys, tmp_path):
    (tmp_path / "blank.txt").write_text("one\n\nthree\n")
    (tmp_path / "bad.csv").write_text("text,n\none,1\ntwo\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (tmp_path / "taken.csv").write_text("text,class\none,1\n")
    (tmp_path / "mixed.jsonl").write_text('{"text": "one"}\n{"text": "two", "n": 1}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "old.csv").write_text("mine")
    (tmp_path / "long.txt").write_text("short\n" + "long " * 9)

    def told(name, *options, run=classifier):
        return refused(capsys, "predict", run, tmp_path / name, *options)

    assert "must not be blank" in told("blank.txt") and "blank.txt, line 2" in told("blank.txt")
    assert "bad.csv, line 3 has more or fewer" in told("bad.csv")
    assert "'text' must be text" in told("bad.jsonl") and "bad.jsonl, line 2 has int" in told("bad.jsonl")
    assert "taken.csv, line 2 has 'class' already" in told("taken.csv")
    assert "has no texts" in told("empty.txt")
    for missing in ("nowhere.csv", "nowhere", "nowhere.txt.gz"):
        assert f"A file of texts must exist, there is no '{tmp_path / missing}'" in told(missing)
    assert "--top-k must be at least 1" in told("mixed.jsonl", "--top-k", "0")
    assert "--max-new-tokens means nothing for a run of classification" in told("mixed.jsonl", "--max-new-tokens", "3")
    assert "long.txt, line 2 has 46" in told("long.txt", run=language_model)
    assert "must be a new file" in told("mixed.jsonl", "-o", tmp_path / "old.csv")
    assert (tmp_path / "old.csv").read_text() == "mine"
    assert "must be the name of a .jsonl or .csv file" in told("mixed.jsonl", "-o", tmp_path / "out.txt")
    # Before the model is loaded.
    picture = refused(capsys, "evaluate", tmp_path / "no run", "--reliability", tmp_path / "none" / "x.svg")
    assert f"--reliability must be in an existing folder, {tmp_path / 'none'} is none; make it first" in picture
    nowhere = f"{tmp_path / 'none'} is none; make it first"
    assert nowhere in told("mixed.jsonl", "-o", tmp_path / "none" / "out.csv", run=tmp_path / "no run")
    # Half of it is written when the second row has another column: nothing stays.
    before = sorted(tmp_path.iterdir())
    assert "line 2 gives text, n, class, probability; write .jsonl" in told("mixed.jsonl", "-o", tmp_path / "out.csv")
    assert sorted(tmp_path.iterdir()) == before


def test_a_table_without_the_column_is_told_what_to_do(place, classifier, language_model, capsys, tmp_path):
    (tmp_path / "other.csv").write_text("words,n\none,1\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": "two\n')
    given = ("predict", classifier), ("generate", language_model, "--prompt-file")
    for command in given:
        told = refused(capsys, *command, tmp_path / "other.csv")
        assert "must name the column text," in told and "has words, n;" in told and "rename them, or give those" in told
        assert f"the column text, {tmp_path / 'empty.csv'} is empty." in refused(
            capsys, *command, tmp_path / "empty.csv"
        )
        assert "broken.jsonl, line 2: " in (told := refused(capsys, *command, tmp_path / "broken.jsonl"))
        assert "at character 10." in told and "line 1" not in told


def test_one_text_is_counted_as_one(place, classifier, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"yes a\n")))
    main(["predict", str(classifier)])
    assert capsys.readouterr().err == f"1 text of standard input predicted with {classifier}\n"


def test_a_separator_that_the_text_lacks_is_noted(place, capsys, tmp_path):
    """Such as a line end typed as a backslash and an n, which a shell leaves as they are."""
    (tmp_path / "text.txt").write_text("one line of it\n\nand another\n\n" * 40)
    for separator, noted in (("\\n\\n", True), ("\n\n", False)):
        prepared = ("--separator", separator, "--data-dir", str(tmp_path / "data"))
        for _ in range(2):
            main(["prepare", str(tmp_path / "text.txt"), *prepared])
            assert (f"has the separator {separator!r}" in capsys.readouterr().out) == noted


def test_an_interrupted_prediction_leaves_no_file(place, classifier, capsys, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        yield {"class": "good", "probability": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr("transformer.runs.saved.Loaded.predictions", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        main(["predict", str(classifier), str(place / "train.csv"), "-o", str(tmp_path / "out.csv")])
    assert exit_info.value.code == 130
    assert list(tmp_path.iterdir()) == []
    assert "SIGINT: stopped." in capsys.readouterr().err


def test_an_interrupt_within_a_callback_is_not_lost(place, classifier, capsys, tmp_path, monkeypatch):
    """Python drops what a callback of the garbage collector raises."""

    def interrupted_at(phase, _):
        if phase == "start":
            gc.callbacks.remove(interrupted_at)
            signal.raise_signal(signal.SIGINT)

    def slow(*_, **__):
        gc.callbacks.append(interrupted_at)
        gc.collect()
        for _ in range(200):
            time.sleep(0.05)
        yield {"class": "good", "probability": 1.0}

    monkeypatch.setattr("transformer.runs.saved.Loaded.predictions", slow)
    with pytest.raises(SystemExit) as exit_info:
        main(["predict", str(classifier), str(place / "train.csv"), "-o", str(tmp_path / "out.csv")])
    assert exit_info.value.code == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "SIGINT: stopped.\n"
