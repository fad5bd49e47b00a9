"""`transformer attention RUN --text TEXT -o FILE.html`: write a page about a model's attention."""

from etils import epath

from transformer.cli.pages import new_page, write_page
from transformer.cli.reading import Given
from transformer.cli.using import AttentionOptions
from transformer.runs.attention import attention_page
from transformer.runs.saved import load
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained


@out_of_memory_explained(what="Computing attention")
def main(options: AttentionOptions, given: Given) -> None:
    """Check the output path, load the model, compute its attention, and write the page."""
    del given
    use_compilation_cache()
    path = new_page(options.output)
    run = load(options.workdir, step=options.step, base=options.base)
    how = {"target": options.target, "top_k": options.top_k, "initial": options.initial}
    page = attention_page(run, options.text, name=epath.Path(options.workdir).name, **how)
    write_page(path, page)
