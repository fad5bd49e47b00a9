"""A job made smaller by one change is a job: what the config said for the larger one follows, unless it is changed too."""

import dataclasses
import pathlib

import pytest

from transformer.cli.arguments import load_config
from transformer.cli.fields import all_flags, flags
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.config_io import RESUMABLE, resume_conflicts, to_dict
from transformer.data.tokenizers.bpe import BytePairs
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.optimizers.adamw import AdamW
from transformer.overrides import _RULES, override
from transformer.schedules.cosine import CosineSchedule
from transformer.types import UserError

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
# Settings that users reduce for a small machine or a short trial. Other fields may contradict the config.
SIZES = {
    "training.steps": (1, 3, 20),
    "data.batch_size": (1, 2, 3, 6),
    "data.sequence_length": (16, 24, 100),
    "model.max_length": (16, 24, 100),
    "model.attention.num_heads": (1, 2),
    "model.feed_forward.num_experts": (1,),
    "model.memory_length": (0, 8),
}
BIG = Config(
    model=ModelConfig(
        vocab_size=4096,
        pattern=(
            BlockConfig(
                AttentionConfig(num_heads=8, num_kv_heads=4),
                FeedForwardConfig(num_experts=8, experts_per_token=4),
                LayerNorm(use_bias=True),
            ),
        ),
    ),
    data=DataConfig(
        source=("a", "b"),
        weights=(1, 2),
        sequence_length=256,
        stride=128,
        batch_size=32,
        num_streams=8,
        tokenizer=BytePairs(size=4096),
    ),
    optimizer=AdamW(schedule=CosineSchedule(warmup_steps=100), accumulate_steps=8),
    training=TrainingConfig(steps=1000, profile_steps=(10, 20)),
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_made_smaller_by_one_change(path):
    config = load_config(str(path))
    table = all_flags(config)
    for name, values in SIZES.items():
        for value in values:
            flag = table[f"--{name.replace('_', '-')}"]
            if not (
                flag.default == 0 and name in ("model.memory_length", "model.feed_forward.num_experts")
            ):  # another job
                override(config, dict.fromkeys(flag.paths, value))
    if "--data.tokenizer.size" in table:
        for size in (257, 300):
            assert override(config, {"data.tokenizer.size": size}).data.tokenizer.size == size


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_whole_number_that_cannot_be_is_refused_by_its_own_name(path):
    """Every whole number of a config set to 1: it works, or the message names it; never another field alone."""
    config = load_config(str(path))
    for flag in flags(config).values():
        if flag.hint is int:
            assert refusal(config, dict.fromkeys(flag.paths, 1)) in ("", flag.paths[-1].rpartition(".")[2])


def refusal(config, changes):
    """The name of the changed field, if changes are refused by it; another message if they are refused otherwise."""
    try:
        override(config, changes)
    except UserError as error:
        name = next(iter(changes)).rpartition(".")[2]
        return name if name in str(error) else str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "followed"),
    [
        ({"training.steps": 20}, {"optimizer.schedule.warmup_steps": 2, "training.profile_steps": (10, 20)}),
        ({"training.steps": 15}, {"optimizer.schedule.warmup_steps": 1, "training.profile_steps": (10, 15)}),
        ({"training.steps": 5}, {"optimizer.schedule.warmup_steps": 0, "training.profile_steps": (0, 0)}),
        ({"training.steps": 100}, {"optimizer.schedule.warmup_steps": 100}),
        ({"optimizer.schedule.restarts": (500, 550)}, {"optimizer.schedule.warmup_steps": 50}),
        ({"data.sequence_length": 64}, {"data.stride": 64}),
        ({"data.sequence_length": 48}, {"data.stride": 48}),
        ({"data.sequence_length": 512}, {"data.stride": 128}),
        ({"model.max_length": 64}, {"data.sequence_length": 64, "data.stride": 64}),
        ({"data.batch_size": 6}, {"optimizer.accumulate_steps": 6, "data.num_streams": 0}),
        ({"data.batch_size": 4}, {"optimizer.accumulate_steps": 4, "data.num_streams": 8}),
        ({"data.source": ("c",)}, {"data.weights": ()}),
        ({"data.source": ("c", "d")}, {"data.weights": (1, 2)}),
        ({"data.tokenizer.size": 300}, {"model.vocab_size": 300}),
        ({"model.pattern.0.attention.num_heads": 2}, {"model.pattern.0.attention.num_kv_heads": 1}),
        ({"model.pattern.0.attention.num_heads": 4}, {"model.pattern.0.attention.num_kv_heads": 4}),
        ({"model.pattern.0.feed_forward.num_experts": 2}, {"model.pattern.0.feed_forward.experts_per_token": 2}),
    ],
    ids=lambda value: " ".join(f"{name}={new}" for name, new in value.items()) if isinstance(value, dict) else None,
)
def test_what_follows_and_how_far(changes, followed):
    assert_followed(BIG, changes, followed)


