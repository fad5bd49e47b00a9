"""Options of the commands for rows of a file: predict, score and embed."""

import dataclasses
from typing import Any, Literal

from transformer.cli.fields import positional, short
from transformer.cli.reading import Given, read
from transformer.model_config import Weights
from transformer.validation import require


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """Common options."""

    workdir: str = positional("")
    """Directory of the run, or a Hugging Face folder."""
    step: str = "latest"
    """Step of the checkpoint: latest, best (by validation loss), or a number."""
    base: str = ""
    """For adapters: directory of their base run, if it has moved."""
    weights: Weights = ""
    """Type of the model's matrices in memory: int8 (a quarter of float32) or bfloat16 (half); empty means their stored type."""
    input: str | None = positional(None)
    """The file, or - for standard input."""
    output: str = short("-o", "")
    """A new .jsonl or .csv file; empty means JSON lines on standard output."""
    format: Literal["txt", "jsonl", "csv", "tsv"] = "txt"
    """Format of standard input; txt means one text per line. For a file, its name gives the format."""
    text_key: str = ""
    """Field of the text; empty means the field that training read."""
    batch_size: int = 0
    """Texts of a batch, of similar lengths; 0 means the training's batch size, rounded up to a multiple of the devices."""


@dataclasses.dataclass(frozen=True)
class PredictOptions(RowOptions):
    """Predict the class, translation, masked words or continuation of each text with a run's model.

    INPUT is a .jsonl, .csv, .tsv, .parquet or .arrow file, or any other file with one text per line; it may be compressed (.gz,
    .bz2, .xz, .zst). Without INPUT, or for -, standard input is read. The output has all rows in order, with their own and the
    predicted columns. All devices of this machine share each batch.
    """

    top_k: int = 1
    """Classifiers and masked models: number of most likely classes, or of words for each [MASK], with their probabilities.
    Sampling with language models: sample among this many most likely tokens; all by default."""
    max_new_tokens: int = 0
    """Translators: most tokens of a translation; 0 means the model's length. Language models: most new tokens, 64 by
    default."""
    temperature: float = 0.0
    """Language models: divisor of the logits before sampling; 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Sampling with language models: sample among the most likely tokens that together reach this probability."""
    num_samples: int = 1
    """Sampling with language models: number of continuations of each text, each in its own column."""
    seed: int = 0
    """Sampling with language models: the same seed gives the same text."""
    beams: int = 0
    """Translators and language models: search with this many beams; 0 takes the most likely token each time."""
    length_penalty: float = 1.0
    """With --beams: exponent of the length that divides log-probabilities; 0 does not divide, larger values prefer long texts."""
    num_best: int = 1
    """With --beams: number of best texts, each with its score."""


@dataclasses.dataclass(frozen=True)
class ScoreOptions(RowOptions):
    """Score each text with a run's model: its log-probability (nats), perplexity and bits per byte.

    INPUT is as for predict. A language model scores each token given the previous tokens, a translator also given the source,
    and a masked model given all other tokens. With --choices-key, the choices of each row are compared as continuations of the
    row's text, or as whole texts if the row has no text.
    """

    prompt_key: str = ""
    """Field of a prompt, which is read but not scored; empty means the field that training read. Rows may lack it."""
    choices_key: tuple[str, ...] = ()
    """Fields of the choices; each has a text or a list of texts."""
    answer_key: str = ""
    """Field of the right choice: its number, from 0, or its text."""
    per_token: bool = False
    """Also write the text and the log-probability of each token."""
    stride: int = 0
    """Texts longer than the model's length are scored in windows, each this many tokens after the previous one; 0 means half
    of the model's length."""


@dataclasses.dataclass(frozen=True)
class EmbedOptions(RowOptions):
    """Compute a vector of each text from a model's hidden states.

    INPUT is as for predict. With -o FILE.npy, the vectors are one float32 array [texts, width] in the order of the rows.
    Otherwise each row gets a column `embedding`.
    """

    output: str = short("-o", "")
    """A new .npy, .jsonl or .csv file; empty means JSON lines on standard output."""
    pooling: str = ""
    """How a text's tokens become a vector: mean, first, last, max, or attention if the run has trained it. Empty means the
    model's own pooling, or the mean."""
    layer: int = 0
    """Layer of the pooled hidden states, from 1; 0 means the last one, after the final norm."""
    normalize: bool = False
    """Scale each vector to length one; some sentence encoders always do so."""


def predict(arguments: list[str]) -> tuple[PredictOptions, Given]:
    """Options of `transformer predict`."""
    return _read(PredictOptions(), arguments, "transformer predict")


def score(arguments: list[str]) -> tuple[ScoreOptions, Given]:
    """Options of `transformer score`."""
    options, given = _read(ScoreOptions(), arguments, "transformer score")
    require(
        not options.choices_key or not options.per_token,
        "--per-token is for single texts; leave it or --choices-key out.",
    )
    require(
        options.answer_key == "" or bool(options.choices_key),
        f"--answer-key names the right choice, got {options.answer_key!r} without --choices-key; give both.",
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
        piped or "format" not in given, "--format is for standard input; a file's name gives its format. Leave it out."
    )
    return options, given
