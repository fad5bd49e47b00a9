"""Options of the commands that read a file row by row: predict, score and embed."""

import dataclasses
from typing import Any, Literal

from transformer.cli.fields import positional, short
from transformer.cli.reading import Given, read
from transformer.model_config import Weights
from transformer.validation import require


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """What they have in common."""

    workdir: str = positional("")
    """Directory of the run, or a Hugging Face folder."""
    step: str = "latest"
    """Of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """Of adapters: directory of the run that they were trained on, if it lies elsewhere now."""
    weights: Weights = ""
    """Type of the model's matrices in memory: int8 (a quarter of float32) or bfloat16 (half); empty means as they are stored."""
    input: str | None = positional(None)
    """The file, or - for standard input."""
    output: str = short("-o", "")
    """A new .jsonl or .csv file; empty means JSON lines on standard output."""
    format: Literal["txt", "jsonl", "csv", "tsv"] = "txt"
    """Of standard input; txt is one text a line. Files have a name that says so."""
    text_key: str = ""
    """Field of the text; empty means the field that training read."""
    batch_size: int = 0
    """Texts that are computed together, those of similar length; 0 means as in training, a multiple of the devices."""


@dataclasses.dataclass(frozen=True)
class PredictOptions(RowOptions):
    """Say what a run's model makes of each text: its class, its translation, its hidden words, or how it goes on.

    INPUT is a .jsonl, .csv, .tsv, .parquet or .arrow file, or any other file with one text a line; it may be compressed (.gz,
    .bz2, .xz, .zst). Without it, or for -, standard input is read. Rows come out in their order, with the columns that they had
    and those that are predicted. All devices of this machine share each batch.
    """

    top_k: int = 1
    """Classifiers and masked models: this many most likely classes, or words for each [MASK], each with its probability.
    Language models that sample: among this many most likely tokens; all, if this is not given."""
    max_new_tokens: int = 0
    """Translators: tokens of a translation at most, 0 means the model's length. Language models: tokens to add at most, 64 if
    this is not given."""
    temperature: float = 0.0
    """Language models: divides the logits of what is drawn; 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Language models that sample: among the most likely tokens that together reach this probability."""
    num_samples: int = 1
    """Language models that sample: this many continuations of each text, each in a column."""
    seed: int = 0
    """Language models that sample: the same seed gives the same text."""
    beams: int = 0
    """Translators and language models: search with this many beams; 0 takes the most likely token each time."""
    length_penalty: float = 1.0
    """Of beams: log-probabilities are divided by the length to this power; 0 compares them whole, more prefers long texts."""
    num_best: int = 1
    """Of beams: this many of the best texts, each with its score."""


@dataclasses.dataclass(frozen=True)
class ScoreOptions(RowOptions):
    """Say how likely a run's model finds each text: its log-probability (nats), perplexity and bits per byte.

    INPUT is as for predict. A language model scores each token given those before it. A translator is also given the
    source, and a masked model all other tokens. With --choices-key, the choices of each row are compared: as continuations of its
    text, or as texts of their own where it has none.
    """

    prompt_key: str = ""
    """Field of a text that is read first and not scored; empty means the field that training read. Rows may lack it."""
    choices_key: tuple[str, ...] = ()
    """Fields of the choices: each a text, or a list of texts."""
    answer_key: str = ""
    """Field of the right choice: its number, from 0, or its text."""
    per_token: bool = False
    """Also write each token, as text, and its log-probability."""
    stride: int = 0
    """A text longer than the model reads is scored in windows, each so many tokens further than the one before; 0 means half of
    the model's length."""


@dataclasses.dataclass(frozen=True)
class EmbedOptions(RowOptions):
    """Make a vector of each text from a model's hidden states.

    INPUT is as for predict. With -o FILE.npy, the vectors are one float32 array [texts, width] in the order of the rows.
    Otherwise each row gets a column `embedding`.
    """

    output: str = short("-o", "")
    """A new .npy, .jsonl or .csv file; empty means JSON lines on standard output."""
    pooling: str = ""
    """mean, first, last or max of a text's tokens, or attention, where the run has learned it; empty means the model's own, or
    the mean."""
    layer: int = 0
    """Layer whose hidden states are pooled, from 1; 0 means the last one, behind the final norm."""
    normalize: bool = False
    """Scale each vector to the length one; the model of a sentence encoder may do so by itself."""


def predict(arguments: list[str]) -> tuple[PredictOptions, Given]:
    """Options of `transformer predict`."""
    return _read(PredictOptions(), arguments, "transformer predict")


def score(arguments: list[str]) -> tuple[ScoreOptions, Given]:
    """Options of `transformer score`."""
    options, given = _read(ScoreOptions(), arguments, "transformer score")
    require(
        not options.choices_key or not options.per_token,
        "--per-token is of single texts; leave it or --choices-key out.",
    )
    require(
        options.answer_key == "" or bool(options.choices_key),
        f"--answer-key names the right one of --choices-key, got {options.answer_key!r} and no choices; give both.",
    )
    return options, given


def embed(arguments: list[str]) -> tuple[EmbedOptions, Given]:
    """Options of `transformer embed`."""
    return _read(EmbedOptions(), arguments, "transformer embed", "npy", "jsonl", "csv")


def _read(default: RowOptions, arguments: list[str], command: str, *suffixes: str) -> tuple[Any, Given]:
    options, given = read(default, arguments, command)
    suffixes = suffixes or ("jsonl", "csv")
    require(
        options.output == "" or options.output.rpartition(".")[2] in suffixes,
        f"--output must be the name of a {' or '.join(f'.{suffix}' for suffix in suffixes)} file, got {options.output!r}.",
    )
    piped = options.input in (None, "-")
    require(
        piped or "format" not in given, "--format is for standard input; a file's name says what it is. Leave it out."
    )
    return options, given
