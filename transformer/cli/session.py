"""An interactive session: each line that is typed is a prompt, or a message of a conversation, and is answered as it comes."""

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
"""The pieces of an answer to a text and to its number, from 0."""

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401 (gives `input` a history, and keys that edit)


def hold_session(answer: Answer, what: str, note: Callable[[str], None]) -> None:
    r"""Read and answer until the input ends (Ctrl-D).

    Ctrl-C stops an answer; while a line is typed, it discards that line. A `\` at the end of a line goes on in the next one.

    Args:
        answer: what answers.
        what: a line is called.
        note: tells the user something.
    """
    note(f"type a {what}. Ctrl-C stops a text, Ctrl-D ends; a line that ends with \\ goes on in the next.")
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
    """Print pieces of text as they come; a terminal is shown nothing that it would obey."""
    for piece in pieces:
        sys.stdout.write(printable(piece, lines=True) if sys.stdout.isatty() else piece)
        sys.stdout.flush()


def _typed() -> str:
    """One line, or several of which all but the last end with a backslash; never the prompt mark in what is redirected."""
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
    """Messages so far; where they do not fit any more, the oldest are forgotten, but not the system's."""

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
        """The reply to a message. One that is stopped is part of the conversation, one that fails is not."""
        self._messages.append({"role": "user", "content": text})
        said = ""
        try:
            self._forget()
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

    def _forget(self) -> None:
        """Forget the oldest exchanges until a reply has room."""
        limit = self._run.config.model.max_length
        room = min(self._how[0] or limit, limit // 4)
        forgotten = 0
        while (
            len(self._messages) > 1
            and len(chat_ids(self._run.tokenizer, [*self._system, *self._messages], reply=True)) + room > limit
        ):
            del self._messages[:2]
            forgotten += 2
        if forgotten:
            self._note(
                f"the conversation is longer than the model's {limit:,} tokens: its {forgotten} oldest messages are dropped."
            )