@pytest.mark.parametrize(
    ("before", "changes", "followed"),
    [
        ({"model.max_length": 256}, {"data.sequence_length": 512}, {"model.max_length": 512}),
        ({"model.max_length": 256}, {"data.sequence_length": 128}, {"model.max_length": 256}),
        ({"optimizer.schedule.restarts": (300, 600)}, {"training.steps": 500}, {"optimizer.schedule.restarts": (300,)}),
        (
            {"data.source": ("a",), "data.stride": 0},
            {"model.memory_length": 8},
            {"data.num_streams": 0},
        ),
        (
            {"objective.kind": "classification", "data.buckets": (32, 64, 256)},
            {"data.sequence_length": 64},
            {"data.buckets": (32, 64)},
        ),
        (
            {"objective.kind": "classification", "data.buckets": (32, 64, 256)},
            {"data.sequence_length": 512},
            {"data.buckets": (32, 64, 256, 512)},
        ),
        ({"model.positions.kind": "t5"}, {"model.positions.max_distance": 8}, {"model.positions.num_buckets": 12}),
        (
            {"model.pattern.0.attention.pattern.kind": "fixed", "model.pattern.0.attention.pattern.summary": 4},
            {"model.pattern.0.attention.pattern.stride": 2},
            {"model.pattern.0.attention.pattern.summary": 2},
        ),
    ],
)
def test_what_follows_in_another_job(before, changes, followed):
    assert_followed(override(BIG, before), changes, followed)


def assert_followed(before, changes, followed):
    lines: list[str] = []
    config = override(before, changes, lines.append)
    for path, value in {**changes, **followed}.items():
        assert all_flags(config)[f"--{path.replace('_', '-')}"].default == value
    # What it reports is what changed, and nothing else changed.
    assert {line.split()[0] for line in lines} == different(config, before) - set(changes)


def different(one, other):
    """The fields in which two configs differ."""
    one, other = ({flag.paths[0]: flag.default for flag in all_flags(config).values()} for config in (one, other))
    return {path for path in one if one[path] != other[path]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.steps": 20, "optimizer.schedule.warmup_steps": 50}, "warmup_steps must not exceed"),
        ({"data.sequence_length": 64, "objective.kind": "seq2seq", "data.buckets": (32, 128)}, "buckets must rise to"),
        ({"data.batch_size": 6, "optimizer.accumulate_steps": 4}, "accumulate_steps"),
        ({"optimizer.schedule.warmup_steps": 2000}, "warmup_steps must not exceed"),
        ({"data.sequence_length": 64, "data.stride": 128}, "stride must not exceed"),
        ({"training.stepz": 3}, "no field"),
        ({"trainin.steps": 3}, "no field"),
        ({"model.pattern.3.norm.kind": "rms_norm"}, "no field"),
    ],
)
def test_contradictions_among_the_changes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        override(BIG, changes)


def test_python_users_are_refused_as_before():
    with pytest.raises(UserError, match="warmup_steps must not exceed"):
        dataclasses.replace(BIG, training=TrainingConfig(steps=20))


def test_a_run_that_goes_on_keeps_what_it_may_not_change():
    """Whatever its steps are now, and also where the file says otherwise."""
    begun = override(BIG, {"training.steps": 20})
    assert begun.optimizer.schedule.warmup_steps == 2
    lines = []
    for changes in (
        {"training.steps": 40},
        {"training.steps": 1000},
        {},
        {"training.steps": 25, "optimizer.schedule.restarts": (20,)},
    ):
        longer = override(BIG, changes, lines.append, recorded=begun)
        assert resume_conflicts(begun, to_dict(longer)) == []
    assert set(lines) == {"optimizer.schedule.warmup_steps 100 -> 2, as in the run that goes on"}
    # What is given stays, to be refused.
    assert override(BIG, {"optimizer.schedule.warmup_steps": 3}, recorded=begun).optimizer.schedule.warmup_steps == 3
    # What follows a change that makes another run follows as ever.
    assert override(BIG, {"data.batch_size": 4}, recorded=begun).optimizer.accumulate_steps == 4


def test_a_run_that_goes_on_for_too_few_steps_is_refused_by_the_flag_to_give():
    begun = override(BIG, {"optimizer.schedule.warmup_steps": 20, "training.steps": 20})
    with pytest.raises(
        UserError, match=r"at least optimizer\.schedule\.warmup_steps=20, got 10; raise training\.steps"
    ):
        override(BIG, {"training.steps": 30, "optimizer.schedule.restarts": (20,)}, recorded=begun)


@pytest.mark.parametrize(
    "rule", [rule for rule in _RULES if not rule.field.startswith(RESUMABLE)], ids=lambda rule: rule.field
)
def test_no_rule_changes_what_a_run_may_not_because_of_what_it_may(rule):
    """Each rule follows fields of one sort: those that a run may change, or those that make it another."""
    assert len({after.startswith(RESUMABLE) for after in rule.after}) == 1
