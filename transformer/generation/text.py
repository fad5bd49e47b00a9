"""The text of tokens as they come: prompt and continuation decoded together."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def stream_text(decode: Callable[[list[int]], str], prompt: Iterable[int], tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text whose concatenation is `decode([*prompt, *tokens])`, each as soon as its characters are whole.

    Decoding the two apart would lose what joins them: a space between words, a character whose bytes are in both.

    Args:
        decode: of a tokenizer. Tokens may complete the last characters of those before, and do not change earlier ones.
        prompt: the tokens that the model read. The first piece is their text: as the model read it, which may differ from
            what was typed in case, accents or spaces.
        tokens: those that follow.
    """
    ids: list[Any] = list(prompt)
    text, written = decode(ids), 0
    for token in tokens:
        # The last character may still lack bytes: it is shown as U+FFFD until they come.
        whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        if whole > written:
            yield text[written:whole]
            written = whole
        ids.append(token)
        text = decode(ids)
    yield text[written:]
