"""From two files to BLEU on the command line: a made-up language in which every word has one counterpart."""

import json
import random

import pytest

from transformer.cli.main import main

CONFIG = """
from transformer import AdamW, CosineSchedule
from transformer.data.tokenizers.words import Words
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.seq2seq import Seq2Seq

def get_config():
    return Config(
        model=ModelConfig(
            num_layers=1, embed_dim=32,
            pattern=(BlockConfig(AttentionConfig(num_heads=2)),), init_std=0.0,
        ),
        data=DataConfig(
            source=("toy",), tokenizer=Words(size=300), sequence_length=16, buckets=(16,), batch_size=32
        ),
        objective=Seq2Seq(),
        optimizer=AdamW(learning_rate=1e-2, schedule=CosineSchedule(warmup_steps=10)),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=300, log_every=100, eval_every=0, checkpoint_every=0),
    )
"""
WORDS = {"dog": "hund", "cat": "katze", "runs": "rennt", "sleeps": "schläft", "big": "groß", "red": "rot", "a": "ein"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("translation")
    words = random.Random(0)
    for split, count in (("train", 600), ("validation", 20), ("test", 33)):
        lines = [[words.choice(list(WORDS)) for _ in range(words.randint(4, 8))] for _ in range(count)]
        (directory / f"{split}.en").write_text("".join(" ".join(line) + "\n" for line in lines))
        (directory / f"{split}.de").write_text("".join(" ".join(WORDS[w] for w in line) + "\n" for line in lines))
    (directory / "config.py").write_text(CONFIG)
    files = {split: [str(directory / f"{split}.{side}") for side in ("en", "de")] for split in ("validation", "test")}
    main(
        [
            *("prepare", str(directory / "train.en"), str(directory / "train.de"), "--kind", "pairs", "--name", "toy"),
            *("--validation", *files["validation"], "--test", *files["test"], "--data-dir", str(directory / "data")),
        ]
    )
    return directory


@pytest.mark.parametrize("shared", [True, False])
def test_a_translator_learns_and_is_scored(place, shared, capsys):
    workdir = place / f"run-{shared}"
    options = [] if shared else ["--data.no-share-vocabulary"]
    main(
        [
            *("train", str(place / "config.py"), "--data.data-dir", str(place / "data"), "--workdir", str(workdir)),
            *options,
        ]
    )
    printed = capsys.readouterr()
    assert "bleu" in printed.out
    assert "longer than a row" not in printed.err
    main(["evaluate", str(workdir), "--split", "test"])
    scores = json.loads(capsys.readouterr().out)
    assert (scores["cut_sources"], scores["cut_targets"]) == (0, 0)
    assert scores["accuracy"] > 0.7
    assert scores["bleu"] > 25
    assert scores["chrf"] > 50
    assert "tok:13a" in scores["bleu_signature"]
    assert "case:mixed" in scores["bleu_signature"]
    main(["generate", str(workdir), "--prompt", "a big dog sleeps"])
    assert set(capsys.readouterr().out.split()) <= {"schlaft", *WORDS.values()}  # accents are lost
    row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["split"] == "validation"
    assert row["bleu"] > 25


def test_inspect_shows_pairs(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["inspect", str(place / "config.py"), "--data.data-dir", str(place / "data")])
    text = capsys.readouterr().out
    assert "cross_attention/query/kernel" in text
    assert "hund" in text or "katze" in text
