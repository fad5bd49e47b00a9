"""What the commands that use a model or look at runs can be told: generate, attention and report."""

import dataclasses

from transformer.cli.fields import positional, repeated, short
from transformer.cli.reading import Given, read
from transformer.model_config import Weights
from transformer.validation import require

# ---- generate ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt with a run's language model, or translate it with a run's translator.

    Without --prompt and --prompt-file, what is piped in is the prompt: echo ROMEO: | transformer generate RUN
    With nothing piped in, each line that is typed is a prompt, or with --chat a message of a conversation.
    """

    workdir: str = positional("")
    """Directory of the run."""
    step: str = "latest"
    """Of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """Of adapters: directory of the run that they were trained on, if it lies elsewhere now."""
    weights: Weights = ""
    """Type of the model's matrices in memory: int8 (a quarter of float32) or bfloat16 (half); empty means as they are stored."""
    prompt: tuple[str, ...] = repeated()
    """The text to continue, or to translate; an empty one starts a new document. Give it several times for several prompts."""
    prompt_file: str = ""
    """A file whose text is the prompt. Or rows (.jsonl, .csv, .tsv, .parquet, .arrow) with a prompt each, in the column that
    predict reads: they are printed as JSON lines, with what follows each."""
    num_samples: int = 1
    """Language models: continuations of each prompt."""
    stop: tuple[str, ...] = repeated()
    """Language models: the continuation ends before this text. Given several times, before the first of them."""
    chat: bool = False
    """The prompt is a user's message, and what is printed is the reply, by the chat template of an imported model."""
    system: str | None = None
    """With --chat: the system's message before it."""
    max_new_tokens: int = 0
    """Tokens to add at most; 0 means as many as the model's length has room for. A language model goes on past that length and
    then reads the latest tokens alone."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token each time, as a translator always does."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample among the tokens at least this many times as likely as the most likely one; 0 means all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text has (of a translation, the translation) are less likely; 1 changes nothing."""
    beams: int = 0
    """Search with this many beams for the most likely text instead of sampling; 0 does not."""
    length_penalty: float = 1.0
    """Of beams: log-probabilities are divided by the length to this power; 0 compares them whole, more prefers long texts."""
    num_best: int = 1
    """Of beams: how many of the best texts to print, each after a new line."""
    seed: int = 0
    """The same seed gives the same text."""
    draft: str = ""
    """Language models: the run, or folder, of a smaller model with the same vocabulary. It drafts tokens that this one accepts or
    replaces (speculative decoding): another text of the same distribution, sooner where the draft is good."""
    draft_tokens: int = 4
    """With --draft: tokens that it drafts in each round."""


# ---- attention ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Write a page (HTML, without network) that shows a model's attention while it reads a text.

    Every layer and head; whom each token attends to, and who attends to it; what heads do, how unlike each other they are, and
    what they were before training; the model's candidates for each token.
    """

    workdir: str = positional("")
    """Directory of the run, or a pretrained folder."""
    step: str = "latest"
    """Of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """Of adapters: directory of the run that they were trained on, if it lies elsewhere now."""
    text: str = ""
    """The text that the model reads."""
    target: str | None = None
    """Translators: the translation that the decoder reads; without, the model's own. Prefix language models: the text after
    the prefix."""
    output: str = short("-o", "")
    """A new .html file."""
    top_k: int = 8
    """Candidates of each token, or classes, with their probabilities."""
    initial: bool = True
    """Show the model with its initial parameters too; --no-initial saves their memory, and half of the page."""


def parse_attention(arguments: list[str]) -> tuple[AttentionOptions, Given]:
    """The options of `attention`."""
    options, given = read(AttentionOptions(), arguments, "transformer attention")
    require(options.text.strip() != "", f"There must be a text to look at, got {options.text!r}; give --text TEXT.")
    _check_output(options.output)
    require(options.top_k >= 1, f"--top-k must be at least 1, got {options.top_k}.")
    return options, given


# ---- report ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Write a page (HTML, without network) of what runs wrote about themselves, one run or several beside each other.

    Curves of every metric, samples over time, scores of `transformer evaluate`, confusion matrices, where the time went, and the
    settings in which the runs differ. A run may still be at work.
    """

    runs: tuple[str, ...] = positional(())
    """Directories of runs."""
    output: str = short("-o", "")
    """A new .html file."""


def parse_report(arguments: list[str]) -> tuple[ReportOptions, Given]:
    """The options of `report`."""
    options, given = read(ReportOptions(), arguments, "transformer report")
    require(len(options.runs) > 0, "A report needs at least one run, got none; give its directory.")
    _check_output(options.output)
    return options, given


def _check_output(output: str) -> None:
    require(
        output.endswith(".html"),
        f"--output must be the name of a new .html file, got {output!r}; give -o FILE.html.",
    )
