"""Objects passed to a run besides its config: their names are recorded in its directory, and required again later."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import optax

from transformer.config import Config
from transformer.data.batches import BatchData
from transformer.data.datasets import Dataset
from transformer.data.tokenizers import Tokenizer
from transformer.objective import Objective
from transformer.runs.directory import Record
from transformer.training import loop
from transformer.training.writers import Writer
from transformer.validation import require, shown

_OF_A_TOKENIZER = ("kind", "vocab_size", "token_bytes", "end_of_text", "encode", "decode")
_PLAIN = (bool, int, float, str, type(None))


class Given(NamedTuple):
    """Objects that replace parts named in a config, and additional ones."""

    model: nn.Module | None = None
    objective: Objective | None = None
    optimizer: optax.GradientTransformation | None = None
    data: Any = None
    """A `Dataset`, once the object is `opened`."""
    tokenizer: Tokenizer | None = None
    evaluators: Mapping[str, loop.Evaluator] = {}
    writers: Sequence[Writer] = ()
    hooks: Sequence[loop.Hook] = ()

    def opened(self, config: Config) -> "Given":
        """The same objects, checked, with batches converted to a dataset."""
        self.check()
        return self if self.data is None else self._replace(data=as_dataset(self.data, self.applied(config)))

    def check(self) -> None:
        """Require that each object has the type that its argument expects."""
        for name in ("model", "objective", "tokenizer"):
            value = getattr(self, name)
            require(
                not isinstance(value, type),
                f"{name}= must be an object, got the class {describe(value)}; call it ({name}=...()).",
            )
        model, objective, optimizer = self.model, self.objective, self.optimizer
        require(model is None or isinstance(model, nn.Module), f"model= must be a linen module, got {shown(model)}.")
        require(
            objective is None or isinstance(objective, Objective),
            f"objective= must be a transformer.Objective, got {shown(objective)}.",
        )
        require(
            optimizer is None or (hasattr(optimizer, "init") and hasattr(optimizer, "update")),
            f"optimizer= must be an optax transformation, such as optax.sgd(0.1), got {shown(optimizer)}; an optimizer of the "
            "config's kinds belongs into Config(optimizer=...).",
        )
        lacking = [name for name in _OF_A_TOKENIZER if self.tokenizer is not None and not hasattr(self.tokenizer, name)]
        require(
            not lacking,
            f"tokenizer= must have {', '.join(_OF_A_TOKENIZER)}, {shown(self.tokenizer)} lacks {', '.join(lacking)}.",
        )
        if self.tokenizer is not None:
            sizes = (len(self.tokenizer.token_bytes), self.tokenizer.vocab_size)
            require(
                sizes[0] == sizes[1],
                f"tokenizer= must have token_bytes for each of its vocab_size ids, got {sizes[0]} for {sizes[1]}.",
            )
        require(
            isinstance(self.evaluators, Mapping) and all(map(callable, self.evaluators.values())),
            f"evaluators= must be functions by name, such as {{'mine': function}}, got {shown(self.evaluators)}.",
        )
        require(
            isinstance(self.hooks, Sequence) and all(map(callable, self.hooks)),
            f"hooks= must be a list of functions, got {shown(self.hooks)}.",
        )
        require(
            isinstance(self.writers, Sequence) and all(hasattr(writer, "write") for writer in self.writers),
            f"writers= must be a list of objects with write, resume and close, got {shown(self.writers)}.",
        )

    def applied(self, config: Config) -> Config:
        """The config with the given objective, if any."""
        return config if self.objective is None else dataclasses.replace(config, objective=self.objective)

    @property
    def described(self) -> dict[str, str]:
        """The name of each object that replaces a part of the config, by its argument."""
        objects = self._asdict().items()
        return {name: describe(value) for name, value in objects if name in REPLACING and value is not None}


def as_dataset(data: Dataset | Mapping[str, Iterable[Any]] | Iterable[Any], config: Config) -> Dataset:
    """The data passed to a run; batches become a dataset."""
    if not isinstance(data, Dataset):
        data = BatchData(data)
    return data.for_run(config) if isinstance(data, BatchData) else data


NOTHING = Given()
REPLACING = ("model", "objective", "optimizer", "data", "tokenizer")
"""The arguments that replace a part of the config."""


def describe(value: object) -> str:
    """The qualified name of a function or a class, else of its `update` or its class, with the settings of a dataclass.

    Settings are numbers, texts, functions, and tuples and dataclasses of them; other contents of an object are omitted.
    """
    owner: Any = getattr(value, "update", value) if isinstance(value, tuple) and hasattr(value, "update") else value
    kind: Any = owner if hasattr(owner, "__qualname__") else type(owner)
    found = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) and kind is type(owner) else ()
    values = {field.name: getattr(owner, field.name, None) for field in found if field.name not in ("parent", "name")}
    settings = ", ".join(f"{name}={text}" for name, value in values.items() if (text := _setting(value)))
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({settings})" if settings else "")


def _setting(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_setting, value))})"
    return describe(value) if callable(value) or dataclasses.is_dataclass(value) else ""


def _same(before: str, now: str) -> bool:
    """Whether two descriptions name one object; a script that is run calls its own module `__main__`."""
    names = [name.removeprefix("__main__.") for name in (before, now)]
    return before == now or any(long.endswith(f".{short}") for long, short in (names, names[::-1]))


def compare_given(record: Record | None, given: Given) -> None:
    """Refuse to continue a run without the objects that it was made with, or with others.

    Raises:
        UserError: the objects differ; the message names them.
    """
    if record is not None:
        now = given.described
        _compare(
            record,
            REPLACING,
            now,
            "continues with the {} it began with,",
            "give train({}=...)",
            ", or choose another workdir",
        )


def ask_for(record: Record, given: Given) -> None:
    """Refuse to load a run without the objects that it was made with, or with others; its directory has only their names.

    Raises:
        UserError: the objects differ; the message names them.
    """
    names = ["model", "objective"]
    if (
        "data" not in record.given or "tokenizer" in record.given
    ):  # otherwise the tokenizer only converts the ids that were trained on
        names.append("tokenizer")
    now = given.described
    _compare(record, names, now, "is loaded with the {} it was made with;", "in Python, give load or evaluate ({}=...)")


def _compare(
    record: Record, names: Iterable[str], described: Mapping[str, str], rule: str, give: str, others: str = ""
) -> None:
    """Compare the given objects with those that a run was made with, by argument; `rule` and `give` are parts of the message."""
    for name in names:
        before, now = record.given.get(name, "none"), described.get(name, "none")
        remedy = f"{give.format(name)} the same again" if name in record.given else f"leave out {name}="
        require(
            _same(before, now),
            f"A run {rule.format(name)} {record.path.parent.parent} was made with {before}, got {now}; {remedy}{others}.",
        )
