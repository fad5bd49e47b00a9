"""An interactive session: each typed line is a prompt, or a message of a conversation, and is answered."""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any

from transformer.cli.fields import as_flags
from transformer.cli.options import OPTIONS
from transformer.data.files import without_surrogates
from transformer.data.tokenizers.chat import chat_ids
from transformer.runs.saved import Loaded
from transformer.terminal import printable
from transformer.types import UserError

Answer = Callable[[str, int], Generator[str]]
"""Gives the pieces of the answer to a text and its number, from 0."""

with contextlib.suppress(ImportError):  # Windows has no readline
    import readline  # noqa: F401 (gives `input` a history, and keys that edit)


def hold_session(answer: Answer, what: str, note: Callable[[str], None]) -> None:
    r"""Read and answer until the input ends (Ctrl-D).

    Ctrl-C stops an answer or discards the typed line. A line that ends with `\` continues on the next one.

    Args:
        answer: gives the answer to a line.
        what: name of a line, for the user.
        note: prints a note to the user.
    """
    note(f"type a {what}. Ctrl-C stops a text, Ctrl-D ends; a line that ends with \\ continues on the next.")
    turn = 0
    while True:
        try:
            text = _typed()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text.strip() == "":
            continue
        try:
            with contextlib.closing(answer(text, turn)) as pieces:
                write(pieces)
            print()
        except KeyboardInterrupt:
            print(" [stopped]")
        except UserError as error:
            message = as_flags(str(error), OPTIONS["generate"].flags())
            print(f"error: {printable(message, lines=True)}", file=sys.stderr, flush=True)
        turn += 1


def write(pieces: Iterable[str]) -> None:
    """Print pieces of text as they arrive; control characters are escaped on a terminal."""
    for piece in pieces:
        sys.stdout.write(printable(piece, lines=True) if sys.stdout.isatty() else piece)
        sys.stdout.flush()


def _typed() -> str:
    """One typed line, or several joined by backslashes; the prompt mark never goes to redirected standard output."""
    lines: list[str] = []
    while True:
        mark = "... " if lines else "> "
        if not sys.stdout.isatty():
            print(mark, end="", file=sys.stderr, flush=True)
            mark = ""
        line = without_surrogates(input(mark))
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


class Conversation:
    """The messages so far; if they exceed the model's length, the oldest are dropped, except the system message."""

    def __init__(
        self,
        run: Loaded,
        system: list[dict[str, str]],
        how: tuple[int, Any],
        seed: int,
        options: dict[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self._run, self._how, self._seed, self._options, self._note = run, how, seed, options, note
        self._system, self._messages = system, list[dict[str, str]]()

    def answer(self, text: str, turn: int) -> Generator[str]:
        """The reply to a message. A stopped reply stays in the conversation, a failed one does not."""
        self._messages.append({"role": "user", "content": text})
        said = ""
        try:
            self._drop_oldest()
            messages, seed = [*self._system, *self._messages], self._seed + turn
            for piece in self._run.config.objective.reply(
                self._run, messages, *self._how, seed, self._note, **self._options
            ):
                said += piece
                yield piece
        except UserError:
            self._messages.pop()
            raise
        except (KeyboardInterrupt, GeneratorExit):
            self._messages.append({"role": "assistant", "content": said})
            raise
        self._messages.append({"role": "assistant", "content": said})

    def _drop_oldest(self) -> None:
        """Drop the oldest messages with their replies until a new reply fits, unless the last message is too long alone."""
        limit = self._run.config.model.max_length
        reserved = min(self._how[0] or limit, limit // 4)
        dropped = room = 0
        for dropped in range(0, len(self._messages), 2):
            messages = [*self._system, *self._messages[dropped:]]
            room = limit - len(chat_ids(self._run.tokenizer, messages, reply=True))
            if room >= reserved:
                break
        if room < 1:
            return  # the last message alone is too long: it is refused, and the conversation stays
        if dropped:
            del self._messages[:dropped]
            self._note(
                f"the conversation is longer than the model's {limit:,} tokens: its {dropped} oldest messages are dropped."
            )
