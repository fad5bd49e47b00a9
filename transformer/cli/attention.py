"""`transformer attention RUN --text TEXT -o FILE.html`: a page to look into a model's attention."""

from etils import epath

from transformer.cli.reading import Given
from transformer.cli.using import AttentionOptions
from transformer.runs.attention import attention_page
from transformer.runs.saved import load
from transformer.storage import expand, explained, is_local, write_whole
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained
from transformer.validation import require


@out_of_memory_explained(what="Looking at attention")
def main(options: AttentionOptions, given: Given) -> None:
    """Refuse what cannot be written; then load, look and write."""
    del given
    use_compilation_cache()
    path = epath.Path(expand(options.output))
    require(
        not is_local(path) or path.parent.is_dir(),
        f"--output must be in a folder that is there, {path.parent} is none; make it first.",
    )
    require(
        not path.exists(), f"--output must be a new file, {options.output} exists; choose another name, or remove it."
    )
    run = load(options.workdir, step=options.step, base=options.base)
    how = {"target": options.target, "top_k": options.top_k, "initial": options.initial}
    page = attention_page(run, options.text, name=epath.Path(options.workdir).name, **how)
    with explained(options.output):
        write_whole(path, page)
    say(make_console(), f"{options.output} written, {len(page.encode()) / 1e6:.1f} MB; open it in a browser")
