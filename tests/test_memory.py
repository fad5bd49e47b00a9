"""Sizes that nothing holds are a short error before anything is traced or allocated, whichever field they come from."""

import dataclasses
import json
import math
import typing

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from transformer import memory
from transformer.config import Config, DataConfig
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.memory import check_batch, check_bytes, check_cache, check_model, check_params, device_bytes
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POSITIONS
from transformer.objective import OBJECTIVES
from transformer.ops.chunks import sum_over_chunks
from transformer.ops.positions.t5 import T5Positions
from transformer.ops.positions.transformer_xl import TransformerXLPositions
from transformer.overrides import override
from transformer.parts import Steps, count_parameters, initialize, resolve
from transformer.training import checkpoint, manifest
from transformer.training.checkpoint import find_checkpoint, load_params
from transformer.training.out_of_memory import activation_bytes
from transformer.types import UserError

BLOCK = BlockConfig(AttentionConfig(num_heads=2, head_dim=4), FeedForwardConfig(num_experts=2))
SMALL = Config(
    model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BLOCK,)), data=DataConfig(sequence_length=8, batch_size=8)
)
XL = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, positions=TransformerXLPositions()))
XL = override(XL, {"model.memory_length": 8})
T5 = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, positions=T5Positions()))
ROOM = 10**9  # of the machine and of the device, here


def integer_paths(kind, path=()):
    """The path of every integer field, in tuples too, of a config and the configs in it."""
    hints = typing.get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind) if field.name != "first"):  # blocks as of the pattern
        hint = hints[name]
        kinds = [hint, *typing.get_args(hint)]
        nested = next((k for k in kinds if dataclasses.is_dataclass(k)), None)
        if nested:
            yield from integer_paths(nested, (*path, name))
        elif int in kinds:
            yield *path, name


def changed(config, path, value):
    """The config with another value, of the right form, at a path."""
    name, *rest = path
    old = getattr(config, name)
    if isinstance(old, tuple) and rest:
        new = (changed(old[0], rest, value),)
    elif rest:
        new = changed(old, rest, value)
    else:
        new = tuple(value for _ in old) or (value,) if isinstance(old, tuple) else value
    return dataclasses.replace(config, **{name: new})


PATHS = list(integer_paths(Config))


@pytest.fixture(autouse=True)
def room(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: ROOM)


def test_the_fields_are_found():
    assert {("model", "num_layers"), ("model", "pattern", "feed_forward", "num_experts"), ("data", "buckets")} <= set(
        PATHS
    )
    assert len(PATHS) >= 43


def refusal(base, path, value):
    """The error message, or else the config."""
    try:
        config = resolve(changed(base, path, value), ByteTokenizer())
        check_model(config.model)
        check_batch(config)
        check_params(config)
    except UserError as error:
        return str(error), None
    return "", config


@pytest.mark.parametrize("value", [10**9, 10**12])
@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_field_is_refused_or_harmless(path, value):
    """Where it is taken, what a run then holds is no larger: shapes of the state and of a batch."""
    base = T5 if path[:2] == ("model", "positions") else XL if path[-1] == "memory_length" else SMALL
    message, config = refusal(base, path, value)
    if message:
        assert len(message) < 500
        assert path[-1] in message, "it does not name the field"
        return
    assert value == 10**9 or path == ("data", "shuffle_seed"), "no integer of a config needs 64 bits, but a hashed seed"
    if path[0] == "parallel":
        return  # devices that are not there, which making the mesh refuses
    rows, length = config.data.batch_size, config.data.sequence_length
    assert rows * length < 1000
    if path[0] in ("model", "optimizer"):
        steps = Steps(config, ByteTokenizer())
        assert device_bytes(steps.state) < 10**6


@pytest.mark.parametrize("kind", ["next_token", "masked_lm", "seq2seq"])
@pytest.mark.parametrize("positions", ["rotary", "learned", "t5"])
def test_parameters_by_arithmetic_agree_with_the_model(kind, positions):
    """At most as many, so that what fits is never refused; all but norms and biases, so that little is missed."""
    config = ModelConfig(
        vocab_size=300,
        max_length=64,
        num_layers=4,
        embed_dim=32,
        pattern=(BLOCK, BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(50, gated=True))),
        positions=POSITIONS.find(positions)(),
        tie_embeddings=kind != "next_token",
    )
    objective = OBJECTIVES.find(kind)()
    found = memory.num_parameters(config, objective.num_stacks)
    exact = count_parameters(initialize(objective, objective.make_model(config), None)[0])
    assert 0.97 * exact < found <= exact


