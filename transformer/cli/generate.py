"""`transformer generate DIR --prompt TEXT`: continue a prompt with a run's model as it comes, or translate it."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from transformer.cli.options import GenerateOptions, Given, refuse
from transformer.data.files import decode_utf8
from transformer.data.forms import source_tokens
from transformer.data.tokenizers import Tokenizer, source_tokenizer
from transformer.generation.generate import stream
from transformer.generation.sampling import SamplingConfig
from transformer.generation.text import stream_text
from transformer.generation.translate import translate
from transformer.models.decoder import Decoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.runs.saved import Loaded, load
from transformer.terminal import printable
from transformer.training.out_of_memory import explained
from transformer.validation import require

_NO_TEXT, _ON_INPUT = "A prompt must be text in UTF-8, ", "that on standard input"


@explained(what="Generating")
def main(options: GenerateOptions, given: Given) -> None:
    """Print the prompt as the model read it and its continuation, a character as soon as it is whole; or a translation.

    A terminal is shown nothing that it would obey; a file or a pipe gets the text as it is.
    """
    sampling = SamplingConfig(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    prompt = _text(options.prompt, "--prompt") if options.prompt is not None else _piped()
    run = load(options.workdir, step=options.step)
    if isinstance(run.model, EncoderDecoder):
        _refuse_unused(given, "a translator takes the most likely token each time")
        pieces: Iterable[str] = [_translate(run, prompt, options.max_new_tokens)]
    else:
        require(
            isinstance(run.model, Decoder),
            f"A run that generates must be a language model or a translator, {options.workdir} is one of "
            f"{run.config.objective.kind}; `transformer evaluate` scores it.",
        )
        if sampling.greedy:
            _refuse_unused(given, "the most likely token is taken each time")
        pieces = _continue(run, prompt, options, sampling)
    for piece in itertools.chain(pieces, "\n"):
        sys.stdout.write(printable(piece, lines=True) if sys.stdout.isatty() else piece)
        sys.stdout.flush()


def _piped() -> str:
    """What is piped in, without its last newline; nothing where a person sits at the keyboard."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return _text(sys.stdin.read(), _ON_INPUT).removesuffix("\n")
    except UnicodeDecodeError as error:
        return decode_utf8(error.object, _NO_TEXT + _ON_INPUT)


def _text(prompt: str, name: str) -> str:
    """A prompt; one with bytes that are no UTF-8, for which Python puts surrogates, is refused."""
    return decode_utf8(prompt.encode("utf-8", "surrogateescape"), _NO_TEXT + name)


def _refuse_unused(given: Given, because: str) -> None:
    """Where nothing is drawn: refuse flags that say how to draw, and take those that say that nothing is drawn."""
    fine = {"temperature": (0.0,), "top_k": (0, 1), "top_p": (1.0,), "seed": ()}
    if given.get("top_k") == 1:
        fine["temperature"] = (given.get("temperature"),)
    unused = {name: given[name] for name in fine if name in given and given[name] not in fine[name]}
    refuse(unused, lambda name: f"{given[name]} means nothing here: {because}; leave it out.")


def _translate(run: Loaded, prompt: str, max_new_tokens: int) -> str:
    """The translation of a text; a note says what of it was not read."""
    reader, room = source_tokenizer(run.tokenizer), run.config.data.sequence_length
    tokens = reader.encode(prompt)
    require(
        prompt.strip() != "" and len(tokens) > 0,
        f"A translator needs a text to translate, got {prompt!r}; give --prompt, or pipe it in.",
    )
    _note_unknown(reader, tokens)
    source = source_tokens(reader, prompt, run.config.data)
    if len(source) - 1 < len(tokens):
        parts = {"head": "the first", "tail": "the last", "head_tail": "the first and last"}[run.config.data.truncate]
        _note(
            f"the model reads {len(source) - 1} of the text's {len(tokens)} tokens, {parts} ones; the others were cut."
        )
    length = max_new_tokens or room
    require(0 < length <= room, f"--max-new-tokens must be at most the model's {room}, got {length}.")
    (target,) = translate(run.model, run.params, [source], end_of_text=run.tokenizer.end_of_text, max_new_tokens=length)
    return run.tokenizer.decode(target)


def _continue(run: Loaded, text: str, options: GenerateOptions, sampling: SamplingConfig) -> Iterator[str]:
    """The pieces of a prompt and its continuation."""
    tokenizer = run.tokenizer
    prompt = [tokenizer.end_of_text, *tokenizer.encode(text).tolist()]
    room = run.config.model.max_length - len(prompt)
    require(
        0 <= options.max_new_tokens <= room and room > 0,
        f"A prompt of {len(prompt)} tokens (with the one that starts a document) leaves room for {max(room, 0)} of the "
        f"model's {run.config.model.max_length}, --max-new-tokens is {options.max_new_tokens}; shorten the prompt or ask for "
        "fewer.",
    )
    _note_unknown(tokenizer, prompt)
    tokens = stream(
        run.model,
        run.params,
        prompt,
        max_new_tokens=options.max_new_tokens or room,
        sampling=sampling,
        seed=options.seed,
        end_of_text=tokenizer.end_of_text,
    )
    return stream_text(tokenizer.decode, prompt, tokens)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _note_unknown(tokenizer: Tokenizer, tokens: Any) -> None:
    """Words or characters that training did not see all look alike to the model."""
    unknown = int(np.sum(np.asarray(tokens) == getattr(tokenizer, "unknown", -1)))
    if unknown:
        _note(
            f"{unknown} of the prompt's {len(tokens)} tokens are not in the model's vocabulary, and are read as unknown."
        )
