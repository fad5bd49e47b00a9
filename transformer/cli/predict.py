"""`transformer predict RUN INPUT`: predict the class, translation, masked words or continuation of each text."""

from transformer.cli.reading import Given
from transformer.cli.row_options import PredictOptions
from transformer.cli.rows import check_files, load_on_all_devices, read_rows, write_rows
from transformer.data.forms.examples import text_field
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained
from transformer.validation import counted

_OPTIONS = (
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
"""Options that are arguments of an objective's `predict`."""


@out_of_memory_explained(what="Predicting")
def main(options: PredictOptions, given: Given) -> None:
    """Read all rows, then predict, and write each as soon as it is ready."""
    use_compilation_cache()
    check_files(options, "predict from")
    run, batch_size = load_on_all_devices(options)
    key = options.text_key or getattr(run.config.data, run.config.objective.predicts_from)
    name, rows = read_rows(options, (key,), "predict from")
    texts = [text_field(row, key, location) for location, row in rows]
    chosen = {option: given[option] for option in _OPTIONS if option in given}
    if not chosen.get("max_new_tokens", 1):
        del chosen["max_new_tokens"]  # the objective's default
    predictions = run.predictions(texts, names=[location for location, _ in rows], batch_size=batch_size, **chosen)
    write_rows(rows, predictions, options.output, "predicting")
    say(make_console(), f"{counted(len(rows), 'text')} of {name} predicted with {options.workdir}")
