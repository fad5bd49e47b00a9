"""benchmarks/device.py, small and on a CPU: its lines, what it leaves out, what it does not repeat, and what it finds wrong."""

import argparse
import dataclasses
import gzip
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_kinds import BACKENDS, AttentionBackend
from transformer.ops.masks import AttentionMask

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
JOBS = ("environment", "attention", "step", "decode", "profile")


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The script's modules import each other by name, as a script's do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def load(name):
    """A module of the script."""
    return importlib.import_module(name)


def run_jobs(folder, *sections, deadline=None, again=False):
    """What the processes of sections do, in this one."""
    device = load("device")

    for section in sections:
        for job in device.SECTIONS[section].jobs:
            end = time.time() + 600 if deadline is None else deadline
            device.run_job(
                argparse.Namespace(sections=[section], out=folder, tiny=True, again=again, deadline=end, job=job)
            )
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def command(folder, *arguments):
    """The command line: its lines."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), *sys.path]), "XLA_FLAGS": ""}
    run = [sys.executable, str(BENCHMARKS / "device.py"), "--tiny", "--out", str(folder), *arguments]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    return folder, run_jobs(folder, *JOBS)


def test_every_section_has_results(lines):
    _, found = lines
    assert not [line for line in found if "error" in line]
    parts = {section: {line["part"] for line in found if line["section"] == section} for section in JOBS}
    assert {"environment", "matmul bfloat16 default", "copy"} <= parts["environment"]
    assert {"decode/auto", "decode/blockwise", "decode"} <= parts["attention"]
    assert {"whole 2", "packed 2"} <= parts["step"]
    assert {"ours 2"} <= parts["decode"]
    assert {"program whole", "trace whole"} <= parts["profile"]
    for line in found:
        assert line.get("right", True) and line["tiny"] and line["card"], line


def test_a_step_says_what_it_took(lines):
    steps = {line["part"]: line for line in lines[1] if line["section"] == "step"}
    whole, packed = steps["whole 2"], steps["packed 2"]
    assert whole["tokens_per_s"] == pytest.approx(2 * 64 / whole["step_ms"] * 1e3, rel=0.01)
    assert whole["first_loss"] == pytest.approx(np.log(257), rel=0.05)
    assert whole["documents_per_row"] == 1 < packed["documents_per_row"]
    traced = next(line for line in lines[1] if line["part"] == "trace whole")
    program = next(line for line in lines[1] if line["part"] == "program whole")
    names = [name for name, _, _ in traced["top_name_us_launches"]]
    assert any("dot" in name or "fusion" in name for name in names)
    assert 0 < traced["launches_per_step"] < 2 * program["launches"]


def test_what_has_a_result_is_not_done_again(lines):
    folder, found = lines
    again = run_jobs(folder, *JOBS)[len(found) :]
    assert [line for line in again if "skipped" not in line] == []
    repeated = run_jobs(folder, "environment", again=True)[len(found) + len(again) :]
    assert "copy" in {line["part"] for line in repeated}


def test_optional_packages_are_named_where_they_are_missing(tmp_path, monkeypatch):
    device_report = load("device_report")
    device_torch = load("device_torch")

    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    device_torch.run_decode(device_report.Report(tmp_path, "decode", time.time() + 60, tiny=True))
    found = {line["part"]: line for line in device_report.read_lines(tmp_path)}
    assert found["hugging face 2"]["skipped"].startswith("no torch")
    assert found["ratio 2"]["skipped"] == "no ours 2"


def test_without_time_everything_is_skipped(tmp_path):
    found = run_jobs(tmp_path, *JOBS, deadline=time.time() - 1)
    assert {line["section"] for line in found} == set(JOBS)
    assert [line for line in found if "skipped" not in line and line["part"] != "environment"] == []
    (only,) = command(tmp_path, "attention", "--budget", "0")
    assert only["skipped"] and only["section"] == "attention"


def test_what_fails_is_a_line_and_the_others_go_on(tmp_path, monkeypatch):
    device = load("device")
    device_report = load("device_report")

    (tmp_path / "broken.py").write_text(
        "import os, time\n"
        "def fail(report):\n"
        "    report.run('a', lambda: 1 / 0)\n"
        "    report.run('b', lambda: {'value': 2})\n"
        "    raise KeyError('later')\n"
        "def abort(report):\n"
        "    report.emit('before')\n"
        "    os.abort()\n"
        "def hang(report):\n"
        "    time.sleep(1000)\n"
    )
    monkeypatch.setattr(device, "GRACE", 0.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    jobs = {"first": ("broken:abort", "broken:fail"), "second": ("broken:hang", "environment:nothing")}
    monkeypatch.setattr(device, "SECTIONS", {name: device.Section(12, job) for name, job in jobs.items()})
    # Sections of a process are known by its own table.
    monkeypatch.setattr(device, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    table = f"device.SECTIONS = {{name: device.Section(1, ()) for name in {list(jobs)!r}}}"
    (tmp_path / "benchmarks" / "device.py").write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import device; {table}; device.main()"
    )
    device.main(["--out", str(tmp_path / "out"), "--budget", "14"])
    found = device_report.read_lines(tmp_path / "out")
    by_part = {line["part"]: line for line in found}
    assert by_part["a"]["error"]["type"] == "ZeroDivisionError" and "broken.py:3" in by_part["a"]["error"]["where"][-1]
    assert by_part["b"]["value"] == 2 and "before" in by_part
    assert by_part["broken:fail"]["error"]["message"] == "'later'"
    assert by_part["broken:abort"]["error"]["type"] == "ExitStatus"
    assert by_part["broken:hang"]["error"]["type"] == "Timeout"


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path):
    device_report = load("device_report")

    (tmp_path / "results.jsonl").write_text('{"section": "a", "part": "b"}\n{"section": "a", "pa')
    assert device_report.read_lines(tmp_path) == [{"section": "a", "part": "b"}]
    report = device_report.Report(tmp_path, "a", time.time() + 9)
    assert report.run("b", pytest.fail) == {"section": "a", "part": "b"}


def test_results_of_another_card_or_size_do_not_stand_for_these(tmp_path):
    device_report = load("device_report")

    report = device_report.Report(tmp_path, "a", time.time() + 9, card="one")
    report.emit("b", value=1)
    for other in ({"card": "two"}, {"card": "one", "tiny": True}):
        assert device_report.Report(tmp_path, "a", time.time() + 9, **other).is_due("b")
    assert not device_report.Report(tmp_path, "a", time.time() + 9, card="one").is_due("b")


def test_a_wrong_backend_is_found_wrong(tmp_path, monkeypatch):
    """One that looks at the next token, and at other documents; and one that gives other bits each time."""
    device_attention = load("device_attention")
    device_report = load("device_report")

    calls = []

    class Wrong(AttentionBackend):
        kind = "wrong"
        takes = frozenset({"causal", "query_segment_ids", "key_segment_ids"})

        def compute(self, call):
            return BACKENDS.find("xla")().compute(call._replace(mask=AttentionMask(causal=True)))

    monkeypatch.setitem(BACKENDS._kinds, "wrong", dataclasses.dataclass(frozen=True)(Wrong))
    case = next(case for case in device_attention.CASES if case.name == "packed padded")
    report = device_report.Report(tmp_path, "attention", time.time() + 60, tiny=True)
    prepared = device_attention.prepare(case, report)
    assert device_attention.measure(case, prepared, "blockwise")["right"]
    found = device_attention.measure(case, prepared, "wrong")
    assert not found["right"] and found["same_bits"]

    def drift(*operands):
        calls.append(operands)
        out, *gradients = prepared.programs["auto"](*operands)
        return out + jnp.asarray(len(calls) * 1e-2, out.dtype), *gradients

    prepared.programs["wrong"] = drift
    assert not device_attention.measure(case, prepared, "wrong")["same_bits"]


def test_operations_agree_with_124_million_parameters():
    device_step = load("device_step")

    assert device_step.GPT2.flops_per_token == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    found = device_step.speed(device_step.GPT2, 16, 0.040, "NVIDIA H100 80GB HBM3")
    assert found["tokens_per_s"] == 409_600
    assert found["mfu"] == pytest.approx(409_600 * 855.1e6 / 989e12, abs=1e-3)


def test_a_torch_step_learns_and_is_compared(tmp_path):
    pytest.importorskip("torch")
    found = run_jobs(tmp_path, "step")
    by_part = {line["part"]: line for line in found}
    assert by_part["torch sdpa 2"]["first_loss"] == pytest.approx(np.log(384), rel=0.05)
    assert by_part["ratio sdpa 2"]["whole_over_torch"] > 0


TRACE = {
    "traceEvents": [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #13(Compute)"}},
        {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "XLA Modules"}},
        {"ph": "X", "pid": 1, "tid": 7, "name": "gemm", "dur": 5.0},
        {"ph": "X", "pid": 1, "tid": 8, "name": "jit_step", "dur": 9.0},
        {"ph": "X", "pid": 2, "tid": 1, "name": "python", "dur": 3.0},
    ]
}


def test_a_trace_is_read_from_the_viewers_file_where_the_other_cannot_be(tmp_path):
    device_profile = load("device_profile")

    (tmp_path / "a.xplane.pb").write_bytes(b"\xff damaged")
    (tmp_path / "a.trace.json.gz").write_bytes(gzip.compress(json.dumps(TRACE).encode()))
    assert device_profile.read_trace(tmp_path) == ("*.trace.json.gz", [("gemm", 5.0)])


def test_the_runs_that_are_compared_exist_and_are_configs():
    resume, config = load("device_resume"), load("device_run").get_config
    named = {name for comparison in resume.COMPARISONS for name in comparison[:2]}
    assert named == set(resume.TRAININGS)
    for comparison in resume.COMPARISONS:
        # A run starts when its reference has ended, which therefore comes first.
        names = list(resume.TRAININGS)
        assert names.index(comparison.reference) < names.index(comparison.run)
    assert config().data.sequence_length >= 512 and config().model.dtype == "bfloat16"
    assert config("tiny").training.checkpoint_every < resume.KILL_FROM


def test_a_budget_beyond_the_usual_one_is_shared(tmp_path, monkeypatch):
    device, starts = load("device"), []
    monkeypatch.setattr(device, "start_job", lambda options, name, job, deadline: starts.append((name, deadline)))
    begin = time.time()
    device.main(["environment", "attention", "--out", str(tmp_path), "--budget", "300"])
    (_, first), (_, second) = starts
    assert first - begin == pytest.approx(60, abs=2) and second - begin == pytest.approx(300, abs=2)
    starts.clear()
    device.main(["--out", str(tmp_path), "--budget", "100"])
    assert max(deadline for _, deadline in starts) - begin == pytest.approx(100, abs=3)
