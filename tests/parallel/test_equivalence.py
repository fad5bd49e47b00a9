"""A step on any mesh of devices equals the step of one device: losses, gradients and parameters to 1e-5."""

import functools
import itertools
import re
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from transformer.layers.runtime import Runtime
from transformer.layers.scan_params import loop_params, scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.objectives.next_token import NextToken
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.zigzag import balanced_order
from transformer.parallel.mesh import MeshRunner, make_mesh
from transformer.parallel.pmap import AXIS_NAME, PmapRunner
from transformer.parallel.rules import RULES
from transformer.training.state import create_state
from transformer.training.step import EvaluateStep, TrainStep
from transformer.types import Batch

ROWS, T, V = 32, 16, 16
LAYOUTS = {
    "single": {"data": 1},
    "pmap": {},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 1, "tensor": 2},
    "fsdp_tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data_context": {"data": 2, "context": 4},
    "slices": {"dcn": 2, "data": 2, "fsdp": 2},
}
EXPERT_LAYOUTS = {
    "expert": {"data": 2, "expert": 4},
    "expert_tensor": {"data": 2, "expert": 2, "tensor": 2},
    "expert_fsdp": {"data": 1, "fsdp": 2, "expert": 2, "context": 2},
}
FACTORS = list(itertools.product((False, True), ("none", "full"), (1, 4)))
# Each layout with two opposite choices of the other settings, in turn: every pair of choices occurs.
PAIRWISE = [
    (layout, FACTORS[i]) for number, layout in enumerate(LAYOUTS) for i in (number % 4, len(FACTORS) - 1 - number % 4)
]
ALL = list(itertools.product(LAYOUTS, FACTORS))
# The losses of routers are of a micro-batch, so that more of them are another objective.
EXPERT_FACTORS = [factors for factors in FACTORS if factors[2] == 1]
EXPERT_CASES = [("expert", EXPERT_FACTORS[0]), ("expert_tensor", EXPERT_FACTORS[3]), ("expert_fsdp", EXPERT_FACTORS[1])]


def tiny_config(block, scan_layers, remat, **others):
    return ModelConfig(
        vocab_size=V,
        max_length=T,
        num_layers=2,
        embed_dim=16,
        pattern=(block,),
        init_std=0.15,
        scan_layers=scan_layers,
        remat=remat,
        **others,
    )


@functools.cache
def make_model(scan_layers, remat, num_experts=0, fields=False):
    """A decoder; with `fields`, one that has what pretrained families add."""
    if fields:
        block = BlockConfig(
            AttentionConfig(
                num_heads=4,
                num_kv_heads=2,
                qk_norm=True,
                qk_norm_scope="all",
                query_scale=0.7,
                use_bias=True,
                out_bias=False,
            ),
            FeedForwardConfig(hidden_dim=16, gated=True),
            RMSNorm(unit_offset=True),
            parallel=True,
        )
        around = {"embedding_norm": True, "output_bias": True, "logits_scale": 0.5}
        return Decoder(tiny_config(block, scan_layers, remat, tie_embeddings=True, **around), Runtime(sharding=RULES))
    block = BlockConfig(
        AttentionConfig(num_heads=4, num_kv_heads=2, window=11),
        FeedForwardConfig(hidden_dim=16, gated=True, num_experts=num_experts),
        RMSNorm(),
    )
    return Decoder(tiny_config(block, scan_layers, remat, tie_embeddings=False), runtime=Runtime(sharding=RULES))


