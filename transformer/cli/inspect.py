"""`transformer inspect CONFIG`: decoded batches and the parameter table, without training."""

import jax
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from transformer.config import Config
from transformer.parallel.mesh import make_mesh
from transformer.parallel.rules import parameter_shardings
from transformer.parts import count_parameters
from transformer.runs.recipe import Run, make_run
from transformer.terminal import make_console, printable

_ROWS = 4


def main(config: Config) -> None:
    """Print the first batch and the parameters of a config."""
    console = make_console(stderr=False)
    run = make_run(config)
    tokenizer = run.tokenizer
    batch = next(run.data.train_batches(tokenizer))
    console.rule("first batch")
    rows = jax.tree.map(lambda part: part[:_ROWS], batch)
    for heading, lines in run.config.objective.show(rows, tokenizer, run.data.class_names):
        title, colon, rest = printable(heading).partition(":")
        console.print(Text.assemble((title, "bold"), colon + rest))
        for line in lines:
            console.print(Text.assemble(*((printable(text), style) for text, style in line)))
        console.print()
    _print_parameters(console, run)


def _print_parameters(console: Console, run: Run) -> None:
    config = run.config
    params, axes = run.state.params, run.steps.parts.axes
    shardings = parameter_shardings(make_mesh(config.parallel.sizes), axes, params)
    table = Table(
        Column("parameter", overflow="fold"),
        "shape",
        "type",
        "axes",
        "sharding",
        title="parameters",
        title_justify="left",
    )
    rows = zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, PartitionSpec)),
        jax.tree.leaves(shardings),
        strict=True,
    )
    for (path, value), names, sharding in rows:
        table.add_row(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            "×".join(map(str, value.shape)),
            str(value.dtype),
            ", ".join(str(name) for name in names),
            str(sharding.spec),
        )
    console.print(table)
    console.print(
        f"{count_parameters(params):,} parameters, vocabulary {run.config.model.vocab_size}, "
        f"{config.data.sequence_length} tokens a row"
    )
