"""`transformer predict RUN INPUT`: the class, translation, hidden words or continuation of each text of a file."""

from transformer.cli.reading import Given
from transformer.cli.row_options import PredictOptions
from transformer.cli.rows import check_files, load_on_all_devices, read_rows, write_rows
from transformer.data.forms.examples import text_field
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained

_ASKED = (
    "top_k",
    "max_new_tokens",
    "temperature",
    "top_p",
    "num_samples",
    "seed",
    "beams",
    "length_penalty",
    "num_best",
)
"""Options of `predict` that are arguments of an objective's."""


@out_of_memory_explained(what="Predicting")
def main(options: PredictOptions, given: Given) -> None:
    """Read all rows, then predict, and write each as it comes."""
    use_compilation_cache()
    check_files(options, "predict from")
    run, batch_size = load_on_all_devices(options)
    key = options.text_key or getattr(run.config.data, run.config.objective.predicts_from)
    name, rows = read_rows(options, (key,), "predict from")
    texts = [text_field(row, key, place) for place, row in rows]
    asked = {option: given[option] for option in _ASKED if option in given}
    if not asked.get("max_new_tokens", 1):
        del asked["max_new_tokens"]  # the kind's own
    predictions = run.predictions(texts, names=[place for place, _ in rows], batch_size=batch_size, **asked)
    write_rows(rows, predictions, options.output, "predicting")
    say(make_console(), f"{len(rows):,} texts of {name} predicted with {options.workdir}")
