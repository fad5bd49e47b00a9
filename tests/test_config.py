"""Configs refuse what cannot work, with the invariant, the value and the remedy, and survive JSON."""

import dataclasses
import json
import typing

import pytest

from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.config_io import from_dict, resume_conflicts, to_dict
from transformer.kinds import Kind
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POSITIONS
from transformer.objectives.classification import Classification
from transformer.objectives.masked_lm import MaskedLM
from transformer.objectives.next_token import NextToken
from transformer.objectives.span_corruption import SpanCorruption
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.positions.inherit import InheritPositions
from transformer.ops.positions.learned import LearnedPositions
from transformer.ops.positions.rotary import RotaryPositions
from transformer.ops.positions.t5 import T5Positions
from transformer.ops.positions.transformer_xl import TransformerXLPositions
from transformer.optimizer import OPTIMIZERS
from transformer.optimizers.adamw import AdamW
from transformer.overrides import override
from transformer.schedules.cosine import CosineSchedule
from transformer.types import UserError

ODD = (BlockConfig(AttentionConfig(num_heads=3)),)


def remembering(kind="rotary", **changes):
    return ModelConfig(memory_length=8, positions=POSITIONS.find(kind)(), **changes)


def with_memory(**data):
    return Config(model=remembering(), data=DataConfig(**data))


