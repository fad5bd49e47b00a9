"""What is read from compiled programs and traced ones is what was put into them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from transformer.config import Config, DataConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.parallel.mesh import make_mesh
from transformer.parts import StandIn, Steps
from transformer.planning.program import Collective, read_program
from transformer.training.flops import traced_flops
from transformer.types import Batch

LOOP = """HloModule m

%body.1 (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %gathered = bf16[32,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %part = bf16[8,4]{1,0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%i, %part)
}

%all-reduce-scatter.1 (input: bf16[32,4]) -> bf16[8,4] {
  %input = bf16[32,4]{1,0} parameter(0)
  %sum = bf16[32,4]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice = bf16[8,4]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={8,4}
}

%condition.1 (q: (s32[], bf16[8,4])) -> pred[] {
  %q = (s32[], bf16[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[8,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[8,4]{1,0}) while(%init), condition=%condition.1, body=%body.1
  %out = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
  %both = bf16[8,4]{1,0} all-reduce(%out), channel_id=3, replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c':(1)2}, to_apply=%add
  %sent = bf16[8,4]{1,0} collective-permute(%both), channel_id=4, source_target_pairs={{0,1},{1,2}}
  ROOT %kernel = bf16[8,4]{1,0} custom-call(%sent), custom_call_target="tpu_custom_call"
}
"""


def test_collectives_count_as_often_as_their_loop_runs():
    program = read_program(LOOP)
    gather, scatter, both, sent = sorted(program.collectives, key=lambda c: (-c.runs, c.kind))
    assert gather == Collective("all-gather", 32 * 4 * 2, 4, (0, 2, 4, 6), 12)
    assert scatter == Collective("reduce-scatter", 32 * 4 * 2, 4, (0, 2, 4, 6), 12)
    assert both == Collective("all-reduce", 64, 4, (0, 1, 4, 5), 1)
    assert sent == Collective("collective-permute", 64, 2, (0, 1), 1)
    assert gather.wire_bytes == 12 * 256 * 3 / 4
    assert scatter.wire_bytes == gather.wire_bytes
    assert both.wire_bytes == 2 * 64 * 3 / 4
    assert sent.wire_bytes == 64
    assert sent.wire_bytes == 64
    assert program.kernels == {"tpu_custom_call": 1}


BESIDE = """HloModule m

%start.1 (x: bf16[8,4]) -> bf16[32,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  ROOT %g = bf16[32,4]{1,0} all-gather(%x), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_collective_fusion.1 (x.1: bf16[8,4]) -> bf16[32,4] {
  %x.1 = bf16[8,4]{1,0} parameter(0)
  ROOT %g.1 = bf16[32,4]{1,0} all-gather(%x.1), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}
}

%done.1 (x.2: bf16[8,4]) -> bf16[32,4] {
  %x.2 = bf16[8,4]{1,0} parameter(0)
  ROOT %g.2 = bf16[32,4]{1,0} all-gather(%x.2), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: bf16[8,4]) -> bf16[32,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %started = bf16[32,4]{1,0} fusion(%a), kind=kCustom, calls=%start.1
  %beside = bf16[32,4]{1,0} fusion(%a), kind=kCustom, calls=%async_collective_fusion.1
  %other = bf16[32,4]{1,0} all-gather(%a), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %done = bf16[32,4]{1,0} fusion(%a), kind=kCustom, calls=%done.1
}
"""


def test_a_collective_beside_other_work_counts_once():
    assert read_program(BESIDE).collectives == [Collective("all-gather", 256, 4, (0, 1, 2, 3), 1)] * 2


def test_what_a_host_sends_goes_to_other_slices():
    text = """ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %token = token[] after-all()
  %out = (bf16[8,4]{1,0}, u32[], token[]) send(%a, %token), channel_id=1, is_host_transfer=true
  %other = (bf16[8,4]{1,0}, u32[], token[]) send(%a, %token), channel_id=2
}
"""
    (sent,) = read_program(text).collectives
    assert sent == Collective("send", 64, 2, (), 1)
    assert sent.wire_bytes == 64


DEPTH, ROWS, WIDTH = 5, 64, 32


def chain(matrices, x):
    def body(x, matrix):
        return jnp.tanh(x @ matrix), None

    return jnp.sum(jax.lax.scan(body, x, matrices)[0])


SHAPES = (jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), jnp.float32), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))
PRODUCTS = 2 * ROWS * WIDTH * WIDTH * DEPTH


def test_a_compiled_program_has_the_products_and_gathers_of_its_loops():
    mesh = make_mesh({"fsdp": 8})
    shardings = [NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec("fsdp"))]
    program = read_program(jax.jit(chain, in_shardings=shardings).lower(*SHAPES).compile().as_text())
    assert program.flops == PRODUCTS / 8
    gathers = [c for c in program.collectives if c.kind == "all-gather"]
    assert sum(c.bytes * c.runs for c in gathers) == DEPTH * WIDTH * WIDTH * 4
    assert {c.group for c in gathers} == {8}
    assert program.traffic_bytes < 50 * 4 * DEPTH * (WIDTH * WIDTH + ROWS * WIDTH)


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (chain, 1),
        (jax.grad(chain, argnums=(0, 1)), 3),
        (jax.grad(jax.checkpoint(chain), argnums=(0, 1)), 4),
        (lambda matrices, x: jax.lax.cond(jnp.sum(x) > 0, chain, lambda *_: 0.0, matrices, x), 1),
    ],
)
def test_traced_products_count_with_their_loops_and_recomputation(function, times):
    assert traced_flops(function, *SHAPES) == times * PRODUCTS


def test_every_device_of_a_shard_map_counts():
    mesh = make_mesh({"data": 8})
    rows = PartitionSpec("data")
    function = jax.shard_map(
        lambda a, b: chain(a, b)[None], mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
    )
    assert traced_flops(function, *SHAPES) == PRODUCTS


def test_experts_over_devices_count_once():
    mesh = make_mesh({"data": 2, "expert": 4})
    rows = PartitionSpec("data")

    def work(matrices, x):
        return jax.lax.ragged_dot(x, matrices, jnp.full(DEPTH, x.shape[0] // DEPTH, jnp.int32))

    function = jax.shard_map(work, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    assert traced_flops(function, *SHAPES) == PRODUCTS / DEPTH


def test_a_combined_gather_counts_all_its_results():
    line = (
        "  %g = ((bf16[4,2]{1,0}, f32[8]{0}), (bf16[16,2]{1,0}, f32[32]{0})) all-gather-start(%a, %b), "
        "replica_groups={{0,1,2,3}}, dimensions={0}"
    )
    operands = "  %a = bf16[4,2] parameter(0)\n  %b = f32[8] parameter(1)\n"
    text = f"ENTRY %main (a: bf16[4,2], b: f32[8]) -> f32[] {{\n{operands}{line}\n}}"
    (gather,) = read_program(text).collectives
    assert gather.bytes == 16 * 2 * 2 + 32 * 4


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # [4, 32, 64] times [64, 2, 8]: two heads, each met once as the window moves over what is padded.
        (
            "f32[4,32,2,8] convolution(%x1, %y), window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            4 * 32 * 64 * 2 * 8,
        ),
        # The sum over both heads of [4, 32, 8] times [8, 64].
        ("f32[4,32,64,1] convolution(%heads, %y), window={size=1x2}, dim_labels=0b1f_o1i0->0bf1", 4 * 32 * 64 * 2 * 8),
        # A batch of four products of [32, 64] and [64, 8].
        (
            "f32[4,32,8] convolution(%x, %z), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            4 * 32 * 64 * 8,
        ),
        # The sum of four products.
        ("f32[1,32,8] convolution(%x, %z), window={size=4}, dim_labels=0bf_0io->0bf", 4 * 32 * 64 * 8),
    ],
)
def test_products_written_as_convolutions(line, flops):
    shapes = {"x": "4,32,64", "x1": "4,32,64,1", "y": "64,2,8,1", "z": "4,64,8", "heads": "4,32,2,8"}
    operands = "".join(f"  %{name} = f32[{shape}] parameter({i})\n" for i, (name, shape) in enumerate(shapes.items()))
    assert read_program(f"ENTRY %main (x: f32[4,32,64]) -> f32[] {{\n{operands}  %c = {line}\n}}").flops == 2 * flops


@functools.cache
def steps_of(num_layers=2, scan_layers=True, window=0, remat="none", implementation="xla"):
    block = BlockConfig(
        AttentionConfig(num_heads=2, window=window, implementation=implementation), FeedForwardConfig(gated=True)
    )
    config = Config(
        model=ModelConfig(
            vocab_size=64,
            max_length=32,
            num_layers=num_layers,
            embed_dim=16,
            pattern=(block,),
            scan_layers=scan_layers,
            remat=remat,
        ),
        data=DataConfig(sequence_length=32, batch_size=8),
    )
    return Steps(config, StandIn(64), make_mesh(1))


def shapes(length=32):
    tokens = jax.ShapeDtypeStruct((8, length), np.int32)
    return Batch(tokens, tokens, jax.ShapeDtypeStruct((8, length), np.float32), tokens, tokens)


def test_products_of_the_step_agree_with_the_count():
    steps = steps_of()
    assert traced_flops(steps.train_step, steps.state, shapes()) == steps.parts.count_step(shapes()).products


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("implementation", ["blockwise", "splash", "auto"])
def test_what_is_traced_leaves_attention_out_however_it_is_done(implementation, remat):
    def traced(implementation):
        steps = steps_of(remat=remat, implementation=implementation)
        return traced_flops(steps.train_step, steps.state, shapes(512))

    assert traced(implementation) == traced("xla")


def test_a_scanned_program_does_not_grow_with_its_depth():
    def size(num_layers):
        steps = steps_of(num_layers=num_layers, remat="full")
        return len(steps.runner.lower(steps.state, shapes()).as_text())

    assert size(64) <= 1.1 * size(4)
