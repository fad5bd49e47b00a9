"""`transformer plan CONFIG --topology NAME`: compile the step for hardware that is not there, and say what it takes."""

import json
import os
import sys
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from transformer.cli.arguments import parse_config
from transformer.config import Config
from transformer.planning.chips import find_topology
from transformer.planning.plan import Plan, plan_decoding, plan_training
from transformer.planning.search import search
from transformer.types import UserError

USAGE = """usage: transformer plan CONFIG --topology NAME [--search] [--decode ROWS CAPACITY] [--json] [--section.field value ...]

  --topology NAME         v5e:4x4, v5p:8x8x8, v6e-256, h100:8, ... (kinds: v4, v5e, v5p, v6e, tpu7x, h100)
  --search                try meshes, remat and micro-batches, compile the best dozen, and rank them
  --decode ROWS CAPACITY  a step of decoding instead of training: so many rows, caches of so many tokens
  --json                  print one JSON object (with --search a line each) and nothing else
"""


def main(arguments: list[str]) -> None:
    """Print the plan of a config."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    rest, topology_name, decode, flags = _own(arguments)
    config = parse_config(rest, command="transformer plan")
    # Programs are compiled for absent devices; nothing may look for present ones, which can take minutes.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = find_topology(topology_name, max(config.parallel.dcn, 1))
    console = Console(highlight=False, stderr="--json" in flags)
    if "--search" in flags:
        plans = search(config, topology, report=console.print)
    elif decode:
        plans = [(config, plan_decoding(config, topology, rows=decode[0], capacity=decode[1]))]
    else:
        plans = [(config, plan_training(config, topology))]
    if "--json" in flags:
        for _, plan in plans:
            print(json.dumps(plan._asdict()))
    elif "--search" in flags:
        console.print(_ranking(plans))
    else:
        console.print(_table(plans[0][1]))
    if not any(plan.fits for _, plan in plans):
        sys.exit(1)


def _own(arguments: list[str]) -> tuple[list[str], str, tuple[int, int] | None, set[str]]:
    """The arguments of a config, and this command's own."""
    rest: list[str] = []
    flags: set[str] = set()
    topology, decode, index = "", None, 0
    arguments = [part for argument in arguments for part in _parted(argument)]
    while index < len(arguments):
        argument, values = arguments[index], arguments[index + 1 : index + 3]
        index += 1
        if argument in ("--search", "--json"):
            flags.add(argument)
        elif argument == "--topology" and values:
            topology, index = values[0], index + 1
        elif argument == "--decode":
            if len(values) < 2 or not all(value.isdigit() and int(value) > 0 for value in values):
                raise UserError(
                    f"--decode takes rows and capacity, two positive numbers, got {' '.join(values) or 'none'}."
                )
            decode, index = (int(values[0]), int(values[1])), index + 2
        else:
            rest.append(argument)
    if not topology:
        raise UserError("plan needs --topology NAME, such as v5e:4x4; `transformer plan --help` lists the kinds.")
    if decode and "--search" in flags:
        raise UserError("--search is for training; leave out --decode.")
    return rest, topology, decode, flags


def _parted(argument: str) -> list[str]:
    """`--topology=NAME` as two arguments."""
    return argument.split("=", 1) if argument.startswith("--topology=") else [argument]


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB"


def _table(plan: Plan) -> Table:
    table = Table(
        "what", "how much", title=f"{plan.step} step on {plan.topology}", title_justify="left", show_header=False
    )
    rows: list[tuple[str, str]] = [
        ("devices", f"{plan.devices} ({plan.chips:g} chips), mesh {_mesh(plan)}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in plan.settings.items())),
        ("parameters", f"{plan.parameters:,}"),
        ("memory a device", f"{_gigabytes(plan.peak_bytes)} of {_gigabytes(plan.capacity_bytes)}: "
            f"arguments {_gigabytes(plan.argument_bytes)}, temporaries {_gigabytes(plan.temporary_bytes)}"),
        ("fits", "[green]yes[/green]" if plan.fits else f"[red]no[/red]. {plan.advice}"),
    ]  # fmt: skip
    if plan.fits:
        rows += [
            ("operations a step", f"{plan.traced_flops:.3e} as computed; by formula {plan.formula_flops:.3e}"
                + (f" (causal halved), {plan.formula_flops_whole:.3e} (not halved)" if plan.step == "train" else "")),
            ("operations a device", f"{plan.program_flops:.3e} in the compiled program, kernels left out"),
            *((f"  {kind}", f"{values['count']:g} times, {_gigabytes(values['bytes'])} sent by a device")
                for kind, values in plan.collectives.items()),
            *([("least to send", f"{_gigabytes(plan.least_network_bytes)} for parameters and gradients on this mesh")]
                if plan.step == "train" else []),
            ("time by computing", f"{plan.compute_seconds * 1e3:.2f} ms"),
            ("time by memory", f"{plan.memory_seconds * 1e3:.2f} ms"),
            ("time by network", f"{plan.network_seconds * 1e3:.2f} ms"),
            ("step, at best", f"{plan.step_seconds * 1e3:.2f} ms, bound by {plan.bottleneck}"),
            ("MFU, at best", f"{plan.mfu_bound:.1%}" + (" (causal attention halved)" if plan.step == "train" else "")),
            ("tokens a second", f"{plan.tokens_per_second:,.0f}"),
        ]  # fmt: skip
    if plan.fits and plan.step == "train":
        rows.append(("the whole run", f"{plan.days:.2f} days, {plan.chip_hours:,.0f} chip-hours, at best"))
    rows.append(("compiled in", f"{plan.compile_seconds:.1f} s"))
    for row in rows:
        table.add_row(*row)
    return table


def _ranking(plans: list[tuple[Config, Plan]]) -> Table:
    table = Table("mesh", "remat", "micro-batches", "memory", "step at best", "bound by", "MFU at best", "fits")
    for _, plan in plans:
        settings: dict[str, Any] = plan.settings
        table.add_row(
            _mesh(plan),
            settings["remat"],
            str(settings["accumulate_steps"]),
            _gigabytes(plan.peak_bytes),
            f"{plan.step_seconds * 1e3:.1f} ms" if plan.fits else "",
            plan.bottleneck if plan.fits else "",
            f"{plan.mfu_bound:.1%}" if plan.fits else "",
            "yes" if plan.fits else "no",
        )
    return table


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "1"