def own(positions):
    return (BlockConfig(own_positions=positions),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig(num_heads=0), "num_heads must be at least 1, got 0"),
        (lambda: AttentionConfig(num_heads=4, num_kv_heads=3), "num_kv_heads must divide num_heads=4, got 3"),
        (lambda: AttentionConfig(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
        (lambda: AttentionConfig(window=-1), "window must be at least 0, got -1"),
        (lambda: FeedForwardConfig(hidden_dim=-1), "hidden_dim must be at least 0, got -1"),
        (lambda: FeedForwardConfig(num_experts=-1), "num_experts must be at least 0, got -1"),
        (lambda: FeedForwardConfig(num_experts=4, experts_per_token=0), "experts_per_token must be at least 1, got 0"),
        (
            lambda: FeedForwardConfig(num_experts=1),
            "must not exceed num_experts=1, got 2; lower it, or set num_experts=0",
        ),
        (
            lambda: FeedForwardConfig(num_experts=4, use_bias=True),
            "is for one network, got num_experts=4; leave it out",
        ),
        (lambda: NextToken(load_balance=-1.0), "load_balance must be at least 0, got -1.0"),
        (lambda: NextToken(router_z=-1.0), "router_z must be at least 0, got -1.0"),
        (
            lambda: override(
                Config(), {"model.pattern.0.norm.kind": "rms_norm", "model.pattern.0.norm.use_bias": True}
            ),
            "norm.use_bias is a setting of layer_norm, model.pattern.0.norm.kind is rms_norm; leave it out",
        ),
        (lambda: LayerNorm(epsilon=0), "epsilon must be positive, got 0"),
        (lambda: RotaryPositions(theta=0), "theta must be positive, got 0"),
        (lambda: ModelConfig(embed_dim=130), "num_heads must divide ModelConfig.embed_dim=130, got 4"),
        (lambda: ModelConfig(embed_dim=12), "Rotary positions need an even head_dim, got 3"),
        (lambda: ModelConfig(pattern=()), "at least one BlockConfig"),
        (
            lambda: ModelConfig(num_layers=1, pattern=(BlockConfig(),) * 2),
            "must hold the 0 first .* pattern's 2, got 1",
        ),
        (lambda: ModelConfig(num_layers=3, first=(BlockConfig(),) * 3), "must hold the 3 first .* pattern's 1, got 3"),
        (lambda: ModelConfig(positions=InheritPositions()), "ModelConfig.positions must not be inherit"),
        (lambda: ModelConfig(pattern=own(T5Positions())), "share a table .* a block cannot have its own"),
        (lambda: ModelConfig(pattern=own(LearnedPositions())), "a block cannot have its own"),
        (lambda: ModelConfig(pattern=own(RotaryPositions(fraction=0.1))), "even head_dim, got 32 and fraction=0.1"),
        (lambda: RotaryPositions(fraction=0), "fraction must be above 0 and at most 1, got 0"),
        (
            lambda: ModelConfig(pattern=(BlockConfig(), BlockConfig(norm=LayerNorm(placement="post")))),
            "cannot mix post-norm blocks",
        ),
        (lambda: DataConfig(source=()), "at least one corpus"),
        (lambda: DataConfig(source=("a", "b"), weights=(1.0,)), r"one per source \(2\) or none, got 1"),
        (lambda: DataConfig(weights=(-1.0,)), "weights must be positive"),
        (lambda: DataConfig(validation_fraction=0.6, test_fraction=0.4), "leave something to train on"),
        (lambda: DataConfig(batch_size=12, num_streams=5), "divide batch_size=12 or be a multiple of it, got 5"),
        (lambda: with_memory(pack=False), "packed rows of one source .* data.pack=False, data.stride=0"),
        (lambda: with_memory(stride=8), "data.stride=8 and 1 sources; set data.pack=True, data.stride=0 and one"),
        (lambda: with_memory(source=("a", "b")), "data.stride=0 and 2 sources"),
        (lambda: with_memory(num_streams=4), "one stream for each of 16 rows, got data.num_streams=4; set"),
        (lambda: remembering("learned"), "with relative positions, got memory_length=8 and learned"),
        (
            lambda: Config(model=remembering(), objective=MaskedLM()),
            "model.memory_length is for the objective next_token, got 8 for the masked_lm objective; leave it out",
        ),
        (lambda: remembering(pattern=(BlockConfig(AttentionConfig(pattern=FixedPattern())),)), "needs dense attention"),
        (lambda: ModelConfig(embed_dim=15, positions=TransformerXLPositions(), pattern=ODD), "even, got 15"),
        (lambda: NextToken(label_smoothing=1.0), "label_smoothing must be at least 0 and below 1"),
        (lambda: Classification(token_dropout=1.0), "token_dropout must be at least 0 and below 1"),
        (
            lambda: override(Config(), {"objective.class_weights": "balanced"}),
            "objective.class_weights is a setting of classification, objective.kind is next_token; leave it out, or",
        ),
        (lambda: Classification(class_weights=()), "a positive number a class, got"),
        (lambda: Classification(class_weights=(1.0, 0.0)), "a positive number a class, got"),
        (
            lambda: Classification(class_weights=(1.0, float("nan"))),
            "must be a finite number of float32 .*got nan",
        ),
        (lambda: SpanCorruption(noise_density=1.0), "noise_density must be above 0 and below 1, got 1.0"),
        (lambda: SpanCorruption(mean_span_length=0.5), "mean_span_length must be at least 1, got 0.5"),
        (
            lambda: Config(objective=SpanCorruption(mean_span_length=1)),
            r"must fit in data.sequence_length=256, but 38 tokens in 38 spans give 257 and 77; .*or longer rows",
        ),
        (
            lambda: Config(objective=SpanCorruption(noise_density=0.8)),
            "but 205 tokens in 51 spans give 103 and 257; change objective.noise_density",
        ),
        (lambda: AdamW(learning_rate=0.0), "learning_rate must be positive, got 0.0"),
        (lambda: AdamW(parameter_groups=("x",)), "must be REGEX=SCALE with SCALE >= 0, got 'x'"),
        (lambda: AdamW(parameter_groups=("(=1",)), "must be REGEX=SCALE"),
        (lambda: AdamW(parameter_groups=("a=-1",)), "must be REGEX=SCALE"),
        (lambda: TrainingConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: ParallelConfig(data=-2), "must be at least 1, or -1 for the remaining devices, got {'data': -2"),
        (lambda: ParallelConfig(tensor=0), "must be at least 1, or -1 for the remaining devices"),
        (lambda: ParallelConfig(strategy="pmap", fsdp=2), r"data parallelism only, got \['fsdp'\]; set strategy=mesh"),
        (lambda: ParallelConfig(coordinator="host"), "coordinator must be HOST:PORT or auto .*got 'host'"),
        (lambda: ParallelConfig(coordinator="::1:1234"), "an IPv6 address in brackets.*got '::1:1234'"),
        (lambda: ParallelConfig(num_processes=2), "need parallel.coordinator=HOST:PORT, got 2 and -1"),
        (lambda: ParallelConfig(coordinator="a:1", num_processes=2, process_id=2), "below num_processes=2, got 2"),
        (lambda: TrainingConfig(profile_steps=(1, 4)), "start at step 2 or later .* got 1 4"),
        (lambda: TrainingConfig(steps=8, profile_steps=(5, 9)), "exceed the run's last step 8, got 5 9"),
        (
            lambda: Config(data=DataConfig(batch_size=10), optimizer=AdamW(accumulate_steps=4)),
            "divisible by optimizer.accumulate_steps=4, got 10",
        ),
        (lambda: Config(model=ModelConfig(max_length=8)), "max_length must be 0 or at least data.sequence_length=256"),
        (
            lambda: Config(optimizer=AdamW(schedule=CosineSchedule(warmup_steps=2000))),
            "must not exceed training.steps=1000, got 2000",
        ),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


CUSTOM = Config(
    model=ModelConfig(pattern=(BlockConfig(AttentionConfig(window=8)), BlockConfig())),
    data=DataConfig(source=("a", "b"), weights=(1.0, 2.0)),
    optimizer=AdamW(parameter_groups=("embedding=0",)),
)


WEIGHTED = Config(objective=Classification(class_weights=(1.0, 2.5)))


@pytest.mark.parametrize("config", [Config(), CUSTOM, WEIGHTED], ids=["default", "custom", "weighted"])
def test_json_round_trip(config):
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_fields_that_a_file_does_not_know_have_their_defaults():
    values = to_dict(CUSTOM)
    del values["model"]["memory_length"], values["objective"]["z_loss"]
    assert from_dict(Config, values) == CUSTOM


def test_unknown_field_in_json_is_named():
    values = to_dict(Config())
    values["model"]["depth"] = 3
    with pytest.raises(UserError, match="ModelConfig has no field depth; it has vocab_size"):
        from_dict(Config, values)


def test_values_of_another_type_in_json_are_refused():
    """Every field of every config, given each value that JSON can hold and the field cannot."""
    values, refused = to_dict(CUSTOM), 0

    def fields(kind, there):
        if issubclass(kind, Kind):
            kind = kind.family.find(there["kind"])
            yield kind.__name__, "kind", there
        hints = typing.get_type_hints(kind)
        for name in (field.name for field in dataclasses.fields(kind)):
            hint = hints[name]
            if dataclasses.is_dataclass(hint):
                yield from fields(hint, there[name])
            elif name == "pattern" and kind is ModelConfig:
                yield from fields(BlockConfig, there[name][0])
            yield kind.__name__, name, there

    for owner, name, there in fields(Config, values):
        before = there[name]
        for value in (None, True, 1, 1.5, "?", ["?"], [[1]], {"?": 1}, 10**400):
            there[name] = value
            try:  # a value that the field can have comes back as it is; anything else is refused, never another error
                assert to_dict(from_dict(Config, json.loads(json.dumps(values)))) == values, (owner, name, value)
            except UserError:
                refused += 1
        there[name] = before
    assert refused > 400


def test_configs_are_frozen_and_hashable():
    assert hash(CUSTOM) != hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        CUSTOM.workdir = "elsewhere"


def test_resume_may_change_length_but_not_the_model():
    old = CUSTOM
    longer = dataclasses.replace(CUSTOM, workdir="x", training=TrainingConfig(steps=5000, log_every=3))
    assert resume_conflicts(old, to_dict(longer)) == []
    block = BlockConfig(AttentionConfig(num_heads=8, window=8))
    other = dataclasses.replace(CUSTOM, model=dataclasses.replace(CUSTOM.model, pattern=(block, BlockConfig())))
    assert resume_conflicts(old, to_dict(other)) == ["model.pattern.0.attention.num_heads: 4 -> 8"]
    fewer = dataclasses.replace(other, model=dataclasses.replace(CUSTOM.model, pattern=(BlockConfig(),)))
    assert any("model.pattern.1" in line and "absent" in line for line in resume_conflicts(old, to_dict(fewer)))


@pytest.mark.parametrize(("name", "conflicts"), [("adamw", 0), ("muon", 0), ("adafactor", 1)])
def test_adafactor_does_not_change_from_a_loop_to_a_scan(name, conflicts):
    before = dataclasses.replace(CUSTOM, optimizer=OPTIMIZERS.find(name)())
    after = dataclasses.replace(
        before, model=dataclasses.replace(CUSTOM.model, scan_layers=not CUSTOM.model.scan_layers)
    )
    assert len(resume_conflicts(before, to_dict(after))) == conflicts


def test_parameter_groups_are_parsed():
    ((pattern, scale),) = AdamW(parameter_groups=("layers_[01]/.*=0.5",)).groups()
    assert pattern.search("layers_1/attention") and scale == 0.5
