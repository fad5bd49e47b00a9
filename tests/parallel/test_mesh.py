"""The mesh: sizes with one left open, devices in order, rows of processes, and errors that name what does not divide."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transformer.config import Config, DataConfig, ParallelConfig
from transformer.layers.runtime import Runtime
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.objectives.masked_lm import MaskedLM
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.zigzag import balanced_order
from transformer.optimizers.adamw import AdamW
from transformer.parallel.mesh import MeshRunner, batch_sharding, make_mesh, num_row_shards, process_rows
from transformer.parallel.rules import AXES, RULES, Sharding, tree_shardings
from transformer.parts import check_devices
from transformer.types import UserError


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, {}),
        ({"data": -1}, {"data": 8}),
        ({"data": -1, "tensor": 2}, {"data": 4, "tensor": 2}),
        ({"data": 2, "fsdp": -1, "context": 2}, {"data": 2, "fsdp": 2, "context": 2}),
        ({"dcn": 2, "data": 1, "fsdp": -1}, {"dcn": 2, "fsdp": 4}),
        ({"data": 1, "fsdp": 3}, {"fsdp": 3}),
    ],
)
def test_one_size_is_what_the_others_leave(sizes, expected):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == AXES
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == expected
    assert mesh.devices.ravel().tolist() == jax.devices()[: mesh.size]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, r"at most may be -1, got data, fsdp; set the others"),
        ({"data": -1, "tensor": 3}, r"must divide the 8 devices, got data=-1 x tensor=3, of which 3 are one part"),
        ({"data": 4, "tensor": 4}, r"must not exceed the 8 devices there are, got 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes)


def test_rows_are_spread_over_all_axes_that_do_not_share_them():
    mesh = make_mesh({"dcn": 2, "fsdp": 2, "tensor": 2})
    assert num_row_shards(mesh) == 4
    assert batch_sharding(mesh, 2).spec == PartitionSpec(("dcn", "data", "fsdp", "expert"), "context")


class Device(NamedTuple):
    number: int
    process_index: int


@pytest.mark.parametrize(
    ("sizes", "per_process", "expected"),
    [
        ({"data": 8}, 4, [(0, 2), (1, 2)]),
        ({"data": 4, "tensor": 2}, 4, [(0, 2), (1, 2)]),
        ({"data": 2, "tensor": 4}, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"data": 1, "tensor": 8}, 4, [(0, 1), (0, 1)]),
        ({"fsdp": 8}, 1, [(i, 8) for i in range(8)]),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(sizes, per_process, expected, monkeypatch):
    mesh = make_mesh(sizes)
    processes = {device: device.id // per_process for device in jax.devices()}

    class Sharding:
        spec = batch_sharding(mesh).spec

        def devices_indices_map(self, shape):
            places = batch_sharding(mesh).devices_indices_map(shape)
            return {Device(d.id, processes[d]): place for d, place in places.items()}

    monkeypatch.setattr("transformer.parallel.mesh.batch_sharding", lambda mesh: Sharding())
    assert [process_rows(mesh, process) for process in range(8 // per_process)] == expected


@pytest.mark.parametrize(
    ("sizes", "vocab_size", "message"),
    [
        ({"tensor": 2}, 17, r"'vocab' axis of every parameter, got 2 devices for 17 .*, or set model.vocab_size=18\."),
        (
            {"tensor": 4},
            16,
            r"parallel.tensor must divide the 'kv_heads' axis of every parameter, got 4 devices for 2 in decoder/",
        ),
        (
            {"fsdp": 8},
            16,
            r"parallel.fsdp must divide the 'embed' axis of every parameter, got 8 devices for 12 in decoder/",
        ),
    ],
)
def test_what_an_axis_does_not_divide_is_named(sizes, vocab_size, message):
    block = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4))
    config = ModelConfig(vocab_size=vocab_size, num_layers=1, embed_dim=12, pattern=(block,))
    shapes, axes = init_params(Decoder(config), None)
    with pytest.raises(UserError, match=message):
        tree_shardings(make_mesh(sizes), axes, shapes)


CONTEXT = {
    "parallel": ParallelConfig(data=1, context=4),
    "data": DataConfig(sequence_length=64, batch_size=8),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": MaskedLM()},
            "for the next_token objective, .* got the masked_lm objective",
        ),
        ({"data": DataConfig(sequence_length=60, batch_size=8)}, "divisible by twice parallel.context=4, got 60"),
        (
            {"model": ModelConfig(pattern=(BlockConfig(AttentionConfig(pattern=FixedPattern())),))},
            "dense attention .* got attention.pattern=fixed",
        ),
        ({"model": ModelConfig(pattern=(BlockConfig(AttentionConfig(dropout=0.1)),))}, "and attention.dropout=0"),
        ({"model": ModelConfig(dropout=0.1)}, "needs model.dropout=0"),
        (
            {"data": DataConfig(sequence_length=3000, batch_size=8)},
            "a multiple of 1024 with parallel.context=4, got 3000; the next one is 3072",
        ),
        (
            {"parallel": ParallelConfig(data=2, fsdp=2), "optimizer": AdamW(accumulate_steps=4)},
            r"divisible by devices x optimizer.accumulate_steps = 4 x 4, got 8",
        ),
        ({"parallel": ParallelConfig(fsdp=16)}, "must divide the 8 devices"),
    ],
)
def test_devices_that_do_not_fit_the_run_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_devices(Config(**{**CONTEXT, **changes}))


def test_devices_that_fit_are_accepted():
    check_devices(Config(**CONTEXT))
    # Devices along a tensor axis have the same rows.
    check_devices(Config(parallel=ParallelConfig(tensor=4), data=DataConfig(batch_size=2)))


def test_constraints_are_for_a_mesh_that_is_set():
    x = jnp.ones((8, 4, 6))

    def ask(x):
        return RULES.constrain(x * 2, "batch", "length", "hidden")

    assert RULES.sharded_axes() == {}
    assert "sharding_constraint" not in str(jax.make_jaxpr(ask)(x))
    with jax.set_mesh(make_mesh({"data": 1})):
        assert "sharding_constraint" not in str(jax.make_jaxpr(ask)(x))
    with jax.set_mesh(make_mesh({"data": 4, "tensor": 2})):
        assert RULES.sharded_axes() == {"data": 4, "tensor": 2}
        assert jax.jit(ask)(x).sharding.spec == PartitionSpec("data", None, "tensor")
        assert Sharding().sharded_axes() == {}
        assert Sharding().constrain(x, "batch", "length", "hidden") is x
    shard = jax.pmap(ask)(x[:, None])
    assert shard.shape == (8, 1, 4, 6)


def test_a_mesh_of_the_callers_changes_nothing():
    """Whatever its axes are called: the rules come with the runtime, as the trainer gives it."""
    config = ModelConfig(vocab_size=8, num_layers=1, embed_dim=16)
    tokens = jnp.zeros((8, 16), jnp.int32)
    positions = jnp.arange(16, dtype=jnp.int32)[None]
    params = Decoder(config).init(jax.random.key(0), tokens)

    def text(runtime):
        model = Decoder(config, runtime=runtime)
        return str(jax.make_jaxpr(lambda params: model.apply(params, tokens, positions_BT=positions))(params))

    with jax.set_mesh(make_mesh({"context": 4, "tensor": 2})):
        alone, spread = text(Runtime()), text(Runtime(sharding=RULES))
    for name in ("shard_map", "sharding_constraint"):
        assert name not in alone
        assert name in spread


def test_rows_are_dealt_to_the_ring_in_order():
    mesh = make_mesh({"data": 2, "context": 4})
    runner = MeshRunner(mesh, lambda s, b: (s, {}), lambda p, c, b: (c, {}), None, balanced_order)
    batch = {"inputs": np.arange(32).reshape(2, 16), "rows": np.arange(2)}
    placed = runner.place_batch(batch)
    np.testing.assert_array_equal(placed["inputs"], batch["inputs"][:, balanced_order(16, 4)])
    first = next(s for s in placed["inputs"].addressable_shards if s.device == jax.devices()[0])
    assert first.data.tolist() == [[0, 1, 14, 15]]
    assert placed["rows"].sharding.spec == PartitionSpec(("dcn", "data", "fsdp", "expert"))


class State(NamedTuple):
    params: object
    carry: object


def test_the_rows_of_a_carry_are_sharded_and_parameters_without_axes_are_whole():
    runner = MeshRunner(make_mesh({"data": 4, "tensor": 2}), lambda s, b: (s, {}), lambda p, c, b: (c, {}))
    state = State({"kernel": np.ones((8, 4))}, {"memory": np.arange(48).reshape(8, 2, 3)})
    placed = runner.place_state(state)
    assert placed.params["kernel"].sharding.is_fully_replicated
    assert [s.data.shape for s in placed.carry["memory"].addressable_shards] == [(2, 2, 3)] * 8
    assert runner.abstract_state(state).carry["memory"].sharding == placed.carry["memory"].sharding
    np.testing.assert_array_equal(placed.carry["memory"], state.carry["memory"])