@pytest.mark.parametrize("layers", [2, 7])
def test_two_depths_by_arithmetic(layers):
    config = ModelConfig(vocab_size=300, max_length=256, num_layers=4, decoder_layers=layers, embed_dim=64)
    objective = OBJECTIVES.find("seq2seq")()
    exact = count_parameters(initialize(objective, objective.make_model(config), None)[0])
    assert 0.97 * exact < memory.num_parameters(config, 2) <= exact
    with pytest.raises(UserError, match=r"traced one by one, got 2,000; .* smaller model.decoder_layers"):
        check_model(ModelConfig(decoder_layers=2000), 2)
    check_model(ModelConfig(decoder_layers=2000))
    run = Config(model=config, objective=objective)
    alike = dataclasses.replace(run, model=dataclasses.replace(config, decoder_layers=0))
    assert activation_bytes(run) / activation_bytes(alike) == pytest.approx((4 + layers) / (4 + 4))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            ModelConfig(num_layers=10**9),
            "traced one by one, got 1,000,000,000; set model.scan_layers=True, or a smaller",
        ),
        (
            ModelConfig(num_layers=10**9, scan_layers=True),
            "at least 7.9e.14 bytes; this process has|at most 1e.14",
        ),
        (
            ModelConfig(vocab_size=2**31 - 1, embed_dim=2**20),
            "at most 1e.14 parameters, got 2.3e.15 .model.vocab_size=2,147,",
        ),
        (ModelConfig(vocab_size=10**8), r"model.num_layers=4, model.embed_dim=128.*takes at least 51.2 GB"),
    ],
)
def test_a_model_too_large_is_named(model, message):
    with pytest.raises(UserError, match=message):
        check_params(Config(model=model))


def test_a_model_of_70_billion_parameters_may_be_planned():
    block = BlockConfig(AttentionConfig(num_heads=64, num_kv_heads=8), FeedForwardConfig(28672, gated=True))
    check_model(ModelConfig(vocab_size=128_256, num_layers=80, embed_dim=8192, pattern=(block,)))


def test_a_cache_too_large_names_the_flag():
    with pytest.raises(UserError, match=r"8 rows of 1,000,000,000 tokens.*--max-new-tokens"):
        check_cache(SMALL.model, 8, 10**9)
    with pytest.raises(UserError, match=r"8 rows of 1,000,000,000 tokens.*\(--max-new-tokens, --beams\)"):
        check_cache(SMALL.model, 8, 10**9, num_beams=4)
    check_cache(SMALL.model, 8, 1000)


def test_a_step_shares_its_state_among_devices():
    config = dataclasses.replace(resolve(SMALL, ByteTokenizer()), parallel=dataclasses.replace(SMALL.parallel, fsdp=8))
    state = Steps(config, ByteTokenizer()).state
    whole = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves((state.params, state.opt_state)))
    assert device_bytes(state) < 0.25 * whole
    memory.check_state(state, 8)
    with pytest.raises(UserError, match=r"parallel\.fsdp"):
        memory.check_state(state, 10**9)


def test_the_machine_has_memory(monkeypatch):
    monkeypatch.undo()
    assert 10**8 < memory.host_memory() < 10**14
    check_bytes(10**6, memory.device_memory(), "a megabyte", "")


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.undo()
    whole, limit = memory.host_memory(), tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUPS", (str(limit), str(tmp_path / "absent")))
    for text, expected in (("1000000", 10**6), ("max", None)):
        limit.write_text(f"{text}\n")
        assert memory.host_memory() == expected or (expected is None and memory.host_memory() >= whole)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"params/a": "float32[1000000,1000000]"}, "takes at least 4,000.0 GB"),
        ({"params/a": "float32[1e9]"}, r"params/a|a has 'float32\[1e9\]'|types and shapes"),
        ({"params/a": "object[3]"}, "types and shapes"),
        ({"params/a": "float32[2]", "params/a/b": "float32[2]"}, "below another array"),
    ],
)
def test_a_checkpoint_that_describes_too_much_is_refused(arrays, message, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "host_memory", lambda: ROOM)
    step = tmp_path / "3"
    step.mkdir()
    (step / "checkpoint.json").write_text(
        json.dumps({"format": checkpoint.FORMAT, "step": 3, "arrays": arrays, "loop": {}})
    )
    manifest.write_manifest(epath.Path(step))
    with pytest.raises(UserError, match=message):
        load_params(find_checkpoint(tmp_path))


def test_more_chunks_than_tokens_are_one_a_token():
    hidden, targets = jnp.ones((1, 3, 2)), jnp.ones((1, 3))

    def sums_of(params, hidden_BTD, targets_BT):
        return jnp.sum(hidden_BTD) * params + jnp.sum(targets_BT), {}

    def total():
        return sum_over_chunks(sums_of, jnp.float32(2), hidden, (targets,), 10**9)[0]

    assert total() == 15
    assert "length=3" in str(jax.make_jaxpr(total)())
