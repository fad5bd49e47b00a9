"""`transformer embed RUN INPUT -o vectors.npy`: compute a vector of each text of a file with a run's model."""

from collections.abc import Iterator
from typing import Any

from transformer.cli.reading import Given
from transformer.cli.row_options import EmbedOptions
from transformer.cli.rows import check_files, load_on_all_devices, read_rows, write_rows
from transformer.data.forms.examples import text_field
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained
from transformer.validation import counted


@out_of_memory_explained(what="Embedding")
def main(options: EmbedOptions, given: Given) -> None:
    """Read all rows, then compute the vectors, and write each as soon as it is ready."""
    del given
    use_compilation_cache()
    check_files(options, "embed")
    run, batch_size = load_on_all_devices(options)
    key = options.text_key or getattr(run.config.data, run.config.objective.predicts_from)
    name, rows = read_rows(options, (key,), "embed")
    texts = [text_field(row, key, location) for location, row in rows]
    cut: list[int] = []
    found = run.embeddings(
        texts,
        names=[location for location, _ in rows],
        pooling=options.pooling,
        layer=options.layer,
        normalize=options.normalize,
        batch_size=batch_size,
    )

    def columns() -> Iterator[dict[str, Any]]:
        for vector_D, tokens in found:
            cut.append(tokens)
            yield {"embedding": vector_D if options.output.endswith(".npy") else vector_D.tolist()}

    write_rows(rows, columns(), options.output, "embedding")
    longer = sum(tokens > 0 for tokens in cut)
    note = f"; {counted(longer, 'text')} longer than the model reads cut" if longer else ""
    say(make_console(), f"{counted(len(rows), 'text')} of {name} embedded with {options.workdir}{note}")
