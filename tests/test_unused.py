"""A run has the settings that it uses: no flag shows another, and a config refuses another by name."""

import dataclasses
import json
import pathlib
import re

import pytest

from transformer.cli.arguments import load_config, parse_config
from transformer.cli.fields import all_flags, flags
from transformer.cli.main import main
from transformer.config import OF_SOME, Config, DataConfig, ParallelConfig, TrainingConfig, value_and_default
from transformer.form import FORMS
from transformer.model_config import BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.objectives.classification import Classification
from transformer.objectives.next_token import NextToken
from transformer.objectives.seq2seq import Seq2Seq
from transformer.ops.poolings.max import MaxPooling
from transformer.ops.positions.rotary import RotaryPositions
from transformer.overrides import override
from transformer.types import UserError

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
OF_A_BLOCK = re.compile(r"--model\.(pattern|first)\.\d+\.")
EXPERTS = ModelConfig(pattern=(BlockConfig(feed_forward=FeedForwardConfig(num_experts=4)),))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_run_has_few_settings(path):
    names = [name for name in flags(load_config(str(path))) if not OF_A_BLOCK.match(name)]
    assert len(names) <= 114, names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(data=DataConfig(label_key="x")), "data.label_key is for labelled texts, got 'x' for the next_"),
        (lambda: Config(data=DataConfig(truncate="tail")), "data.truncate is for labelled texts and pairs, got 'tail'"),
        (lambda: Config(data=DataConfig(buckets=(256,))), "data.buckets is for labelled texts and pairs, got .256,."),
        (lambda: examples(source_key="x"), "data.source_key is for pairs, got 'x' for the classification objective"),
        (lambda: examples(separator="x"), "data.separator is for running text, got 'x' for the classification"),
        (lambda: examples(pack=False), "data.pack is for running text, got False for the classification objective"),
        (lambda: examples(weights=(1.0,)), "data.weights is for running text, got .1.0,. for the classification"),
        (lambda: pairs(text_key="x"), "data.text_key is for running text and labelled texts, got 'x' for the seq2seq"),
        (
            lambda: pairs(stride=8),
            "data.stride is for the objective next_token, got 8 for the seq2seq objective; leave",
        ),
        (
            lambda: Config(model=ModelConfig(pooling=MaxPooling())),
            r"model.pooling is for the objectives classification and embedding, got MaxPooling\(\) for the next_token objective",
        ),
        (
            lambda: Config(model=ModelConfig(memory_length=8), objective=Seq2Seq()),
            "model.memory_length is for the objective next_token, got 8 for the seq2seq objective; leave it out",
        ),
        (
            lambda: Config(objective=Seq2Seq(), training=TrainingConfig(sample_prompt="x")),
            "training.sample_prompt is for the objectives next_token and prefix_lm, got 'x' for the seq2seq",
        ),
        (lambda: Config(data=DataConfig(weights=(1.0,))), "data.weights is for several sources .data.source., got"),
        (lambda: Config(objective=NextToken(router_z=0.5)), "objective.router_z is for models with experts, got 0.5"),
        (
            lambda: Config(
                model=ModelConfig(pattern=(BlockConfig(feed_forward=FeedForwardConfig(experts_per_token=1)),))
            ),
            "model.pattern.0.feed_forward.experts_per_token is for models with experts .num_experts., got 1",
        ),
        (
            lambda: Config(model=ModelConfig(positions=RotaryPositions(scaling_factor=2.0))),
            "model.positions.scaling_factor is for the scalings linear, llama3, yarn, longrope, dynamic, got 2.0",
        ),
        (
            lambda: Config(model=ModelConfig(positions=RotaryPositions(scaling="linear", original_length=64))),
            "model.positions.original_length is for the scalings llama3, yarn, longrope, dynamic, got 64",
        ),
        (lambda: Config(training=TrainingConfig(init_from_step="best")), "init_from_step is for runs that start from"),
        (
            lambda: Config(training=TrainingConfig(sample_length=0, sample_every=5)),
            "training.sample_every is for runs with samples .training.sample_length., got 5",
        ),
        (lambda: Config(parallel=ParallelConfig(start_timeout=5)), "parallel.start_timeout is for several processes"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def examples(**data):
    return Config(data=DataConfig(**data), objective=Classification())


def pairs(**data):
    return Config(data=DataConfig(**data), objective=Seq2Seq())


def test_what_another_value_makes_use_of_is_taken():
    block = BlockConfig(feed_forward=FeedForwardConfig(num_experts=4, experts_per_token=1))
    Config(model=ModelConfig(pattern=(block, BlockConfig())), objective=NextToken(router_z=0.5))
    Config(model=ModelConfig(positions=RotaryPositions(scaling="llama3", scaling_factor=8.0, original_length=64)))
    Config(data=DataConfig(source=("a", "b"), weights=(1.0, 2.0)))
    Config(training=TrainingConfig(init_from="run", init_from_step="best"))
    Config(parallel=ParallelConfig(coordinator="auto", start_timeout=5))
    # No samples is what a translator has.
    assert Config(objective=Seq2Seq(), training=TrainingConfig(sample_length=0)).training.sample_length == 0


@pytest.mark.parametrize("kind", OBJECTIVES.names)
def test_flags_agree_with_the_settings_that_a_run_uses(kind):
    config = Config(objective=OBJECTIVES.find(kind)())
    hidden = {flag.paths[0] for flag in all_flags(config).values()} - {flag.paths[0] for flag in flags(config).values()}
    assert {path.removesuffix(".kind") for path in hidden} == set(config.unused())


@pytest.mark.parametrize("setting", OF_SOME)
def test_every_setting_of_some_is_a_setting_that_some_use(setting):
    value_and_default(Config(), setting)
    uses = {kind: OBJECTIVES.find(kind).uses(setting) for kind in OBJECTIVES.names}
    assert any(uses.values()) and not all(uses.values())


@pytest.mark.parametrize("family", [FORMS, OBJECTIVES], ids=lambda family: family.section)
def test_what_a_kind_declares_is_a_setting_of_some(family):
    for kind in map(family.find, family.names):
        assert set(kind.settings) <= set(OF_SOME), kind


def test_another_kind_leaves_the_settings_of_the_file_that_it_does_not_use():
    lines = []
    before = Config(
        data=DataConfig(pack=False, stride=8, record_bytes=512), model=EXPERTS, objective=NextToken(router_z=0.5)
    )
    after = override(before, {"objective.kind": "classification", "data.label_key": "class"}, lines.append)
    assert after.data == dataclasses.replace(DataConfig(), label_key="class")
    assert lines == [
        "data.pack False -> True, it is for running text",
        "data.stride 8 -> 0, it is for the objective next_token",
        "data.record_bytes 512 -> 16384, it is for running text",
    ]
    with pytest.raises(UserError, match=r"data.stride is for the objective next_token, got 4"):
        override(before, {"objective.kind": "classification", "data.stride": 4})
    dense = override(before, {"model.pattern.0.feed_forward.num_experts": 0}, lines.append)
    assert dense.objective.router_z == 0.001
    assert lines[-1] == "objective.router_z 0.5 -> 0.001, it is for models with experts"


def test_the_command_line_shows_and_takes_what_a_run_uses(tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text("from transformer import Config\n\ndef get_config():\n    return Config()\n")
    with pytest.raises(SystemExit):
        main(["train", str(file), "--objective.kind", "seq2seq", "--help"])
    shown = capsys.readouterr().out
    assert "--data.source-key TEXT" in shown
    assert not any(name in shown for name in ("--data.label-key", "--model.pooling", "--training.sample-prompt"))
    with pytest.raises(SystemExit):
        main(["train", str(file), "--data.label-key", "x"])
    assert (
        "error: --data.label-key is for labelled texts, got 'x' for the next_token objective" in capsys.readouterr().err
    )
    # Of two flags the second makes use of the first.
    given = ["--objective.router-z", "0.5", "--model.feed-forward.num-experts", "4"]
    config = parse_config([str(file), *given], command="train")
    assert (config.objective.router_z, config.model.has_experts) == (0.5, True)


def test_evaluate_refuses_a_field_of_another_form(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 50)
    (tmp_path / "own.py").write_text(
        "from transformer import BlockConfig, AttentionConfig, Config, DataConfig, ModelConfig, TrainingConfig\n"
        "def get_config():\n"
        "    model = ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=1)),))\n"
        "    return Config(model=model, data=DataConfig(sequence_length=16, batch_size=2), "
        "training=TrainingConfig(steps=1, sample_length=0))\n"
    )
    places = ["--data.data-dir", str(tmp_path / "data"), "--workdir", str(tmp_path / "run"), "--parallel.data", "1"]
    main(["train", str(tmp_path / "own.py"), "--data.source", str(tmp_path / "text.txt"), *places])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run"), "--data.label-key", "x"])
    assert "--data.label-key is for labelled texts, got 'x' for the next_token objective" in capsys.readouterr().err
    main(["evaluate", str(tmp_path / "run")])
    assert json.loads(capsys.readouterr().out)["loss"] > 0
