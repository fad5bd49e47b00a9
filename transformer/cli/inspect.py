"""`transformer inspect CONFIG` or `HF_DIR`: show decoded batches, or describe a pretrained model; list the parameters."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from transformer.cli.options import InspectOptions
from transformer.config import Config
from transformer.data.tokenizers.pretrained import CHAT_FILE
from transformer.interop.tensors import DTYPES
from transformer.model_config import BlockConfig
from transformer.parallel.mesh import make_mesh
from transformer.parallel.rules import parameter_shardings
from transformer.parts import count_parameters
from transformer.runs.pretrained import Opened, read_folder
from transformer.runs.recipe import make_run
from transformer.terminal import make_console, printable
from transformer.types import PyTree

_ROWS = 4
_BLOCK = re.compile(r"/block_(\d+)/")


def main(chosen: Config | InspectOptions) -> None:
    """Print the first batch and the parameters of a config, or describe the folder of a pretrained model."""
    console = make_console(stderr=False)
    if isinstance(chosen, InspectOptions):
        _print_folder(console, read_folder(chosen.folder, dtype=chosen.dtype))
        return
    run = make_run(chosen)
    tokenizer = run.tokenizer
    batch = next(run.data.train_batches(tokenizer))
    console.rule("first batch")
    if description := run.data.describe_rows(tokenizer):
        console.print(Text(description), end="\n\n")
    rows = jax.tree.map(lambda part: part[:_ROWS], batch)
    for heading, lines in run.config.objective.show(rows, tokenizer, run.data.class_names):
        title, colon, rest = printable(heading).partition(":")
        console.print(Text.assemble((title, "bold"), colon + rest))
        for line in lines:
            console.print(Text.assemble(*((printable(text), style) for text, style in line)))
        console.print()
    _print_parameters(console, run.config, run.state.model_params, run.steps.parts.axes)


def _print_folder(console: Console, opened: Opened) -> None:
    table = Table.grid(Column(style="bold", no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for name, text in _of_folder(opened):
        table.add_row(name, Text(printable(text)))
    console.rule(Text(printable(opened.weights.folder.path.name)))
    console.print(table)
    console.print()
    _print_parameters(console, opened.config, opened.parts.shapes, opened.parts.axes)


def _of_folder(opened: Opened) -> Iterator[tuple[str, str]]:
    """The description of a folder, as names and values."""
    folder, model, objective = opened.weights.folder, opened.config.model, opened.config.objective
    yield "family", f"{folder.family.kind}, {folder.architecture}"
    yield "objective", objective.kind + (f" of {len(opened.class_names)} classes" if opened.class_names else "")
    yield "parameters", f"{count_parameters(opened.parts.shapes):,} in {model.param_dtype}"
    decoder = f" and {model.decoder_layers or model.num_layers} of the decoder" * (objective.num_stacks > 1)
    yield "layers", f"{model.num_layers}{decoder}, of width {model.embed_dim:,}"
    yield "heads", "; ".join(dict.fromkeys(_heads(block, model.embed_dim) for block in model.block_counts))
    yield "vocabulary", f"{model.vocab_size:,}"
    cut = folder.pretrained.longest_text
    longest = f"{model.max_length:,} tokens" if model.max_length else "any"
    yield "longest sequence", longest + (f"; texts are cut at {cut:,}" if cut else "")
    types: dict[str, int] = {}
    for tensor in folder.tensors.values():
        name = str(DTYPES.get(tensor.dtype, tensor.dtype))
        types[name] = types.get(name, 0) + 1
    stored = sum(tensor.end - tensor.start for tensor in folder.tensors.values())
    yield "stored", f"{stored:,} bytes; tensors: " + ", ".join(f"{count} of {name}" for name, count in types.items())
    yield from _of_tokenizer(opened)
    yield "ignored keys", ", ".join(sorted(folder.keys.ignored)) or "none"
    yield "ignored tensors", ", ".join(sorted(opened.weights.ignored)) or "none"


def _heads(block: BlockConfig, width: int) -> str:
    heads = block.attention
    return f"{heads.num_heads} of queries, {heads.kv_heads} of keys and values, width {heads.resolved_head_dim(width)}"


def _of_tokenizer(opened: Opened) -> Iterator[tuple[str, str]]:
    if "data" in opened.given:
        yield "tokenizer", "none: inputs and outputs are ids"
        return
    tokenizer: Any = opened.tokenizer
    settings = opened.config.data.tokenizer
    yield "tokenizer", f"{settings.kind}, {tokenizer.vocab_size:,} ids"
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        ids = value if isinstance(value, tuple) else (value,) * (value >= 0)
        if ids:
            yield f"  {field.name}", ", ".join(f"{index} {tokenizer.name_of(index)}" for index in ids)
    yield "chat template", "yes" if CHAT_FILE in opened.tokenizer_files else "none"


def _ranges(numbers: list[str]) -> str:
    """`0..3,5` for 0, 1, 2, 3 and 5."""
    blocks = sorted(map(int, numbers))
    starts = [n for n in blocks if n - 1 not in blocks]
    ends = [n for n in blocks if n + 1 not in blocks]
    return ",".join(f"{a}" if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True))


def _print_parameters(console: Console, config: Config, params: PyTree, axes: PyTree) -> None:
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
    alike: dict[tuple[str, ...], list[str]] = {}  # parameters that differ only in the number of their block
    for (path, value), names, sharding in rows:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        role = (
            _BLOCK.sub("/block_/", name, count=1),
            "×".join(map(str, value.shape)),
            str(value.dtype),
            ", ".join(str(axis) for axis in names),
            str(sharding.spec),
        )
        alike.setdefault(role, []).extend(_BLOCK.findall(name)[:1])
    for (name, *columns), numbers in alike.items():
        table.add_row(name.replace("/block_/", f"/block_{_ranges(numbers)}/", 1) if numbers else name, *columns)
    console.print(table)
    console.print(
        f"{count_parameters(params):,} parameters, vocabulary {config.model.vocab_size}, "
        f"{config.data.sequence_length} tokens a row"
    )
