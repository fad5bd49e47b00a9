"""`transformer attention` on a run, an imported run and a pretrained folder, and what it refuses."""

import json
import re

import numpy as np
import pytest

from transformer import load
from transformer.analysis.attention_page import unpack
from transformer.cli.main import main
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.runs.export import export_model
from transformer.runs.train import train

BLOCK = BlockConfig(
    AttentionConfig(num_heads=4, num_kv_heads=2), FeedForwardConfig(24, "silu", gated=True), RMSNorm(epsilon=1e-6)
)
TEXT = "the clocks were striking"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, its folder as Hugging Face has it, and that folder imported."""
    path = tmp_path_factory.mktemp("attention")
    (path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40)
    config = Config(
        model=ModelConfig(num_layers=2, embed_dim=16, pattern=(BLOCK,)),
        data=DataConfig(
            source=(str(path / "text.txt"),), sequence_length=32, batch_size=8, data_dir=str(path / "data")
        ),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=2, log_every=1, eval_every=0, sample_length=0),
        workdir=str(path / "run"),
    )
    train(config)
    export_model(path / "run", path / "folder")
    main(["import", str(path / "folder"), "--workdir", str(path / "imported")])
    return path


def page_of(path):
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL
    )
    return json.loads(text)


@pytest.mark.parametrize(
    ("name", "initial"),
    [("run", "before training"), ("imported", "initialised at random"), ("folder", "initialised at random")],
)
def test_a_page_of_each(place, tmp_path, capsys, name, initial):
    output = tmp_path / "page.html"
    main(["attention", str(place / name), "--text", TEXT, "-o", str(output)])
    captured = capsys.readouterr()
    assert captured.out == "" and f"{output} written" in captured.err.replace("\n", "")
    data, expected = page_of(output), load(place / name).attention(TEXT).maps[0].weights
    assert data["initial"] == initial and data["texts"]["decoder"][1:] == list(TEXT)
    for layer, weights in zip(data["maps"][0]["layers"], expected, strict=True):
        assert np.abs(unpack(layer["weights"], weights.shape) - weights).max() < 1 / 255
    assert re.findall(r"\w+://[^\s\"]+", output.read_text("utf-8")) == [
        "http://www.w3.org/2000/svg"
    ]  # a name, not a place


def test_options_are_taken(place, tmp_path):
    main(
        [
            "attention",
            str(place / "run"),
            "--text",
            TEXT,
            "-o",
            str(tmp_path / "p.html"),
            "--no-initial",
            "--top-k",
            "3",
        ]
    )
    data = page_of(tmp_path / "p.html")
    assert data["initial"] == "" and {len(row) for row in data["candidates"]} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "{}/p.html"], "There must be a text to look at, got ''; give --text TEXT."),
        (["--text", " ", "-o", "{}/p.html"], "There must be a text to look at, got ' '"),
        (["--text", "a"], "--output must be the name of a new .html file, got ''; give -o FILE.html."),
        (["--text", "a", "-o", "{}/p.png"], "--output must be the name of a new .html file"),
        (
            ["--text", "a", "-o", "{}/none/p.html"],
            "--output must be in an existing folder, {}/none is none; make it first.",
        ),
        (["--text", "a", "-o", "{}/old.html"], "--output must be a new file, {}/old.html exists; choose another name"),
        (["--text", "a" * 40, "-o", "{}/p.html"], "at most the 32 tokens that the model reads, got 41"),
        (["--text", "a", "--target", "b", "-o", "{}/p.html"], "A target is for translators and prefix language models"),
        (["--text", "a", "--top-k", "0", "-o", "{}/p.html"], "--top-k must be at least 1, got 0."),
    ],
)
def test_refusals(place, tmp_path, capsys, arguments, message):
    (tmp_path / "old.html").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["attention", str(place / "run"), *(word.replace("{}", str(tmp_path)) for word in arguments)])
    assert message.replace("{}", str(tmp_path)) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"] and (tmp_path / "old.html").read_text() == "mine"


def test_help_fits_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(["attention", "--help"])
    text = capsys.readouterr().out
    assert "--output, -o TEXT" in text and "--target" in text
    # The words before the options are as they stand in the source.
    assert max(map(len, text[text.index("options:") :].splitlines())) <= 80
