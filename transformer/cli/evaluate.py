"""`transformer evaluate DIR`: one JSON object of scores of a run's model over a whole split."""

import dataclasses
import json

import tyro

from transformer.runs.saved import evaluate
from transformer.training.hardware import use_compilation_cache


@dataclasses.dataclass(frozen=True)
class DataArguments:
    """Other data than the run's own."""

    source: tuple[str, ...] = ()
    """Corpora to score instead of those the run was trained on."""
    data_dir: str = ""
    """Where prepared datasets live; empty means where the run's do."""
    stride: int | None = None
    """Score windows of running text that move on by so many tokens; 0 means packed documents."""
    limit: int | None = None
    """Score no more than so many tokens of running text; 0 means all."""


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """Another way to run the model than in training."""

    memory_length: int | None = None
    """Vectors that each layer remembers of the rows before; 0 means that rows are scored without what precedes them."""


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Score a run's model over a whole split, and print one JSON object."""

    workdir: tyro.conf.Positional[str]
    """Directory of the run."""
    split: str = "validation"
    """Which split: train, validation or test."""
    data: DataArguments = DataArguments()
    model: ModelArguments = ModelArguments()


def main(arguments: list[str]) -> None:
    """Score and print."""
    options = tyro.cli(EvaluateArguments, prog="transformer evaluate", args=arguments)
    use_compilation_cache()
    scores = evaluate(
        options.workdir,
        split=options.split,
        source=options.data.source,
        data_dir=options.data.data_dir,
        stride=options.data.stride,
        limit=options.data.limit,
        memory_length=options.model.memory_length,
    )
    print(json.dumps(scores))