def make_batch(seed):
    """Packed rows: two documents, then padding, of lengths of their own."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (ROWS, T + 1)).astype(np.int32)
    first, both = rng.integers(1, T, (ROWS, 1)), rng.integers(2, T + 1, (ROWS, 1))
    places = np.arange(T)[None]
    segments = np.where(places < first, 1, 2) * (places < np.maximum(first, both))
    positions = np.where(places < first, places, places - first)
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=(segments > 0).astype(np.float32),
        segment_ids=segments.astype(np.int32),
        positions=positions.astype(np.int32),
    )


@functools.cache
def looped_params(num_experts, fields):
    """Initial parameters, on the host: a scanned model has the same, stacked."""
    return jax.device_get(init_params(make_model(False, "none", num_experts, fields), jax.random.key(0))[0])


def make_runner(layout, scan_layers=False, remat="none", accumulate_steps=1, num_experts=0, fields=False):
    """The runner and what makes its state; the momentum of nothing but the last gradient keeps that in the state."""
    model = make_model(scan_layers, remat, num_experts, fields)
    _, axes = init_params(model, None)
    optimizer = optax.sgd(0.1, momentum=1e-30)
    objective = NextToken(z_loss=1e-3).bind(model, SimpleNamespace(token_bytes=np.ones(V, np.int32)))
    axis_name = AXIS_NAME if layout == "pmap" else None
    step = TrainStep(
        objective, optimizer, lambda _: 0.1, accumulate_steps=accumulate_steps, ema_decay=0.9, axis_name=axis_name
    )
    evaluate = EvaluateStep(objective, axis_name=axis_name)

    def make_state(params):
        return create_state(params, optimizer, jax.random.key(1), ema=True)

    params = looped_params(num_experts, fields)
    params = jax.device_get(scan_params(params)) if scan_layers else params
    if layout == "pmap":
        runner = PmapRunner(-1, step, evaluate)
    else:
        mesh = make_mesh({**LAYOUTS, **EXPERT_LAYOUTS}[layout])
        context = mesh.shape["context"]
        order = balanced_order if context > 1 else None
        runner = MeshRunner(mesh, step, evaluate, axes, order)
    return runner, functools.partial(runner.init_state, make_state, params), make_state, params


@functools.cache
def trained(layout, scan_layers=False, remat="none", accumulate_steps=1, num_experts=0, fields=False):
    """Losses of three steps, and the state after them in the looped layout."""
    runner, init_state, _, _ = make_runner(layout, scan_layers, remat, accumulate_steps, num_experts, fields)
    state, losses = init_state(), []
    for seed in range(3):
        state, statistics = runner.step(state, runner.place_batch(make_batch(seed)))
        losses.append({name: float(value) for name, value in jax.device_get(statistics).items()})
    state = jax.device_get(runner.gather(runner.fetch_state(state))._replace(key=()))
    return losses, loop_params(state) if scan_layers else state


def assert_equal(found, expected, tolerance=1e-5):
    """Every array to a share of its own largest element."""

    def compare(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)} differs by {error:.1e}"

    jax.tree_util.tree_map_with_path(compare, found, expected)


def check(layout, factors, num_experts=0, fields=False):
    losses, state = trained(layout, *factors, num_experts, fields)
    expected_losses, expected_state = trained("single", num_experts=num_experts, fields=fields)
    assert_equal(losses, expected_losses)
    assert_equal(state.params, expected_state.params)
    assert_equal(state.ema_params, expected_state.ema_params)
    assert_equal(state.opt_state, expected_state.opt_state, 5e-5)  # of single gradients, which sums have not averaged
    assert losses[0]["loss"] != losses[2]["loss"]


@pytest.mark.parametrize(("layout", "factors"), PAIRWISE, ids=str)
def test_equals_one_device(layout, factors):
    check(layout, factors)


@pytest.mark.parametrize("layout", ["fsdp_tensor", "data_context"])
def test_fields_of_pretrained_families_equal_one_device(layout):
    check(layout, (layout == "fsdp_tensor", "none", 1), fields=True)


@pytest.mark.parametrize(("layout", "factors"), EXPERT_CASES, ids=str)
def test_experts_equal_one_device(layout, factors):
    check(layout, factors, num_experts=4)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("layout", "factors"),
    [case for case in itertools.product(EXPERT_LAYOUTS, EXPERT_FACTORS) if case not in EXPERT_CASES],
    ids=str,
)
def test_experts_equal_one_device_in_all_combinations(layout, factors):
    check(layout, factors, num_experts=4)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layout", "factors"), [case for case in ALL if case not in PAIRWISE], ids=str)
def test_equals_one_device_in_all_combinations(layout, factors):
    check(layout, factors)


def lowered(layout, **settings):
    runner, _, make_state, params = make_runner(layout, **settings)
    state = runner.abstract_state(jax.eval_shape(make_state, params))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch(0))
    return runner.lower(state, batch)


def collectives(layout, **settings):
    text = lowered(layout, **settings).compile().as_text()
    names = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
    return {name for name in names if re.search(rf"[ =]{name}(-start)?\(", text)}


def test_every_sharding_has_its_collectives_in_the_program():
    assert collectives("single") == set()
    assert collectives("data") == {"all-reduce"}
    assert "all-gather" in collectives("fsdp")
    assert "all-reduce" in collectives("tensor")
    assert "collective-permute" in collectives("data_context")
    assert {"all-gather", "all-reduce"} <= collectives("expert", num_experts=4)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp_tensor"])
def test_no_large_array_of_the_state_is_whole_on_a_device(layout):
    _, init_state, _, _ = make_runner(layout)
    state = init_state()
    large = [x for x in jax.tree.leaves((state.params, state.opt_state, state.ema_params)) if x.size >= 128]
    assert len(large) >= 3 * (2 * 6 + 2)
    for x in large:
        share = x.addressable_shards[0].data.size / x.size
        assert share <= 1 / 2, f"{x.shape} is held to {share:.0%} by a device"
    if layout == "fsdp":
        assert all(x.addressable_shards[0].data.size * 8 == x.size for x in large)


def test_state_made_on_a_mesh_agrees_with_one_device():
    model = make_model(True, "none")
    shapes, axes = init_params(model, None)

    def make_state():
        params, _ = init_params(model, jax.random.key(3))
        return create_state(params, optax.adam(0.1), jax.random.key(1), ema=True)

    runner = MeshRunner(make_mesh(LAYOUTS["fsdp_tensor"]), lambda s, b: (s, {}), lambda p, c, b: (c, {}), axes)
    state = runner.init_state(make_state)
    expected = make_state()
    assert jax.tree.map(lambda x: x.shape, state.params) == jax.tree.map(lambda x: x.shape, shapes)
    assert_equal(state.params, expected.params, 1e-6)
    # The step donates both, which one buffer would not allow.
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema_params), strict=True)
    for a, b in pairs:
        assert (
            a.addressable_shards[0].data.unsafe_buffer_pointer() != b.addressable_shards[0].data.unsafe_buffer_pointer()
        )
