"""The text of tokens as they come: prompt and continuation decoded together, up to a text at which generation ends."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transformer.generation.generate import Generator

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # is shown for a character that still lacks bytes


def stream_text(
    decode: Callable[[list[int]], str], prompt: Iterable[int], tokens: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """Pieces of text whose concatenation is `decode([*prompt, *tokens])`, each as soon as its characters are whole.

    Decoding the two apart would lose what joins them: a space between words, a character whose bytes are in both.

    Args:
        decode: of a tokenizer. Tokens may complete the last characters of those before, and do not change earlier ones.
        prompt: the tokens that the model read. The first piece is their text: as the model read it, which may differ from
            what was typed in case, accents or spaces.
        tokens: those that follow.
        stops: the text ends before the first of these behind the prompt, and no more tokens are taken then. What may be the
            beginning of one waits for the tokens that decide it.
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
    rooms: Sequence[int],
    stop: Sequence[str],
    **options: Any,
) -> list[str]:
    """The text after each prompt of a batch, up to the first of the texts in `stop`.

    Args:
        generator: continues the prompts.
        decode: of a tokenizer.
        prompts: tokens of each row.
        rooms: most tokens to add to each row.
        stop: texts at which a row ends.
        options: other arguments of `Generator.generate`.
    """

    def text_of(row: int, tokens: Any) -> str:
        return behind(decode, prompts[row], tokens[: rooms[row]])

    stopped = (lambda row, tokens: find_stop(text_of(row, tokens), stop) >= 0) if stop else None
    found = generator.generate(prompts, max_new_tokens=max(rooms), stopped=stopped, **options)
    rows = enumerate(zip(found.tokens, found.lengths, strict=True))
    return [cut_at_stop(text_of(row, tokens[:length]), stop) for row, (tokens, length) in rows]


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Where the first of some texts begins in another, -1 if there is none.

    >>> find_stop("a. b; c", [";", "."])
    1
    """
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=-1)


def begun_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of some others.

    >>> begun_stop("a line. E", ["END"]), begun_stop("a line.", ["END"])
    (1, 0)
    """
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some others."""
    end = find_stop(text, stops)
    return text if end < 0 else text[:end]


def behind(decode: Callable[[Any], str], prompt: Any, tokens: Any) -> str:
    """The text of tokens that continue a prompt: a new word, or the end of one."""
    before, whole = decode(prompt), decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else decode(tokens)
