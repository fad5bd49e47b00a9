"""`transformer evaluate DIR`: score a run's model over a whole split or on tasks of lm-eval, as one JSON object."""

import functools
import json
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from transformer.cli.options import EvaluateOptions, Given
from transformer.cli.rows import require_new
from transformer.evaluation.calibration import reliability_diagram
from transformer.parallel.mesh import make_mesh
from transformer.runs.saved import load
from transformer.runs.scoring import evaluate, keep_scores
from transformer.storage import WriteError, expand, explained, writing_whole
from transformer.terminal import make_console, printable, say
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained
from transformer.validation import require


def main(options: EvaluateOptions, given: Given) -> None:
    """Compute the scores and print them."""
    del given
    use_compilation_cache()
    if options.tasks:
        _on_tasks(options)
        return
    require_new(options.reliability, "--reliability")
    console = make_console()
    report = functools.partial(say, console)
    scores = evaluate(
        options.workdir,
        step=options.step,
        base=options.base,
        weights=options.weights,
        split=options.split,
        source=options.data.source,
        data_dir=options.data.data_dir,
        keys={name: value for name, value in vars(options.data).items() if name.endswith("_key") and value is not None},
        stride=options.data.stride,
        limit=options.data.limit,
        memory_length=options.model.memory_length,
        report=report,
    )
    if console.is_terminal and "per_class" in scores:
        console.print(_report(scores))
    print(json.dumps(scores), flush=True)
    try:
        keep_scores(options.workdir, scores)
    except WriteError as error:
        report(f"These scores are not stored for `transformer report`: {error}")
    if options.reliability:
        require(
            "calibration" in scores,
            f"A reliability diagram (--reliability) needs a classifier, {options.workdir} is none; leave it out.",
        )
        picture = reliability_diagram(scores["calibration"], scores["expected_calibration_error"], options.workdir)
        with explained(options.reliability), writing_whole(expand(options.reliability)) as file:
            file.write(picture.encode())
        report(f"{options.reliability} written")


def _report(scores: dict[str, Any]) -> Table:
    """Scores of each class and their averages, for 80 columns."""
    table = Table("class", box=SIMPLE_HEAD)
    for name in ("precision", "recall", "F1", "support"):
        table.add_column(name, justify="right", no_wrap=True)
    sections = (scores["per_class"].items(), ((f"{name} average", of) for name, of in scores["averages"].items()))
    for rows in sections:
        for name, of in rows:
            shown = (f"{of[score]:.4f}" for score in ("precision", "recall", "f1"))
            table.add_row(Text(printable(name), overflow="fold"), *shown, f"{int(of['support']):,}")
        table.add_section()
    named = {"accuracy": "accuracy", "expected_calibration_error": "expected calibration error"}
    table.caption = ", ".join(f"{words} {scores[name]:.4f}" for name, words in named.items() if name in scores)
    return table


@out_of_memory_explained(what="Evaluating on tasks")
def _on_tasks(options: EvaluateOptions) -> None:
    """Score the model on tasks of lm-eval, with all devices of this process."""
    from transformer.runs.harness import evaluate_tasks  # noqa: PLC0415 (lm-eval need not be installed)

    devices = jax.local_devices()
    mesh = make_mesh(len(devices), devices)
    run = load(options.workdir, step=options.step, base=options.base, weights=options.weights, mesh=mesh)
    tasks = evaluate_tasks(
        run,
        options.tasks,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
    )
    console = make_console()
    if console.is_terminal:
        console.print(_table(tasks))
    print(json.dumps({"workdir": options.workdir, "step": run.step, "tasks": tasks}))


def _table(tasks: dict[str, dict[str, Any]]) -> Table:
    """A line for each metric of each task, with its standard error."""
    table = Table("task", "metric")
    for heading in ("value", "standard error", "examples"):
        table.add_column(heading, justify="right")
    for task, metrics in tasks.items():
        for name, value in metrics.items():
            if name == "examples" or "_stderr" in name:
                continue
            head, _, of_filter = name.partition(" ")
            error = metrics.get(f"{head}_stderr {of_filter}".strip())
            words = (task, name, _shown(value), _shown(error), str(metrics.get("examples", "")))
            table.add_row(*map(printable, words))
    return table


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
