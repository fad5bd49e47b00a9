"""Options of generate, attention and report."""

import dataclasses

from transformer.cli.fields import positional, repeated, short
from transformer.cli.reading import Given, read
from transformer.model_config import Weights
from transformer.validation import require

# ---- generate ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt with a run's language model, or translate it with a run's translator.

    Without --prompt and --prompt-file, the prompt is standard input: echo ROMEO: | transformer generate RUN
    If standard input is a terminal, each typed line is a prompt, or with --chat a message of a conversation.
    """

    workdir: str = positional("")
    """Directory of the run."""
    step: str = "latest"
    """Step of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """For adapters: directory of their base run, if it has moved."""
    weights: Weights = ""
    """Type of the model's matrices in memory: int8 (a quarter of float32) or bfloat16 (half); empty means their stored type."""
    prompt: tuple[str, ...] = repeated()
    """The text to continue or translate; an empty one starts a new document. Repeat the flag for several prompts."""
    prompt_file: str = ""
    """A file with the prompt as its text. Or a file of rows (.jsonl, .csv, .tsv, .parquet, .arrow), each with a prompt in the
    column that predict reads; the rows and their continuations are printed as JSON lines."""
    num_samples: int = 1
    """Language models: number of continuations of each prompt."""
    stop: tuple[str, ...] = repeated()
    """Language models: end the continuation before this text. Repeat the flag for several texts; the first match counts."""
    chat: bool = False
    """The prompt is a user's message, and the reply is printed; this needs the chat template of an imported model."""
    system: str | None = None
    """With --chat: the system message."""
    max_new_tokens: int = 0
    """Most new tokens; 0 means up to the model's length. Beyond that length, a language model reads only the latest tokens."""
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely token each time, as a translator always does."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample among the tokens at least this many times as likely as the most likely one; 0 means all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occur in the text (for translators, in the translation) become less likely; 1 changes nothing."""
    beams: int = 0
    """Beam search for the most likely text with this many beams; 0 means sampling."""
    length_penalty: float = 1.0
    """With --beams: exponent of the length that divides log-probabilities; 0 does not divide, larger values prefer long texts."""
    num_best: int = 1
    """With --beams: number of best texts to print, each on a new line."""
    seed: int = 0
    """The same seed gives the same text."""
    draft: str = ""
    """Language models: run or folder of a smaller model with the same vocabulary. It drafts tokens, and the model accepts or
    replaces them (speculative decoding). The text differs but has the same distribution; a good draft model saves time."""
    draft_tokens: int = 4
    """With --draft: drafted tokens of each round."""


# ---- attention ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Write a page (HTML, without network) that shows a model's attention while it reads a text.

    The page has every layer and head. It shows the keys that each token attends to, and the tokens that attend to it. It
    measures the behaviour of heads, their differences, and the changes by training. It lists the model's candidates for each
    token.
    """

    workdir: str = positional("")
    """Directory of the run, or a Hugging Face folder."""
    step: str = "latest"
    """Step of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """For adapters: directory of their base run, if it has moved."""
    text: str = ""
    """The text for the model."""
    target: str | None = None
    """Translators: the translation for the decoder; the model's own by default. Prefix language models: the text after the
    prefix."""
    output: str = short("-o", "")
    """A new .html file."""
    top_k: int = 8
    """Number of candidates of each token, or of classes, with their probabilities."""
    initial: bool = True
    """Also show the model with its initial parameters; --no-initial saves their memory and half of the page."""


def parse_attention(arguments: list[str]) -> tuple[AttentionOptions, Given]:
    """Options of `transformer attention`."""
    options, given = read(AttentionOptions(), arguments, "transformer attention")
    require(options.text.strip() != "", f"There must be a text to look at, got {options.text!r}; give --text TEXT.")
    _check_output(options.output)
    require(options.top_k >= 1, f"--top-k must be at least 1, got {options.top_k}.")
    return options, given


# ---- report ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Write a page (HTML, without network) with the metrics, samples and scores of one or several runs.

    The page shows curves of every metric, samples over time, scores of `transformer evaluate`, confusion matrices, the
    time of each phase, and the settings that differ between the runs. A run may still be training.
    """

    runs: tuple[str, ...] = positional(())
    """Directories of runs."""
    output: str = short("-o", "")
    """A new .html file."""


def parse_report(arguments: list[str]) -> tuple[ReportOptions, Given]:
    """Options of `transformer report`."""
    options, given = read(ReportOptions(), arguments, "transformer report")
    require(len(options.runs) > 0, "A report needs at least one run, got none; give its directory.")
    _check_output(options.output)
    return options, given


def _check_output(output: str) -> None:
    require(
        output.endswith(".html"),
        f"--output must be the name of a new .html file, got {output!r}; give -o FILE.html.",
    )
