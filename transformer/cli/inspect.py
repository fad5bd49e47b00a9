"""`transformer inspect CONFIG`: decoded batches and the parameter table, without training."""

import jax
import numpy as np
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from transformer.config import Config
from transformer.data.tokenizers import Tokenizer, source_tokenizer
from transformer.objectives.prefix_lm import prefix_tokens
from transformer.ops.masks import AttentionMask
from transformer.parallel.mesh import make_mesh
from transformer.parallel.rules import parameter_shardings
from transformer.runs.recipe import Run, make_run
from transformer.steps import make_steps
from transformer.tasks import count_parameters
from transformer.terminal import make_console, printable
from transformer.types import Batch, LabelledBatch, PairBatch

_COLOURS = ("green", "cyan", "magenta", "yellow", "blue")
_MASK_SIZE = 24


def _row(batch: Batch, row: int, tokenizer: Tokenizer) -> Text:
    """The text of a row: a colour for each document, dim where the loss does not count, escapes made visible."""
    line = Text()
    segments, weights = batch.segment_ids[row], batch.weights[row] > 0
    starts = np.flatnonzero(np.diff(segments, prepend=-1) | np.diff(weights.astype(int), prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(segments)], strict=True):
        if segments[start] == 0:
            line.append(f"({end - start} tokens of padding)", "dim")
            continue
        style = _COLOURS[segments[start] % len(_COLOURS)] + ("" if weights[start] else " dim")
        line.append(printable(tokenizer.decode(batch.inputs[row, start:end])), style)
    return line


def _with_sentinels(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens, with <0>, <1>, ... for ids after the tokenizer's, which stand for hidden spans."""
    parts = []
    for part in np.split(tokens, np.flatnonzero(tokens >= tokenizer.vocab_size)):
        sentinel = f"<{part[0] - tokenizer.vocab_size}>" if len(part) and part[0] >= tokenizer.vocab_size else ""
        parts.append(sentinel + printable(tokenizer.decode(part)))
    return "".join(parts)


def _heading(row: int, text: str) -> Text:
    return Text.assemble((f"row {row}", "bold"), f": {text}")


def _mask_picture(batch: Batch, row: int, *, prefix: bool) -> str:
    """Who attends to whom (■) where the row's documents meet or a prefix ends, or at its start."""
    segments = batch.segment_ids[row]
    prefix_BT = np.asarray(prefix_tokens(batch.weights[[row]], batch.segment_ids[[row]])) & prefix
    borders = np.flatnonzero((np.diff(segments) != 0) | np.diff(prefix_BT[0]))
    start = int(max(0, min(borders[0] - _MASK_SIZE // 2, len(segments) - _MASK_SIZE))) if len(borders) else 0
    columns = slice(start, start + _MASK_SIZE)
    part = np.asarray(segments[None, columns])
    mask = AttentionMask(causal=True, query_segment_ids=part, key_segment_ids=part, key_prefix=prefix_BT[:, columns])
    allowed = mask.to_bool(*part.shape[-1:] * 2)
    lines = ["".join("■ " if cell else "· " for cell in line) for line in np.asarray(allowed)[0, 0]]
    return f"attention among tokens {start} to {start + part.shape[1] - 1} of row {row}\n" + "\n".join(lines)


def main(config: Config) -> None:
    """Print the first batch and the parameters of a config."""
    console = make_console(stderr=False)
    run = make_run(config)
    tokenizer = run.tokenizer
    batch = next(run.data.train_batches(tokenizer))
    console.rule("first batch")
    if isinstance(batch, LabelledBatch):
        for row in range(min(4, len(batch.inputs))):
            tokens = batch.inputs[row][batch.segment_ids[row] > 0]
            label = printable(run.data.class_names[batch.labels[row]])
            console.print(_heading(row, f"class {label}, {len(tokens)} of {len(batch.inputs[row])} tokens"))
            console.print(printable(tokenizer.decode(tokens)) + "\n", style="green")
    elif isinstance(batch, PairBatch):
        reader = source_tokenizer(tokenizer)
        for row in range(min(4, len(batch.inputs))):
            source, target = (
                tokens[row][segments[row] > 0]
                for tokens, segments in ((batch.source, batch.source_segment_ids), (batch.targets, batch.segment_ids))
            )
            lengths = f"{len(source)} of {batch.source.shape[1]} and {len(target)} of {batch.inputs.shape[1]} tokens"
            console.print(_heading(row, lengths))
            console.print(_with_sentinels(source, reader), style="green")
            console.print(_with_sentinels(target, tokenizer) + "\n", style="cyan")
    else:
        _print_rows(console, batch, tokenizer, prefix=run.config.model.bidirectional_prefix)
    _print_parameters(console, run)


def _print_rows(console: Console, batch: Batch, tokenizer: Tokenizer, *, prefix: bool) -> None:
    for row in range(min(4, len(batch.inputs))):
        counted = int(np.sum(batch.weights[row] > 0))
        documents = len(set(batch.segment_ids[row].tolist()) - {0})
        noun = "document" if documents == 1 else "documents"
        console.print(_heading(row, f"{documents} {noun}, {counted} of {len(batch.inputs[row])} targets count"))
        console.print(_row(batch, row, tokenizer).append("\n"))
    console.print(_mask_picture(batch, 0, prefix=prefix) + "\n")


def _print_parameters(console: Console, run: Run) -> None:
    config = run.config
    params, axes = run.state.params, make_steps(run.config, run.tokenizer).axes
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
