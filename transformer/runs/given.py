"""What a caller brings to a run besides its config: noted by name in its directory, and asked for again."""

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
    """What takes the place of parts that a config names, and what comes on top."""

    model: nn.Module | None = None
    objective: Objective | None = None
    optimizer: optax.GradientTransformation | None = None
    data: Any = None
    """A `Dataset`, once it is `opened`."""
    tokenizer: Tokenizer | None = None
    evaluators: Mapping[str, loop.Evaluator] = {}
    writers: Sequence[Writer] = ()
    hooks: Sequence[loop.Hook] = ()

    def opened(self, config: Config) -> "Given":
        """The same, checked, and with a dataset in the place of batches."""
        self.check()
        return self if self.data is None else self._replace(data=as_dataset(self.data, self.applied(config)))

    def check(self) -> None:
        """Raise UserError unless each is what its argument takes."""
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
        """The config with the objective that takes the place of its own."""
        return config if self.objective is None else dataclasses.replace(config, objective=self.objective)

    @property
    def described(self) -> dict[str, str]:
        """What each object that takes a place is called, by the name of its argument."""
        objects = self._asdict().items()
        return {name: describe(value) for name, value in objects if name in REPLACING and value is not None}


def as_dataset(data: Dataset | Mapping[str, Iterable[Any]] | Iterable[Any], config: Config) -> Dataset:
    """What a caller gives as the data of a run; batches become a dataset."""
    if not isinstance(data, Dataset):
        data = BatchData(data)
    return data.for_run(config) if isinstance(data, BatchData) else data


NOTHING = Given()
REPLACING = ("model", "objective", "optimizer", "data", "tokenizer")
"""What takes the place of a part of the config."""


def describe(value: Any) -> str:
    """The qualified name of a function or a class, else of its `update` or of its class, with the settings of a dataclass.

    Settings are numbers, texts, functions, and tuples and dataclasses of them; what else an object holds is not told.
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
    """Whether two descriptions are of one object; a script that is run calls its own module `__main__`."""
    names = [name.removeprefix("__main__.") for name in (before, now)]
    return before == now or any(long.endswith(f".{short}") for long, short in (names, names[::-1]))


def compare_given(record: Record | None, given: Given) -> None:
    """Refuse to go on without the objects that a run was made with, or with others.

    Raises:
        UserError: which, and what they were.
    """
    if record is not None:
        now = given.described
        _compare(
            record,
            REPLACING,
            now,
            "goes on with the {} it began with,",
            "give train({}=...)",
            ", or choose another workdir",
        )


def ask_for(record: Record, given: Given) -> None:
    """Refuse to load a run without the objects that it was made with, or with others; its directory holds their names alone.

    Raises:
        UserError: which, and what they were.
    """
    names = ["model", "objective"]
    if (
        "data" not in record.given or "tokenizer" in record.given
    ):  # else it only reads and writes what was trained on as ids
        names.append("tokenizer")
    now = given.described
    _compare(record, names, now, "is loaded with the {} it was made with;", "in Python, give load or evaluate ({}=...)")


def _compare(
    record: Record, names: Iterable[str], described: Mapping[str, str], rule: str, give: str, others: str = ""
) -> None:
    """Compare what is given with what a run was made with, by the names of arguments; the words are of the message."""
    for name in names:
        before, now = record.given.get(name, "none"), described.get(name, "none")
        remedy = f"{give.format(name)} the same again" if name in record.given else f"leave out {name}="
        require(
            _same(before, now),
            f"A run {rule.format(name)} {record.path.parent.parent} was made with {before}, got {now}; {remedy}{others}.",
        )
