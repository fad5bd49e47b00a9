"""Prefix language models and span corruption on the command line: they learn, are shown, and are started from."""

import json
import random

import numpy as np
import pytest

from transformer.cli.main import main
from transformer.runs.saved import load

CONFIG = """
from transformer import AdamW, CosineSchedule
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES

SAMPLES = {"prefix_lm": {"sample_length": 4}}

def get_config(variant="prefix_lm"):
    return Config(
        model=ModelConfig(
            num_layers=1, embed_dim=32, pattern=(BlockConfig(AttentionConfig(num_heads=2)),), init_std=0.0,
        ),
        data=DataConfig(sequence_length=32, batch_size=16, **{"buckets": (32,)} if variant == "seq2seq" else {}),
        objective=OBJECTIVES.find(variant)(),
        optimizer=AdamW(learning_rate=1e-2, schedule=CosineSchedule(warmup_steps=5)),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=40, log_every=10, eval_every=0, checkpoint_every=0, **SAMPLES.get(variant, {})),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Questions with answers, and the same as pairs."""
    directory = tmp_path_factory.mktemp("denoising")
    words = random.Random(0)
    with (directory / "text.jsonl").open("w") as text, (directory / "pairs.jsonl").open("w") as file:
        for _ in range(200):
            word = "".join(words.choice("abcdef") for _ in range(4))
            text.write(json.dumps({"prompt": f"say {word}: ", "text": word * 2}) + "\n")
            file.write(json.dumps({"source": f"say {word}", "target": word}) + "\n")
    (directory / "config.py").write_text(CONFIG)
    return directory


def run(command, place, variant, *options):
    main([command, f"{place / 'config.py'}:{variant}", "--data.data-dir", str(place / "data"), *options])


def train(place, variant, *options):
    source = () if variant == "seq2seq" else ("--data.source", str(place / "text.jsonl"))
    run("train", place, variant, "--workdir", str(place / variant), *source, *options)
    return place / variant


@pytest.fixture(scope="module")
def prefix_run(place):
    return train(place, "prefix_lm")


@pytest.fixture(scope="module")
def spans_run(place):
    return train(place, "span_corruption")


@pytest.mark.parametrize("name", ["prefix_run", "spans_run"])
def test_the_loss_falls_and_evaluate_repeats_it(name, request, capsys):
    workdir = request.getfixturevalue(name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["split"] == "validation"
    assert "bits_per_byte" not in rows[-1]
    capsys.readouterr()
    main(["evaluate", str(workdir)])
    scores = json.loads(capsys.readouterr().out)
    assert scores["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert "gzip_bits_per_byte" not in scores


def test_a_prefix_lm_generates_from_a_prompt(prefix_run, capsys):
    capsys.readouterr()
    assert load(prefix_run).model.bidirectional_prefix
    main(["generate", str(prefix_run), "--prompt", "say abcd: ", "--max-new-tokens", "4", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("say abcd: ")


def test_inspect_shows_prefixes(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run("inspect", place, "prefix_lm", "--data.source", str(place / "text.jsonl"))
    text = capsys.readouterr().out
    assert "say " in text
    first = next(line for line in text.splitlines() if line.startswith("■"))
    assert first.startswith("■ ■ ■")


def test_inspect_shows_sources_and_targets(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run("inspect", place, "span_corruption", "--data.source", str(place / "text.jsonl"))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("row 0"))
    assert lines[start] == "row 0: 30 of 30 and 8 of 8 tokens"
    source, target = lines[start + 1 : start + 3]
    assert source.index("<0>") < source.index("<1>")
    assert target.startswith("<0>")
    assert "<1>" in target


def test_a_translator_starts_from_span_corruption_and_says_what_it_took(place, spans_run, capsys):
    main(
        [
            *("prepare", str(place / "pairs.jsonl"), "--kind", "pairs", "--name", "sayings"),
            *("--data-dir", str(place / "data")),
        ]
    )
    capsys.readouterr()
    options = ("--data.source", "sayings", "--training.init-from", str(spans_run), "--training.steps", "5")
    workdir = train(place, "seq2seq", *options, "--optimizer.learning-rate", "1e-9")
    printed = " ".join(capsys.readouterr().err.split())
    assert "reshaped: token_embedding/embedding (the first 257 of 257 rows)" in printed
    assert "fresh" not in printed and "skipped" not in printed
    donor, own = load(spans_run), load(workdir)
    assert (donor.config.model.vocab_size, own.config.model.vocab_size) == (257 + 2, 257)
    np.testing.assert_allclose(
        own.params["token_embedding"]["embedding"], donor.params["token_embedding"]["embedding"][:257], atol=1e-6
    )


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("prefix_lm", ["--data.stride", "8"], "--data.stride is for the objective next_token, got 8"),
        ("span_corruption", ["--model.vocab-size", "258"], "at least the tokenizer's 259, got 258; 0 takes"),
    ],
)
def test_what_cannot_work_is_refused(place, variant, options, message, capsys):
    arguments = ["--data.source", str(place / "text.jsonl"), "--workdir", str(place / "refused"), *options]
    with pytest.raises(SystemExit) as exit_info:
        run("train", place, variant, *arguments)
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (place / "refused").exists()
