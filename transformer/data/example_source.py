"""Labelled texts and pairs in splits; a missing validation split is taken from the training split."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transformer.data.source import Converted, ExampleSource
from transformer.data.splits import SPLIT_RULE, hold_out
from transformer.validation import counted, require


def example_source(
    name: str,
    identify: Callable[..., str],
    sizes: Mapping[str, int],
    class_names: tuple[str, ...],
    open_split: Callable[[str], tuple[Sequence[Any], Callable[[Any], Any]]],
    labels: Callable[[], Any],
    validation_fraction: float,
    note: str = "",
    tokens: Callable[[str, Any, bool], tuple[Sequence[Any], Callable[[Any], Any]] | None] | None = None,
) -> ExampleSource:
    """Examples with their splits, and a fixed fraction of training as validation if that split is missing.

    Args:
        name: for messages.
        identify: returns a hash of the examples and of its arguments.
        sizes: the number of examples of each split.
        class_names: in the order of their numbers.
        open_split: returns the stored examples of a split, and a function that converts one to an example.
        labels: the class of each training example; None for pairs.
        validation_fraction: the fraction that is held out.
        note: further lines for the user.
        tokens: opens the stored tokens of a split (`ExampleSource.tokens`), with a function that numbers the class of an example.
    """
    sizes, taken = dict(sizes), np.zeros(0, np.int64)
    carved = "train" in sizes and "validation" not in sizes and validation_fraction > 0
    if carved:
        of_train = labels()
        classes = np.zeros(sizes["train"], np.int64) if of_train is None else np.asarray(of_train)
        taken = hold_out(classes, validation_fraction)
        sizes |= {"train": sizes["train"] - len(taken), "validation": len(taken)}

    def part_of(split: str, stored: Sequence[Any], convert: Callable[[Any], Any]) -> Sequence[Any]:
        if not carved or split not in ("train", "validation"):
            return Converted(stored, convert)
        held_out = np.zeros(len(stored), bool)
        held_out[taken] = True
        return Converted(stored, convert, np.flatnonzero(held_out if split == "validation" else ~held_out))

    def stored_as(split: str) -> str:
        return "train" if carved and split == "validation" else split

    def open_tokens(split: str, tokenizer: Any, store: bool) -> Sequence[Any] | None:
        found = tokens(stored_as(split), tokenizer, store) if tokens else None
        return found and part_of(split, *found)

    description = f"{name}: " + ", ".join(f"{split} {counted(count, 'example')}" for split, count in sizes.items())
    if class_names:
        description += f"; classes {', '.join(class_names)}"
    fingerprint = identify(SPLIT_RULE, *(part for size in sizes.items() for part in size))  # how much is held out
    lines = "\n".join(filter(None, (description, note)))
    return ExampleSource(
        name,
        fingerprint,
        sizes,
        lines,
        lambda split: part_of(split, *open_split(stored_as(split))),
        class_names,
        open_tokens if tokens else None,
    )


def class_numbers(names: Sequence[str], known: Sequence[str], where: str) -> list[int]:
    """The number of each class among the known classes.

    Raises:
        UserError: a class is unknown.
    """
    unknown = [name for name in names if name not in known]
    require(
        not unknown,
        f"The classes of {where} must be among the run's classes, {', '.join(known)}, got {', '.join(unknown)} too; prepare it "
        "with these labels.",
    )
    return [list(known).index(name) for name in names]
