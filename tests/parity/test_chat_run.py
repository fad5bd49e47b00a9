"""A language model learns from conversations, and replies: from the command line to the reply."""

import io
import json
import sys

import numpy as np
import pytest
from tiny_tokenizers import byte_level, folder

pytest.importorskip("jinja2")

from transformer.cli.main import main
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.datasets import data_of
from transformer.data.pipeline import evaluation_batches
from transformer.data.rows import make_pairs
from transformer.data.tokenizers.folder import from_folder
from transformer.data.tokenizers.pretrained import Pretrained
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizers.adamw import AdamW
from transformer.runs.saved import load
from transformer.runs.train import train
from transformer.schedules.constant import ConstantSchedule
from transformer.types import UserError

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
ANSWERS = {"the café": "open", "the end": "<tool> closed"}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    return folder(tmp_path_factory.mktemp("model"), byte_level(), config)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    kind, files = from_folder(tokenizer_folder)
    run = tokenizer_folder / "run"
    run.mkdir()
    for name, content in files.items():
        (run / name).write_bytes(content)
    return kind.open(run)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    def turns(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    both = [message for pair in ANSWERS.items() for message in turns(*pair)]
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    lines = [json.dumps({"messages": m}) for m in (*(turns(*pair) for pair in ANSWERS.items()), both)]
    path.write_text("\n".join(lines * 6))
    return path


def config_of(tokenizer, rows, directory, **data):
    data = {"sequence_length": 64, "batch_size": 8, "validation_fraction": 0.2} | data
    block = BlockConfig(AttentionConfig(num_heads=2))
    return Config(
        workdir=str(directory / "run"),
        data=DataConfig(source=(str(rows),), data_dir=str(directory / "data"), tokenizer=tokenizer.settings, **data),
        model=ModelConfig(num_layers=1, embed_dim=32, pattern=(block,), vocab_size=384),
        optimizer=AdamW(learning_rate=0.01, schedule=ConstantSchedule(warmup_steps=0)),
        training=TrainingConfig(steps=60, log_every=30, eval_every=60, sample_length=0, checkpoint_every=60),
    )


@pytest.mark.parametrize("record_bytes", [1 << 20, 64])
def test_only_replies_have_weight(tokenizer, rows, tmp_path, record_bytes):
    data = data_of(config_of(tokenizer, rows, tmp_path, record_bytes=record_bytes, validation_fraction=0.0))
    records = data.sources[0].records("train")
    assert len(records) == 18
    for index in range(3):
        pairs = make_pairs(tokenizer, records[index])
        said = tokenizer.decode(pairs.targets[pairs.weights > 0])
        assert said == ["open\n", "<tool> closed\n", "open\n<tool> closed\n"][index]
        assert (pairs.targets[pairs.weights > 0] == tokenizer.end_of_text).sum() == (index == 2) + 1
        np.testing.assert_array_equal(pairs.inputs[1:], pairs.targets[:-1])
    assert next(data.texts("train")) == "the café\nopen"
    batch = next(data.train_batches(tokenizer))
    assert 0 < batch.weights.mean() < 0.5


def test_what_is_scored_are_the_replies(tokenizer, rows, tmp_path):
    config = config_of(tokenizer, rows, tmp_path)
    texts = list(evaluation_batches(config.data, tokenizer, "validation").texts())
    assert set(texts) <= {"open\n", "<tool> closed\n", "open\n<tool> closed\n"} and texts


def test_a_run_learns_to_reply(tokenizer, tokenizer_folder, rows, tmp_path, monkeypatch, capsys):
    # As an imported run would have it: the tokenizer is there without training.
    monkeypatch.setattr(Pretrained, "train", lambda self, texts: self.open(tokenizer_folder / "run"))
    config = config_of(tokenizer, rows, tmp_path)
    train(config)
    run = load(config.workdir)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    assert run.tokenizer.chat_file == tokenizer.chat_file
    assert run.config.model.vocab_size > run.tokenizer.vocab_size
    capsys.readouterr()
    for question, answer in ANSWERS.items():
        main(["generate", config.workdir, "--chat", "--prompt", question, "--temperature", "0"])
        assert capsys.readouterr().out == f"{answer}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("the end\n"))
    main(["generate", config.workdir, "--chat", "--temperature", "0", "--system", "be kind"])
    assert len(capsys.readouterr().out) > 1
    for flags, message in {
        ("--system", "x", "--prompt", "y"): "give --chat too",
        ("--chat", "--prompt", " "): "must not be blank",
        ("--chat", "--prompt", "the end " * 60): "leaves room for 0",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(["generate", config.workdir, *flags])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("messages", [[1], [{"role": "user"}], [{"role": "user", "content": [1]}]])
def test_messages_of_another_kind_are_refused(tokenizer, tmp_path, messages):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=r"must have a role and its content, both text; message 1 of .*line 1"):
        data_of(config_of(tokenizer, path, tmp_path))


def test_a_tokenizer_without_a_template_is_refused(rows, tmp_path, tokenizer):
    config = config_of(tokenizer, rows, tmp_path)
    data = data_of(config)
    bare = Pretrained(end_of_text=0).load(tokenizer.content.decode())
    with pytest.raises(UserError, match="need a chat template"):
        make_pairs(bare, data.sources[0].records("train")[0])
