"""Decodes generated tokens to text together with their prompt, up to a stop text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from transformer.generation.generate import Generator

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoders show it for a character with missing bytes


def stream_text(
    decode: Callable[[list[int]], str], prompt: Iterable[int], tokens: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """Yield pieces of `decode([*prompt, *tokens])`, each as soon as its characters are complete.

    Prompt and tokens are decoded together: a space may separate their words, and a character may have bytes in both.

    Args:
        decode: `decode` of a tokenizer. A token may complete the last characters before it, but does not change earlier ones.
        prompt: the tokens that the model read. The first piece is their text, which may differ from the typed prompt in
            case, accents or spaces.
        tokens: the tokens after the prompt.
        stops: the text ends before the first of these texts after the prompt, and no further token is taken. A possible
            beginning of a stop text waits for the next tokens.
    """
    ids: list[Any] = list(prompt)
    text, written = decode(ids), 0
    begin = len(text.rstrip(_UNFINISHED))
    for token in tokens:
        whole = len(text.rstrip(_UNFINISHED))
        ready = whole - begun_stop(text[begin:whole], stops)
        if ready > written:
            yield text[written:ready]
            written = ready
        ids.append(token)
        text = decode(ids)
        if (end := find_stop(text[begin:], stops)) >= 0:
            text = text[: begin + end]
            break
    yield text[written:]


def generate_texts(
    generator: Generator,
    decode: Callable[[Any], str],
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    stop: Sequence[str],
    **options: Any,
) -> list[str]:
    """The text after each prompt of a batch, up to the first stop text.

    Args:
        generator: continues the prompts.
        decode: `decode` of a tokenizer.
        prompts: tokens of each row.
        limits: most new tokens of each row.
        stop: texts that end a row.
        options: other arguments of `Generator.generate`.
    """

    def text_of(row: int, tokens: Any) -> str:
        return continuation_text(decode, prompts[row], tokens[: limits[row]])

    stopped = (lambda row, tokens: find_stop(text_of(row, tokens), stop) >= 0) if stop else None
    found = generator.generate(prompts, max_new_tokens=max(limits), stopped=stopped, **options)
    rows = enumerate(zip(found.tokens, found.lengths, strict=True))
    return [cut_at_stop(text_of(row, tokens[:length]), stop) for row, (tokens, length) in rows]


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Index in `text` at which the first stop text begins, -1 if there is none.

    >>> find_stop("a. b; c", [";", "."])
    1
    """
    return min((index for stop in stops if (index := text.find(stop)) >= 0), default=-1)


def begun_stop(text: str, stops: Sequence[str]) -> int:
    """Number of characters at the end of a text that may begin a stop text.

    >>> begun_stop("a line. E", ["END"]), begun_stop("a line.", ["END"])
    (1, 0)
    """
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text."""
    end = find_stop(text, stops)
    return text if end < 0 else text[:end]


def continuation_text(
    decode: Callable[[Any], str], prompt: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray
) -> str:
    """The text of tokens after a prompt; it may begin within a word."""
    before, whole = decode(prompt), decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else decode(tokens)
