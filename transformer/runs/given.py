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
from transformer.validation import require

_PLAIN = (bool, int, float, str, type(None))


class Given(NamedTuple):
    """What takes the place of parts that a config names, and what comes on top."""

    model: nn.Module | None = None
    objective: Objective | None = None
    optimizer: optax.GradientTransformation | None = None
    data: Dataset | None = None
    tokenizer: Tokenizer | None = None
    evaluators: Mapping[str, loop.Evaluator] = {}
    writers: Sequence[Writer] = ()
    hooks: Sequence[loop.Hook] = ()

    @classmethod
    def of(
        cls,
        config: Config,
        model: nn.Module | None,
        objective: Objective | None,
        optimizer: optax.GradientTransformation | None,
        data: Dataset | Mapping[str, Iterable[Any]] | Iterable[Any] | None,
        *rest: Any,
    ) -> "Given":
        """As `train` is given them; batches become a dataset."""
        given = cls(model, objective, optimizer, None, *rest)
        return given if data is None else given._replace(data=as_dataset(data, given.applied(config)))

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
    """The qualified name of a function or a class, else of its `update` or of its class, with the settings of a dataclass."""
    owner: Any = getattr(value, "update", value) if isinstance(value, tuple) else value
    kind: Any = owner if hasattr(owner, "__qualname__") else type(owner)
    found = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) and kind is type(owner) else ()
    values = {field.name: getattr(owner, field.name, None) for field in found if field.name not in ("parent", "name")}
    settings = ", ".join(f"{name}={value!r}" for name, value in values.items() if isinstance(value, _PLAIN))
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({settings})" if settings else "")


def compare_given(record: Record | None, given: Given) -> None:
    """Refuse to go on without the objects that a run was made with, or with others.

    Raises:
        UserError: which, and what they were.
    """
    if record is None:
        return
    for name in REPLACING:
        before, now = record.given.get(name, "none"), given.described.get(name, "none")
        remedy = f"give train({name}=...) the same again" if name in record.given else f"leave out {name}="
        require(
            before == now,
            f"A run goes on with the {name} it began with, {record.path.parent.parent} was made with {before}, got {now}; "
            f"{remedy}, or choose another workdir.",
        )


def ask_for(record: Record, **objects: Any) -> None:
    """Refuse to load a run without the objects that it was made with, or with others; its directory holds their names alone.

    Raises:
        UserError: which, and what they were.
    """
    for name, value in objects.items():
        if name == "tokenizer" and "data" in record.given and name not in record.given:
            continue  # it only reads and writes what was trained on as ids
        before, now = record.given.get(name, "none"), "none" if value is None else describe(value)
        remedy = (
            f"in Python, give load or evaluate ({name}=...) the same again"
            if name in record.given
            else f"leave out {name}="
        )
        require(
            before == now,
            f"A run is loaded with the {name} it was made with; {record.path.parent.parent} was made with {before}, got {now}; "
            f"{remedy}.",
        )
