"""Plans for TPUs that are not there; skipped where their compiler is not installed."""

import importlib.util
import json

import pytest

from transformer.cli import plan as command
from transformer.planning.chips import CHIPS, find_topology
from transformer.types import UserError

CONFIG = "configs/gpt2_124m.py:debug"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[plan]"'
)


@pytest.fixture(autouse=True)
def at_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG], "plan needs --topology NAME, such as v5e:4x4"),
        ([CONFIG, "--topology", "v9:2x2"], "KIND:SHAPE with a kind of v4, v5e, .*; got 'v9:2x2'"),
        ([CONFIG, "--topology", "v5e"], "got 'v5e'"),
        ([CONFIG, "--topology", "h100:2x2"], "The shape of h100 is a number of devices, got '2x2'"),
        ([CONFIG, "--topology", "v5e:2x2", "--decode", "4"], "two positive numbers, got 4"),
        ([CONFIG, "--topology", "v5e:2x2", "--decode", "4", "8", "--search"], "leave out --decode"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        command.main(arguments)


def test_every_chip_has_a_peak():
    assert all(chip.peak_flops > 1e14 for chip in CHIPS.values())


def planned(capsys, *arguments, code=None):
    if code is None:
        command.main([CONFIG, "--topology", "v5e:2x2", "--model.vocab-size", "512", "--json", *arguments])
    else:
        with pytest.raises(SystemExit) as exit_info:
            command.main([CONFIG, "--topology", "v5e:2x2", "--model.vocab-size", "512", "--json", *arguments])
        assert exit_info.value.code == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@needs_libtpu
def test_a_small_step_for_four_chips(capsys):
    (plan,) = planned(capsys, "--parallel.data", "2", "--parallel.fsdp", "2")
    assert plan["fits"] and plan["devices"] == 4 and plan["mesh"] == {"data": 2, "fsdp": 2}
    assert 0 < plan["argument_bytes"] < plan["peak_bytes"] < plan["capacity_bytes"] == 16e9
    assert "all-gather" in plan["collectives"]
    sent = sum(kind["bytes"] for kind in plan["collectives"].values())
    assert 0.5 * plan["least_network_bytes"] < sent < 20 * plan["least_network_bytes"]
    assert plan["formula_flops"] < plan["formula_flops_whole"]
    assert 0 < plan["mfu_bound"] < 1
    assert plan["step_seconds"] == max(plan[f"{what}_seconds"] for what in ("compute", "memory", "network"))
    assert plan["days"] == pytest.approx(plan["step_seconds"] * 20 / 86400)


@needs_libtpu
def test_what_does_not_fit_is_told_by_how_much(capsys):
    (plan,) = planned(capsys, "--data.batch-size", "65536", code=1)
    assert not plan["fits"]
    assert plan["peak_bytes"] > plan["capacity_bytes"]
    assert "model.remat=full" in plan["advice"] and "accumulate_steps=2" in plan["advice"]


@needs_libtpu
def test_a_step_of_decoding(capsys):
    (plan,) = planned(capsys, "--decode", "8", "256")
    assert plan["step"] == "decode" and plan["fits"]
    assert plan["settings"] == {"rows": 8, "capacity": 256, "dtype": "float32"}


@needs_libtpu
def test_a_vocabulary_must_be_known():
    with pytest.raises(UserError, match="A plan reads no data"):
        command.main([CONFIG, "--topology", "v5e:2x2"])


def test_a_topology_without_its_compiler_says_what_to_install():
    if importlib.util.find_spec("libtpu") is not None:
        with pytest.raises(UserError, match="or has no such shape"):
            find_topology("v5e:3x7x2")
    else:
        with pytest.raises(UserError, match=r"needs the compiler in libtpu"):
            find_topology("v5e:2x2")
