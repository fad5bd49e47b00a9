"""What a caller brings to `train` is used, recorded by name, and asked for again."""

import json

import jax
import numpy as np
import optax
import pytest

from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.next_token import NextToken
from transformer.optimizers.adamw import AdamW
from transformer.runs.given import describe
from transformer.runs.saved import load
from transformer.runs.train import train
from transformer.training.writers import read_jsonl
from transformer.types import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "text.txt"
    path.write_text("to be or not to be, that is the question. " * 100)
    return path


def config_of(text, workdir, optimizer=None, fsdp=1, **training):
    block = BlockConfig(AttentionConfig(num_heads=2))
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(block,)),
        data=DataConfig(
            source=(str(text),), data_dir=str(text.parent / "data"), sequence_length=16, batch_size=8, record_bytes=256
        ),
        optimizer=optimizer or AdamW(),
        parallel=ParallelConfig(data=1, fsdp=fsdp),
        training=TrainingConfig(**{"steps": 4, "log_every": 1, "sample_length": 0, **training}),
        workdir=str(workdir),
    )


def leaves(workdir):
    return [np.asarray(x) for x in jax.tree.leaves(load(workdir).params)]


def rows(workdir, split):
    return [row for row in read_jsonl(workdir / "metrics.jsonl") if row["split"] == split]


def test_a_transformation_replaces_the_configs_optimizer(text, tmp_path):
    """With a step of zero, parameters stay; a user-defined rate is not reported as the config's."""
    train(config_of(text, tmp_path / "still"), optimizer=optax.set_to_zero())
    train(config_of(text, tmp_path / "sgd"), optimizer=optax.sgd(0.1, momentum=0.9))
    first, moved = leaves(tmp_path / "still"), leaves(tmp_path / "sgd")
    train(config_of(text, tmp_path / "again", steps=2), optimizer=optax.set_to_zero())
    assert all(np.array_equal(a, b) for a, b in zip(first, leaves(tmp_path / "again"), strict=True))
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(first, moved, strict=True))
    assert all("learning_rate" not in row and row["grad_norm"] > 0 for row in rows(tmp_path / "sgd", "train"))


def test_it_resumes_to_the_bit_and_is_needed_again(text, tmp_path):
    def made():
        return optax.chain(optax.clip(1.0), optax.adam(1e-2))

    class Accident(Exception):
        pass

    def die(step, state, statistics):
        if step == 3:
            raise Accident

    train(config_of(text, tmp_path / "whole", checkpoint_every=2), optimizer=made())
    other = config_of(text, tmp_path / "other", checkpoint_every=2)
    with pytest.raises(Accident):
        train(other, optimizer=made(), hooks=(die,))
    recorded = json.loads((tmp_path / "other" / "given.json").read_text())
    assert recorded == {"optimizer": "optax.transforms._combining.chain.<locals>.update_fn"}
    assert recorded["optimizer"] == describe(made())
    with pytest.raises(
        UserError, match=r"optimizer it began with, .*other was made with optax\..*chain.*, got none; give train\("
    ):
        train(other)
    with pytest.raises(UserError, match=r"made with optax\..*, got optax\..*set_to_zero"):
        train(other, optimizer=optax.set_to_zero())
    train(other, optimizer=made())
    assert all(
        np.array_equal(a, b) for a, b in zip(leaves(tmp_path / "whole"), leaves(tmp_path / "other"), strict=True)
    )


def test_one_that_was_not_there_is_not_taken(text, tmp_path):
    train(config_of(text, tmp_path, steps=2))
    with pytest.raises(UserError, match=r"was made with none, got optax\..*; leave out optimizer="):
        train(config_of(text, tmp_path), optimizer=optax.sgd(0.1))


def test_groups_of_the_config_are_refused_beside_it(text, tmp_path):
    config = config_of(text, tmp_path, AdamW(parameter_groups=("token_embedding=0",)))
    with pytest.raises(UserError, match=r"one was given to train\(optimizer=.*; leave them out, and freeze with"):
        train(config, optimizer=optax.sgd(0.1))


@pytest.mark.parametrize("fsdp", [1, 2])
def test_evaluators_have_rows_and_whole_parameters(text, tmp_path, fsdp):
    seen = []

    def norm(params):
        assert all(x.is_fully_replicated for x in jax.tree.leaves(params))
        seen.append(float(optax.tree.norm(params)))
        return {"norm": seen[-1]}

    train(config_of(text, tmp_path, eval_every=2, fsdp=fsdp), evaluators={"weights": norm})
    assert [(row["step"], row["norm"]) for row in rows(tmp_path, "weights")] == [(2, seen[0]), (4, seen[1])]
    assert [row["step"] for row in rows(tmp_path, "validation")] == [2, 4]
    assert seen[-1] == pytest.approx(float(optax.tree.norm(load(tmp_path).params)), rel=1e-5)


def test_one_named_validation_chooses_the_best(text, tmp_path):
    losses = iter([1.0, 2.0])
    config = config_of(text, tmp_path, eval_every=2, checkpoint_every=2)
    reached = train(config, evaluators={"validation": lambda params: {"loss": next(losses)}})
    assert reached.metrics == {"loss": 2.0}
    assert load(tmp_path, step="best").step == 2


def test_no_evaluator_is_named_train(text, tmp_path):
    with pytest.raises(UserError, match="must have a name of its own, got train"):
        train(config_of(text, tmp_path), evaluators={"train": lambda params: {}})
    assert not list(tmp_path.iterdir()) or not (tmp_path / "config.json").exists()


class Callable:
    def __call__(self):
        return None


def test_objects_are_described_by_qualified_names():
    assert describe(describe) == "transformer.runs.given.describe"
    assert describe(Callable) == describe(Callable()) and describe(Callable).endswith(".Callable")
    assert "objectives.next_token.NextToken(label_smoothing=0.0, z_loss=0.5" in describe(NextToken(z_loss=0.5))
