"""The time of a training step by kernel, from a trace, and the contents of its compiled program."""

import functools
import gzip
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
from device_report import Report
from device_step import Made, first_batch, gpt2_config, make

from transformer.planning.program import read_program

STEPS = 3
"""That a trace has."""
Event = tuple[str, float]
"""Name and microseconds of a kernel that ran."""


def run(report: Report) -> None:
    """The step of 16 rows, packed and whole."""
    for kind in ("whole",) if report.tiny else ("packed", "whole"):
        made: list[Made] = []
        compiled = functools.partial(describe_program, report, kind, made)
        if report.is_due(f"trace {kind}", needs=30):
            report.run(f"program {kind}", compiled)
            made = made or [make_step(report, kind)]
            report.run(f"trace {kind}", functools.partial(describe_trace, report, kind, made[0]))


def make_step(report: Report, kind: str) -> Made:
    """The step of the section `step`."""
    config = gpt2_config(report.folder, tiny=report.tiny, rows=2 if report.tiny else 16, pack=kind == "packed")
    return make(config, first_batch(config))


def describe_program(report: Report, kind: str, made: list[Made]) -> dict[str, Any]:
    """What `transformer.planning.program` reads in the compiled step; its text is kept beside the results."""
    made.append(make_step(report, kind))
    text = made[0].compiled.as_text()
    with gzip.open(report.folder / f"step_{kind}.hlo.gz", "wt") as file:
        file.write(text)
    program = read_program(text)
    return {
        "attention": made[0].attention,
        "launches": round(program.launches),
        "traffic_gb": round(program.traffic_bytes / 1e9, 3),
        "product_tflop": round(program.flops / 1e12, 4),
        "custom_calls": {name: round(count) for name, count in sorted(program.kernels.items())},
        **made[0].memory,
    }


def describe_trace(report: Report, kind: str, made: Made) -> dict[str, Any]:
    """Kernels of a few steps, the slowest first."""
    state, runner, folder = made.steps.init_state(), made.steps.runner, report.folder / f"trace_{kind}"
    for _ in range(2):
        state, statistics = runner.step(state, made.batch)
    jax.block_until_ready((state, statistics))
    with jax.profiler.trace(str(folder)):
        for _ in range(STEPS):
            state, statistics = runner.step(state, made.batch)
        jax.block_until_ready((state, statistics))
    source, events = read_trace(folder)
    if not events:
        raise ValueError(f"the trace in {folder} has no kernel")
    times: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for name, us in events:
        times[name] += us
        launches[name] += 1
    top = [
        [name[:100], round(us / STEPS, 1), round(launches[name] / STEPS, 1)]
        for name, us in sorted(times.items(), key=lambda item: -item[1])[:30]
    ]
    return {
        "read_from": source,
        "device_us_per_step": round(sum(times.values()) / STEPS),
        "launches_per_step": round(len(events) / STEPS),
        "top_name_us_launches": top,
    }


def read_trace(folder: pathlib.Path) -> tuple[str, list[Event]]:
    """The newest trace below a folder: by its protocol buffer, else by the file for viewers; and which of them it was."""
    errors = []
    for pattern, read in (("*.xplane.pb", read_xplane), ("*.trace.json.gz", read_json)):
        for path in sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)[-1:]:
            try:
                if events := list(read(path)):
                    return pattern, events
            except Exception as error:
                errors.append(f"{path.name}: {type(error).__name__}: {error}")
    return "; ".join(errors), []


def read_xplane(path: pathlib.Path) -> Iterator[Event]:
    """Of a GPU, what its streams did; of a CPU, the operations that name their instruction."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for plane in devices:
        lines = list(plane.lines)
        # Other lines of the plane (modules, operations) hold the same time again.
        streams = [line for line in lines if line.name.startswith("Stream")] or lines[:1]
        yield from ((event.name, event.duration_ns / 1e3) for line in streams for event in line.events)
    if not devices:
        for event in (event for plane in planes for line in plane.lines for event in line.events):
            if any(name == "hlo_op" for name, _ in event.stats):
                yield event.name, event.duration_ns / 1e3


def read_json(path: pathlib.Path) -> Iterator[Event]:
    """The same from the events of a viewer's file."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = {(e["pid"], e.get("tid"), e["name"]): e["args"].get("name", "") for e in events if e.get("ph") == "M"}
    done = [e for e in events if e.get("ph") == "X"]
    on_device = {
        pid for (pid, _, kind), name in named.items() if kind == "process_name" and name.startswith("/device:")
    }
    for event in done:
        thread = named.get((event["pid"], event.get("tid"), "thread_name"), "")
        stream = event["pid"] in on_device and thread.startswith("Stream")
        if stream or (not on_device and "hlo_op" in event.get("args", {})):
            yield event["name"], float(event.get("dur", 0.0))
