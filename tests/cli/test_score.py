"""`transformer score`: columns of each row, choices compared, and what all rows amount to."""

import csv
import json
import math
import re

import numpy as np
import pytest

from transformer.cli.main import main
from transformer.runs.saved import load

CONFIG = """
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizers.adamw import AdamW

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(sequence_length=32, batch_size=8, record_bytes=256),
        optimizer=AdamW(learning_rate=1e-2),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=200, log_every=200, eval_every=0, checkpoint_every=0, sample_length=0),
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A language model of `abcabc...`."""
    folder = tmp_path_factory.mktemp("score")
    (folder / "config.py").write_text(CONFIG)
    (folder / "text.txt").write_text("abc" * 400)
    data = ("--data.source", str(folder / "text.txt"), "--data.data-dir", str(folder / "prepared"))
    main(["train", str(folder / "config.py"), *data, "--workdir", str(folder / "run")])
    return folder / "run"


def scored(capsys, *arguments):
    capsys.readouterr()
    main(["score", *map(str, arguments)])
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], " ".join(err.split())


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(["score", *map(str, arguments)])
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def rows_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_text_has_its_columns(run, tmp_path, capsys):
    rows, said = scored(capsys, run, rows_of(tmp_path / "x.jsonl", {"id": 1, "text": "abcabc"}, {"text": "cab bac"}))
    (first, second) = load(run).score(["abcabc", "cab bac"])
    assert [*rows[0].values()][:2] == [1, "abcabc"]
    assert [*rows[0]][2:] == ["log_probability", "num_tokens", "perplexity", "bits_per_byte"]
    expected = [first.log_probability, 6, first.perplexity, first.bits_per_byte]
    assert [*rows[0].values()][2:] == pytest.approx(expected, rel=1e-4)
    assert rows[1]["log_probability"] < rows[0]["log_probability"]
    total = first.log_probability + second.log_probability
    assert f"2 texts of {tmp_path / 'x.jsonl'} scored" in said
    found = float(re.search(r"perplexity (\S+) a token", said)[1])
    assert found == pytest.approx(math.exp(-total / 13), rel=1e-3)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_lighter_weights_score_nearly_the_same(run, weights, tmp_path, capsys):
    """In each command; unknown ones are refused."""
    path = rows_of(tmp_path / "x.jsonl", {"text": "abcabcabcacb"})
    (whole,), _ = scored(capsys, run, path)
    (light,), _ = scored(capsys, run, path, "--weights", weights)
    assert 0 < abs(light["bits_per_byte"] - whole["bits_per_byte"]) < 0.05
    main(["evaluate", str(run), "--split", "all", "--weights", weights])
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == weights
    main(["evaluate", str(run), "--split", "all"])
    assert 0 < abs(found["bits_per_byte"] - json.loads(capsys.readouterr().out)["bits_per_byte"]) < 0.05
    main(
        ["generate", str(run), "--prompt", "abcab", "--weights", weights, "--temperature", "0", "--max-new-tokens", "6"]
    )
    assert capsys.readouterr().out == "abcabcabcab\n"
    main(["predict", str(run), str(path), "--weights", weights, "--max-new-tokens", "4"])
    predicted = json.loads(capsys.readouterr().out)
    assert len(predicted["continuation"]) == 4
    vectors = []
    for name, flags in (("whole", ()), (weights, ("--weights", weights))):
        main(["embed", str(run), str(path), "-o", str(tmp_path / f"{name}.npy"), *flags])
        vectors.append(np.load(tmp_path / f"{name}.npy"))
    assert 0 < np.abs(vectors[0] - vectors[1]).max() < 0.1 * np.abs(vectors[0]).max()
    assert "must be one of nothing, bfloat16, int8, got 'int4'" in refused(capsys, run, path, "--weights", "int4")


def test_a_prompt_is_read_and_not_scored(run, tmp_path, capsys):
    path = rows_of(
        tmp_path / "x.jsonl", {"prompt": "ab", "text": "cab"}, {"before": "ab", "text": "cab"}, {"text": "cab"}
    )
    rows, _ = scored(capsys, run, path)
    assert [row["num_tokens"] for row in rows] == [3, 3, 3]
    assert rows[0]["log_probability"] > rows[1]["log_probability"] == rows[2]["log_probability"]
    assert "must have 'before'" in refused(capsys, run, path, "--prompt-key", "before")


def test_tokens_one_by_one(run, tmp_path, capsys):
    rows, _ = scored(capsys, run, rows_of(tmp_path / "x.jsonl", {"text": "abca"}), "--per-token")
    assert rows[0]["tokens"] == list("abca")
    assert sum(rows[0]["log_probabilities"]) == pytest.approx(rows[0]["log_probability"], rel=1e-5)


def test_choices_are_compared(run, tmp_path, capsys):
    rows = [
        {"text": "abca", "choices": ["bca", "cab", "a"], "answer": 0},
        {"text": "ab", "choices": ["a", "cab"], "answer": "cab"},
        {"text": "ab", "choices": ["cab", "a"], "answer": 1},
    ]
    path, out = rows_of(tmp_path / "x.jsonl", *rows), tmp_path / "out.jsonl"
    options = ("--choices-key", "choices", "--answer-key", "answer", "-o", out)
    (totals,), said = scored(capsys, run, path, *options)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["choice"] for row in found] == [0, 1, 0]
    run_scores = [score.log_probability for score in load(run).score(rows[0]["choices"], prompts="abca")]
    assert found[0]["log_probabilities"] == pytest.approx(run_scores, rel=1e-4)
    per_byte = [score / len(choice) for score, choice in zip(run_scores, rows[0]["choices"], strict=True)]
    assert found[0]["choice_per_byte"] == per_byte.index(max(per_byte))
    assert totals["rows"] == 3
    assert totals["accuracy"] == pytest.approx(2 / 3)
    assert "accuracy 0.6667" in said


def test_minimal_pairs_are_choices_in_two_fields(run, tmp_path, capsys):
    (tmp_path / "x.csv").write_text("good,bad\nabcabc,acbacb\nbcabc,bcacb\n")
    out = tmp_path / "out.csv"
    (totals,), said = scored(capsys, run, tmp_path / "x.csv", "--choices-key", "good", "bad", "--output", out)
    assert totals == {"rows": 2, "chosen": {"0": 1.0}}
    assert "choice 0 in 100.0%" in said
    assert [row["choice"] for row in csv.DictReader(out.read_text().splitlines())] == ["0", "0"]


def test_what_cannot_be_scored_is_refused_with_its_line(run, tmp_path, capsys):
    path = rows_of(tmp_path / "x.jsonl", {"text": "a", "choices": ["b"], "answer": 3}, {"text": ""})
    assert f"must not be empty, {path}, line 2 is" in refused(capsys, run, path)
    assert "must have two choices or more" in refused(capsys, run, path, "--choices-key", "choices")
    good = rows_of(tmp_path / "y.jsonl", {"choices": ["b", "c"], "answer": 3})
    told = refused(capsys, run, good, "--choices-key", "choices", "--answer-key", "answer")
    assert "must be one of the 2 choices, by its number from 0 or by its text" in told
    assert "names the right choice, got 'answer' without --choices-key" in refused(
        capsys, run, good, "--answer-key", "answer"
    )
    assert "--per-token is for single texts" in refused(capsys, run, good, "--choices-key", "choices", "--per-token")
    assert "must be a new file" in refused(capsys, run, good, "-o", good)
