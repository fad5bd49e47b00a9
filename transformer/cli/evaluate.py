"""`transformer evaluate DIR`: one JSON object of scores of a run's model over a whole split."""

import functools
import json

from transformer.cli.options import EvaluateOptions, Given
from transformer.runs.scoring import evaluate, keep_scores
from transformer.storage import WriteError
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache


def main(options: EvaluateOptions, given: Given) -> None:
    """Score and print."""
    del given
    use_compilation_cache()
    report = functools.partial(say, make_console())
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
    print(json.dumps(scores), flush=True)
    try:
        keep_scores(options.workdir, scores)
    except WriteError as error:
        report(f"These scores are not kept for `transformer report`: {error}")
