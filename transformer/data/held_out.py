"""Validation data that is named (`data.validation`) instead of held out from the sources."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformer.config import DataConfig
from transformer.data.identity import ContentHash
from transformer.data.source import ExampleSource, Source
from transformer.validation import counted, require


def trained_part(config: DataConfig) -> DataConfig:
    """The config of the training sources; with named validation data, nothing is held out from them."""
    return dataclasses.replace(config, validation=(), validation_fraction=0.0) if config.validation else config


def held_out_part(config: DataConfig) -> DataConfig | None:
    """The config of the named validation data, read whole; None without any."""
    if not config.validation:
        return None
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0}
    return dataclasses.replace(config, source=config.validation, validation=(), weights=(), **whole)


def held_out_fingerprint(*fingerprints: str) -> str:
    """The fingerprint of data that is named for validation, and not for training."""
    content = ContentHash()
    content.add("validation", *fingerprints)
    return content.hexdigest()


def overlap_note(held_out: str, trained: Sequence[str]) -> list[str]:
    """A line if named validation data are also trained on, by their fingerprints."""
    note = "The validation data are also trained on: their scores will not show how the model does on other data."
    return [note] if held_out in map(held_out_fingerprint, trained) else []


def held_out_text(source: Source) -> Source:
    """A corpus as the validation split of another corpus."""
    split, encoded = _only_split(source), source.encoded
    rest = source.description.removeprefix(f"{source.name}: ").removeprefix(f"{split} ")
    return dataclasses.replace(
        source,
        fingerprint=held_out_fingerprint(source.fingerprint),
        sizes={"validation": source.sizes[split]},
        description=f"{source.name}: validation {rest}",
        open_split=lambda _: source.open_split(split),
        encoded=None if encoded is None else lambda _, tokenizer: encoded(split, tokenizer),
    )


def held_out_examples(source: ExampleSource, held_out: ExampleSource) -> ExampleSource:
    """Examples as the validation split of other examples."""
    split = _only_split(held_out)
    count = held_out.sizes[split]
    _, *notes = held_out.description.splitlines()
    notes += overlap_note(held_out_fingerprint(held_out.fingerprint), [source.fingerprint])
    of_both = f"{held_out.name}: validation {counted(count, 'example')}"

    def tokens(name: str, tokenizer: Any, store: bool) -> Sequence[Any] | None:
        of, part = (held_out, split) if name == "validation" else (source, name)
        return of.tokens(part, tokenizer, store) if of.tokens else None

    return dataclasses.replace(
        source,
        fingerprint=held_out_fingerprint(source.fingerprint, held_out.fingerprint),
        sizes={**source.sizes, "validation": count},
        description="\n".join([source.description, of_both, *notes]),
        open_split=lambda name: held_out.open_split(split) if name == "validation" else source.open_split(name),
        tokens=tokens,
    )


def _only_split(source: Source | ExampleSource) -> str:
    """The split to score: `validation` if the dataset has it, else its only split."""
    if "validation" in source.sizes:
        return "validation"
    require(
        len(source.sizes) == 1,
        f"What data.validation names must be files, or a dataset with a split validation, {source.name} has "
        f"{', '.join(source.sizes)}: name another.",
    )
    return next(iter(source.sizes))
