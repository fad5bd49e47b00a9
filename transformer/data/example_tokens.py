"""The tokens of examples: stored once without truncation, and framed as rows when they are read."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from transformer.config import DataConfig
from transformer.data.example_parts import CLASS, SOURCE, TEXT, Roles, types_of, unpack_tokens
from transformer.data.forms.examples import ExampleForm
from transformer.data.records import RandomAccess
from transformer.data.shards import Shards
from transformer.data.source import WHOLE, Converted, ExampleSource, Joined
from transformer.data.token_shards import Job
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokens import stored_tokens


def roles_of(form: ExampleForm, names: Sequence[str]) -> Roles:
    """The roles of the parts of examples, by their names in the records."""
    special = {form.class_part: CLASS, form.source_part: SOURCE}
    return {name: special.get(index, TEXT) for index, name in enumerate(names)}


class _StoredTokens(RandomAccess[Any]):
    """Examples with ids instead of texts."""

    def __init__(self, shards: Shards, form: ExampleForm, types: Mapping[str, Any]) -> None:
        self._shards, self._form, self._types = shards, form, types

    def __len__(self) -> int:
        return len(self._shards)

    def _read(self, index: int) -> Any:
        return self._form.example._make(unpack_tokens(self._shards[index], self._types))


def open_stored_tokens(
    form: ExampleForm,
    records: Shards,
    roles: Roles,
    folder: epath.Path,
    split: str,
    tokenizer: Tokenizer,
    name: str,
    store: bool,
) -> Sequence[Any] | None:
    """The stored tokens of examples, stored now unless they already are; None if they cannot be stored.

    Args:
        form: the form of the examples.
        records: the stored examples.
        roles: the roles of their parts.
        folder: the folder of the tokens.
        split: the split of the examples.
        tokenizer: the tokenizer that encodes them.
        name: the name of the source, for messages.
        store: whether missing tokens are stored.
    """
    job = Job(records.paths, records.lengths, "", split, 0, False, dict(roles))
    found = stored_tokens(folder, split, job, tokenizer, name, store=store)
    return found and _StoredTokens(found.shards, form, types_of(roles, tokenizer))


def open_example_tokens(
    source: ExampleSource, form: ExampleForm, split: str, tokenizer: Tokenizer, *, store: bool = True
) -> Sequence[Any]:
    """The examples of a split as `ExampleForm.tokens` returns them: stored, or encoded when read."""
    if split == WHOLE and WHOLE not in source.sizes:
        parts = [open_example_tokens(source, form, name, tokenizer, store=store) for name in source.split_names]
        return parts[0] if len(parts) == 1 else Joined(parts)
    examples = source.examples(split)  # a missing split is an error
    stored = source.tokens(split, tokenizer, store) if source.tokens else None
    return Converted(examples, lambda example: form.tokens(example, tokenizer)) if stored is None else stored


def open_encoded(
    source: ExampleSource, form: ExampleForm, split: str, tokenizer: Tokenizer, config: DataConfig
) -> Sequence[Any]:
    """The encoded examples of a split, as they appear in rows (`ExampleForm.encode`)."""
    if type(form).encode is not ExampleForm.encode:  # a user-defined encoding cannot be stored
        return Converted(source.examples(split), lambda example: form.encode(example, tokenizer, config))
    tokens = open_example_tokens(source, form, split, tokenizer)
    return Converted(tokens, lambda example: form.frame(example, tokenizer, config))
