"""Conversations as text and as tokens: a pretrained model's chat template, rendered in a sandbox."""

import dataclasses
import datetime
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from transformer.config_io import from_json
from transformer.data.tokenizers.base import Tokenizer
from transformer.data.tokenizers.pretrained import CHAT_FILE
from transformer.types import UserError
from transformer.validation import Settings, require, require_installed, shown

try:
    import jinja2  # pyright: ignore[reportMissingImports]
    import jinja2.ext  # pyright: ignore[reportMissingImports]
    import jinja2.sandbox  # pyright: ignore[reportMissingImports]
except ImportError:
    jinja2: Any = None

_SECONDS = 5.0  # time limit of a template
_LONGEST = 2**24  # most characters of a template's output

Messages = Sequence[Mapping[str, Any]]
"""The messages of a conversation in order, each with a `role` (system, user, assistant) and its `content`."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate(Settings):
    """The Jinja templates that write a conversation as a model's text."""

    templates: dict[str, str]
    """Templates by name; `default` is used."""
    tokens: dict[str, str]
    """Variables of the templates besides the messages, such as bos_token."""

    def render(self, messages: Messages, *, reply: bool = False) -> str:
        """The text of a conversation, as `transformers.AutoTokenizer.apply_chat_template` makes it.

        Args:
            messages: the conversation.
            reply: the text ends where an assistant's reply begins (`add_generation_prompt`).

        Raises:
            UserError: the template refuses the messages, fails, or takes too long.
        """
        require(
            "default" in self.templates,
            f"A chat template must be named default, there are {', '.join(map(repr, self.templates)) or 'none'}.",
        )
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": reply, **self.tokens}
        try:
            return _limited(_compiled(self.templates["default"]), json.loads(json.dumps(given)))
        except UserError:
            raise
        except Exception as error:  # a template can raise anything
            text = str(error).partition("\n")[0]
            raise UserError(f"The chat template failed on {len(messages)} messages: {text:.200}") from None


def chat_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a run's tokenizer.

    Raises:
        UserError: the tokenizer has none.
    """
    content = getattr(tokenizer, "chat_file", b"")
    require(
        len(content) > 0,
        f"Conversations need a chat template, which comes with a pretrained tokenizer; the tokenizer {tokenizer.kind!r} of this "
        "run has none. Start from an imported model that has one.",
    )
    return _parsed(content)


@functools.lru_cache(4)
def _parsed(content: bytes) -> ChatTemplate:
    return from_json(ChatTemplate, content, CHAT_FILE)


def chat_ids(tokenizer: Any, messages: Messages, *, reply: bool = False) -> Int[np.ndarray, " n"]:
    """Ids of a conversation; the names of special tokens become these tokens, in messages too."""
    return tokenizer.encode(chat_of(tokenizer).render(messages, reply=reply), special=True)


def learnt_ids(tokenizer: Any, messages: Messages) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Ids of a conversation, and a mask of the assistant's tokens.

    The assistant's text is what its message adds to the text that ends where the reply begins. A token that spans both parts
    counts as the assistant's.

    Raises:
        UserError: the template rewrites earlier messages when others follow.
    """
    template = chat_of(tokenizer)
    whole = template.render(messages)
    encode = functools.partial(tokenizer.encode, special=True)
    ids = encode(whole)
    learnt = np.zeros(len(ids), bool)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:index], reply=True)
        after = template.render(messages[: index + 1])
        for text in (before, after):
            require(
                whole.startswith(text),
                "A chat template must write the messages before a reply alike whatever follows them, to locate the reply, "
                f"this one does not at message {index + 1}: {_difference(whole, text)}. Such a conversation cannot be learnt "
                "from; split it into one for each reply, or change the template.",
            )
        learnt[_common(encode(before), ids) : _common(encode(after), ids)] = True
    return ids, learnt


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The length of the common prefix of two sequences of ids."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _difference(whole: str, text: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), min(len(whole), len(text)))
    return f"{shown(text[start : start + 30])} instead of {shown(whole[start : start + 30])}"


# ---- The sandbox -----------------------------------------------------------------------------------------------------


def _limited(template: Any, given: dict[str, Any]) -> str:
    """Render within the limits: a template comes with a model, and a model may come from anybody."""
    deadline, before = time.monotonic() + _SECONDS, sys.gettrace()

    def watch(frame: Any, event: str, argument: Any) -> Any:
        del frame, event, argument
        if time.monotonic() > deadline:
            raise UserError(
                f"A chat template must be done in {_SECONDS:g} seconds, this one was not; its loops may be endless."
            )
        return watch

    pieces, length = list[str](), 0
    sys.settrace(watch)
    try:
        for piece in template.generate(**given):
            pieces.append(piece)
            length += len(piece)
            require(
                length <= _LONGEST, f"A chat template must write at most {_LONGEST:,} characters, this one writes more."
            )
    finally:
        sys.settrace(before)
    return "".join(pieces)


@functools.lru_cache(8)
def _compiled(text: str) -> Any:
    """A template with the functions and extensions that `transformers` provides."""
    require_installed(jinja2, "jinja2", "chat")

    def fail(message: str) -> None:
        raise UserError(f"The chat template refuses these messages: {message!s:.200}")

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks replies in some templates; rendered as its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that begin with an underscore, such as the internal attributes of Python objects."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *others = args
            names = dict(*others, **kwargs)
            for name in names:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, names)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"a name in a namespace may not begin with an underscore: {name!s:.40}"
                )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": fail,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": Namespace,
    }
    return environment.from_string(text)
