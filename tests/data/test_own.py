"""A user-defined tokenizer and source, from outside the package: a run trains on them, resumes, is scored and predicts."""

import dataclasses
import json

import numpy as np
import pytest

from transformer.cli.main import main
from transformer.data import registry
from transformer.data.registry import register_source
from transformer.data.source_kind import SourceKind
from transformer.runs.saved import load
from transformer.tokenizer import TOKENIZERS, TokenizerKind

CONFIG = """
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=1)),)),
        data=DataConfig(sequence_length=16, batch_size=2),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=2, log_every=1, eval_every=0, checkpoint_every=0, sample_length=0),
    )
"""


class DigitTokenizer:
    """The digits in a base, then end-of-text; other characters are left out."""

    kind = "digits"

    def __init__(self, base):
        self.base, self.end_of_text, self.vocab_size = base, base, base + 1
        self.token_bytes = np.array([1] * base + [0], np.int32)

    def encode(self, text):
        return np.array([int(char) for char in text if char.isdigit() and int(char) < self.base], np.int32)

    def decode(self, ids):
        return "".join(str(int(i)) for i in ids if 0 <= i < self.base)

    def save(self, directory):
        directory.mkdir(parents=True, exist_ok=True) if hasattr(directory, "mkdir") else None
        with open(f"{directory}/tokenizer.json", "w") as file:
            json.dump({"digits": self.base}, file)


@pytest.fixture(scope="module", autouse=True)
def own_kinds():
    """They are known while this module runs."""

    @TOKENIZERS.register
    @dataclasses.dataclass(frozen=True)
    class Digits(TokenizerKind):
        """Digits."""

        kind = "digits"

        base: int = 10
        """How many digits there are."""

        def train(self, texts):
            assert any("7" in text for text in texts)
            return DigitTokenizer(self.base)

        def load(self, content):
            return DigitTokenizer(json.loads(content)["digits"])

    before = list(registry._KINDS)

    @register_source
    class Counting(SourceKind):
        """count:N, whose rows are the first N numbers, each with its class."""

        is_path = False

        def accepts(self, name):
            return name.startswith("count:")

        def rows(self, name, keys, what):
            for number in range(int(name.removeprefix("count:"))):
                text = " ".join(str(number + i) for i in range(5))
                yield f"{name}, number {number}", {"text": text, "label": "odd" if number % 2 else "even"}

    yield
    registry._KINDS[:] = before
    del TOKENIZERS._kinds["digits"]


@pytest.mark.parametrize("objective", ["next_token", "classification"])
def test_a_run_trains_goes_on_and_is_scored(objective, tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    data = ("--data.source", "count:40", "--data.tokenizer", "digits", "--data.tokenizer.base", "9")
    places = ("--data.data-dir", str(tmp_path / "data"), "--workdir", str(tmp_path / "run"))
    command = ["train", str(tmp_path / "config.py"), *data, *places, "--objective", objective]
    main(command)
    main([*command, "--training.steps", "4"])
    assert "continuing from step 2" in " ".join(capsys.readouterr().err.split())
    run = load(tmp_path / "run")
    assert (run.step, run.tokenizer.base) == (4, 9)
    assert run.config.data.tokenizer == TOKENIZERS.find("digits")(base=9)
    main(["evaluate", str(tmp_path / "run")])
    main(["evaluate", str(tmp_path / "run"), "--data.source", "count:5"])
    held_out, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert (held_out["split"], other["split"]) == ("validation", "all")
    if objective == "classification":
        assert (held_out["scored"], other["scored"]) == ("4 texts", "5 texts")
    main(["predict", str(tmp_path / "run"), "count:3"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(SystemExit):
        main([*command, "--training.steps", "6", "--data.tokenizer.base", "10"])
    assert "--data.tokenizer.base: 9 -> 10" in capsys.readouterr().err
