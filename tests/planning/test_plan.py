"""Plans for TPUs that are not there; skipped where their compiler is not installed."""

import importlib.util
import itertools
import json
import math
import types

import jax
import pytest
from jax.experimental import topologies

from transformer.cli import plan as command
from transformer.cli.arguments import parse_config
from transformer.cli.options import OPTIONS
from transformer.parallel.mesh import make_mesh
from transformer.parts import StandIn, Steps, count_parameters
from transformer.planning.chips import CHIPS, Topology, find_topology
from transformer.planning.plan import _links, _memory_error, _seconds, least_network_bytes
from transformer.planning.program import Collective
from transformer.planning.search import candidates, search
from transformer.types import UserError

CONFIG = "configs/gpt2_124m.py:debug"
PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[plan]"'
)


@pytest.fixture(autouse=True)
def at_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


def plan(arguments):
    """The command, without what `run` does about errors."""
    command.main(*OPTIONS["plan"].parse(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG], "plan needs --topology NAME, such as v5e:4x4"),
        ([CONFIG, "--topology", "v9:2x2"], "KIND:SHAPE with a kind of v4, v5e, .*; got 'v9:2x2'"),
        ([CONFIG, "--topology", "v5e"], "got 'v5e'"),
        ([CONFIG, "--topology=v5e"], "got 'v5e'"),
        ([CONFIG, "--topology", "h100:2x2"], "The shape of h100 is a number of devices, got '2x2'"),
        ([CONFIG, "--topology", "v5e:2x2", "--decode", "4"], "--decode takes 2 values, got 4"),
        ([CONFIG, "--topology", "v5e:2x2", "--decode", "4", "0"], "two positive numbers, got 4 0"),
        ([CONFIG, "--topology", "v5e:2x2", "--decode", "4", "8", "--search"], "leave out --decode"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        plan(arguments)


def test_every_chip_has_a_peak():
    assert all(chip.peak_flops > 1e14 for chip in CHIPS.values())


@pytest.mark.parametrize(
    ("name", "slices", "asked"),
    [
        ("v4:2x2x2", 1, {"platform": "tpu", "topology_name": "v4:2x2x2", "chip_config_name": "megacore"}),
        ("v6e-256", 1, {"platform": "tpu", "topology_name": "v6e:16x16"}),
        ("v5e:1x1", 1, {"platform": "tpu", "topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}),
        ("v5p:1x1x2", 1, {"platform": "tpu", "topology_name": "v5p:1x1x2", "chips_per_host_bounds": (1, 1, 2)}),
        ("v5p:4x4x4", 2, {"platform": "tpu", "topology_name": "v5p:4x4x4", "num_slices": 2}),
        (
            "h100:8",
            1,
            {"platform": "cuda", "topology_name": "h100", "topology": "1x1x8", "target_config": "NVIDIA H100"},
        ),
    ],
)
def test_a_chip_names_the_request_to_its_compiler(name, slices, asked, monkeypatch):
    found = {}

    def describe(**given):
        found.update(given)
        return topologies.TopologyDescription(devices=[])

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", describe)
    find_topology(name, slices)
    assert asked.pop("target_config", "") in found.pop("target_config", "")
    assert found == asked


@pytest.mark.parametrize(
    ("name", "package"), [("v4:2x2x1", "libtpu"), ("h100:8", r"CUDA plugin \(pip install 'jax\[cuda12\]'\)")]
)
def test_a_chip_says_what_its_compiler_is_in(name, package, monkeypatch):
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lambda **_: 1 / 0)
    with pytest.raises(UserError, match=f"needs the compiler in .*{package}.*, or has no such shape: division by zero"):
        find_topology(name)


@pytest.mark.parametrize(
    ("kind", "group", "devices", "speed"),
    [
        ("all-reduce", 4, (0, 1, 2, 3), 2 * 0.75 / 2 / 4.5e10),  # a square: by a link along each side
        ("all-gather", 4, (0, 1, 2, 3), 0.75 / 2 / 4.5e10),
        ("collective-permute", 2, (0, 3), 1 / 4.5e10),  # by one way
        ("send", 2, (), 1 / 3.1e9),
        ("all-gather", 2, (0, 4), 0.5 / 3.1e9),  # of another slice
    ],
)
def test_a_collective_takes_the_time_of_its_links(kind, group, devices, speed):
    places = [types.SimpleNamespace(coords=(number % 2, number // 2 % 2, 0)) for number in range(8)]
    topology = Topology("none", CHIPS["v5e"], places)
    collective = Collective(kind, 1e9, group, devices, 1)
    assert _seconds(collective, topology, places, 2) == pytest.approx(1e9 * speed)
    switched = Topology("none", CHIPS["h100"], places)
    inside = 5e10 if kind == "send" else 4.5e11
    assert _seconds(collective, switched, places, 1) == pytest.approx(collective.wire_bytes / inside)


def planned(capsys, *arguments, code=None):
    if code is None:
        plan([CONFIG, "--topology", "v5e:2x2", "--model.vocab-size", "512", "--json", *arguments])
    else:
        with pytest.raises(SystemExit) as exit_info:
            plan([CONFIG, "--topology", "v5e:2x2", "--model.vocab-size", "512", "--json", *arguments])
        assert exit_info.value.code == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("group", "sides", "links"),
    [
        ([(x, 0) for x in range(16)], (16, 16), 2),  # a closed ring
        ([(x, 0) for x in range(8)], (16, 16), 1),  # half of it
        ([(x, y) for x in range(4) for y in range(4)], (4, 4), 2),  # a corner has a link along each side
        ([(x, y) for x in range(16) for y in range(2)], (16, 16), 3),
        ([(0, 0, z) for z in range(4)], (4, 4, 8), 1),
        ([(0, 0, z) for z in range(8)], (4, 4, 8), 2),
        ([(0, 0, z) for z in range(2)], (2, 2, 2), 1),
    ],
)
def test_links_are_those_that_a_group_spans(group, sides, links):
    everything = list(itertools.product(*(range(side) for side in sides)))
    assert _links(group, everything, len(sides)) == links


@pytest.mark.parametrize(
    "message",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 25.96G of 15.75G hbm.",
        "E1000: CompileTimeHbmOom: total memory required for HLO temporaries (25.96G) exceeds available HBM (15.75G)",
    ],
)
def test_what_a_compiler_says_of_memory_is_understood(message):
    assert _memory_error(message) == (25.96 * 2**30, 15.75 * 2**30)


def test_the_least_to_send_is_of_parts_where_they_are_shared():
    config = get_config_of(8, "--parallel.data", "4", "--parallel.fsdp", "2")
    mesh = make_mesh(config.parallel.sizes)
    steps = Steps(config, StandIn(512), mesh)
    bytes_of = 4 * count_parameters(steps.state.params)
    whole = 4 * sum(x.size for x in jax.tree.leaves(steps.state.params) if x.sharding.is_fully_replicated)
    shared = bytes_of - whole
    expected = 3 * shared / 2 + 2 * shared / 2 * 3 / 4 + 2 * whole * (3 / 4 + 1 / 2)
    assert least_network_bytes(config, steps, dict(mesh.shape)) == pytest.approx(expected)


def get_config_of(rows, *arguments):
    return parse_config(
        [CONFIG, "--model.vocab-size", "512", "--data.batch-size", str(rows), *arguments], command="transformer plan"
    )


def test_a_search_tries_experts_and_leaves_slices_alone():
    config = parse_config(
        [
            "configs/moe_8x7b.py:debug",
            "--model.vocab-size",
            "512",
            "--parallel.dcn",
            "2",
            "--data.sequence-length",
            "31",
        ],
        command="transformer plan",
    )
    topology = Topology("none", CHIPS["v5e"], [None] * 8)
    found = candidates(config, topology)
    assert {c.config.parallel.expert for c in found} == {1, 2, 4}
    assert all(c.config.parallel.context == 1 for c in found), "31 positions cannot be divided"
    for candidate in found:
        sizes = candidate.config.parallel.sizes
        assert math.prod(sizes.values()) == 8 and sizes["dcn"] == 2
    with pytest.raises(UserError, match="No mesh of 64 devices divides the 7 rows"):
        search(get_config_of(7), Topology("none", CHIPS["v5e"], [None] * 64))


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1"])
def test_one_chip_is_a_topology(capsys, topology):
    (plan,) = planned(capsys, "--topology", topology)
    assert plan["fits"] and plan["devices"] == 1 and plan["collectives"] == {}


@needs_libtpu
def test_a_small_step_for_four_chips(capsys):
    (plan,) = planned(capsys, "--parallel.data", "2", "--parallel.fsdp", "2")
    assert plan["fits"] and plan["devices"] == 4 and plan["mesh"] == {"data": 2, "fsdp": 2}
    assert 0 < plan["argument_bytes"] < plan["peak_bytes"] < plan["capacity_bytes"] == 15.75 * 2**30
    assert "all-gather" in plan["collectives"]
    sent = sum(kind["bytes"] for kind in plan["collectives"].values())
    assert 0.5 * plan["least_network_bytes"] < sent < 20 * plan["least_network_bytes"]
    assert plan["formula_flops"] < plan["formula_flops_whole"]
    assert 0 < plan["mfu_bound"] < 1
    assert plan["step_seconds"] == max(plan[f"{what}_seconds"] for what in ("compute", "memory", "network"))
    assert plan["days"] == pytest.approx(plan["step_seconds"] * 20 / 86400)


@needs_libtpu
def test_the_compiled_program_does_what_was_traced(capsys):
    (plan,) = planned(
        capsys,
        *("--data.sequence-length", "512", "--model.max-length", "512", "--data.batch-size", "16"),
        *("--model.embed-dim", "256", "--model.attention.num-heads", "4"),
    )
    # Splash: two products forward, five backward, over half of all pairs; the program's own count leaves kernels out.
    attention = 16 * 2 * (2 * 7 * 256 * (512 * 513 / 2))
    assert plan["program_flops"] * 4 == plan["traced_flops"] - attention


@needs_libtpu
def test_a_plan_that_does_not_fit_says_by_how_much(capsys):
    (plan,) = planned(capsys, "--data.batch-size", "131072", code=1)
    assert not plan["fits"]
    assert plan["peak_bytes"] > plan["capacity_bytes"]
    assert 0 < plan["argument_bytes"] < plan["capacity_bytes"]
    assert "model.remat=full" in plan["advice"] and "accumulate_steps=2" in plan["advice"]


@needs_libtpu
def test_a_state_that_is_too_large_needs_more_devices(capsys):
    (plan,) = planned(capsys, "--model.num-layers", "1", "--model.embed-dim", "16384", "--data.batch-size", "4", code=1)
    assert plan["argument_bytes"] > plan["capacity_bytes"]
    assert "The state alone is too much" in plan["advice"] and "accumulate" not in plan["advice"]


@needs_libtpu
def test_two_slices_meet_over_the_network(capsys):
    (plan,) = planned(capsys, "--parallel.dcn", "2")
    assert plan["devices"] == 8 and plan["mesh"] == {"dcn": 2, "data": 4}
    # Gradients are summed within a slice, then between the two slices: large ones in parts, others whole.
    sent = plan["collectives"]["send"]["bytes"]
    assert 0.25 <= sent / (4 * plan["parameters"]) <= 1
    assert plan["network_seconds"] > sent / CHIPS["v5e"].network_bandwidth


@needs_libtpu
def test_a_step_of_decoding(capsys):
    (plan,) = planned(capsys, "--decode", "8", "256")
    assert plan["step"] == "decode" and plan["fits"]
    assert plan["settings"] == {"rows": 8, "capacity": 256, "dtype": "float32"}
    assert plan["formula_flops"] == plan["traced_flops"] > 0
    (longer,) = planned(capsys, "--decode", "8", "512")
    assert longer["formula_flops"] - plan["formula_flops"] == 8 * 2 * 4 * 32 * 256
    with pytest.raises(UserError, match="must be a multiple of the 4 devices that share them, got 3"):
        planned(capsys, "--decode", "3", "256")
    with pytest.raises(UserError, match=r"got parallel.strategy=pmap"):
        planned(capsys, "--parallel.strategy", "pmap")


@pytest.mark.gpu
@pytest.mark.skipif(not PLUGIN, reason="needs JAX's CUDA plugin")
def test_a_small_step_for_absent_gpus(capsys):
    (plan,) = planned(
        capsys,
        *("--topology", "h100:4", "--parallel.data", "2", "--parallel.fsdp", "2", "--model.dtype", "bfloat16"),
        *("--data.sequence-length", "512", "--model.max-length", "512", "--data.no-pack"),
    )
    assert plan["fits"] and plan["devices"] == 4 and plan["mesh"] == {"data": 2, "fsdp": 2}
    assert {"all-gather", "all-reduce"} & set(plan["collectives"])
    assert 0 < plan["mfu_bound"] < 1


@needs_libtpu
def test_a_vocabulary_must_be_known():
    with pytest.raises(UserError, match="A plan reads no data"):
        plan([CONFIG, "--topology", "v5e:2x2"])


def test_a_topology_without_its_compiler_says_what_to_install():
    if importlib.util.find_spec("libtpu") is not None:
        with pytest.raises(UserError, match="or has no such shape"):
            find_topology("v5e:3x7x2")
    else:
        with pytest.raises(UserError, match=r"needs the compiler in libtpu"):
            find_topology("v5e:2x2")
