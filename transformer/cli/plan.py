"""`transformer plan CONFIG --topology NAME`: compile the step for absent hardware, and print its memory and time."""

import functools
import json
import os
import sys
from typing import Any

import jax
from rich.table import Table
from rich.text import Text

from transformer.cli.options import PlanOptions
from transformer.config import Config
from transformer.planning.chips import find_topology
from transformer.planning.plan import Plan, plan_decoding, plan_training
from transformer.planning.search import search
from transformer.terminal import make_console, say


def main(config: Config, options: PlanOptions) -> None:
    """Print the plan of a config."""
    # Programs are compiled for absent devices. A search for present devices can take minutes and must not start.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = find_topology(options.topology, max(config.parallel.dcn, 1))
    console = make_console(stderr=False)
    notes = make_console()
    what = "decoding" if options.decode != (0, 0) else "training"
    say(notes, f"compiling the {what} step for {options.topology}: seconds to minutes ...")
    if options.search:
        plans = search(config, topology, report=functools.partial(say, notes))
    elif options.decode != (0, 0):
        plans = [(config, plan_decoding(config, topology, rows=options.decode[0], capacity=options.decode[1]))]
    else:
        plans = [(config, plan_training(config, topology))]
    if options.json:
        for _, plan in plans:
            print(json.dumps(plan._asdict()))
    elif options.search:
        console.print(_ranking(plans))
    else:
        console.print(_table(plans[0][1]))
    if not any(plan.fits for _, plan in plans):
        sys.exit(1)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB"


def _table(plan: Plan) -> Table:
    table = Table(
        "what", "how much", title=f"{plan.step} step on {plan.topology}", title_justify="left", show_header=False
    )
    rows: list[tuple[str, str | Text]] = [
        ("devices", f"{plan.devices} ({plan.chips:g} chips), mesh {_mesh(plan)}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in plan.settings.items())),
        ("parameters", f"{plan.parameters:,}"),
        ("memory a device", f"{_gigabytes(plan.peak_bytes)} of {_gigabytes(plan.capacity_bytes)}: "
            f"arguments {_gigabytes(plan.argument_bytes)}, temporaries {_gigabytes(plan.temporary_bytes)}"),
        ("fits", Text("yes", "green") if plan.fits else Text.assemble(("no", "red"), f". {plan.advice}")),
    ]  # fmt: skip
    if plan.fits:
        rows += [
            ("operations a step", f"{plan.traced_flops:.3e} as computed; of the model {plan.formula_flops:.3e}"
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
