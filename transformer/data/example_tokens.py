"""The tokens of examples: stored once, whole, and framed as rows whenever they are read."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from transformer.config import DataConfig
from transformer.data.example_parts import CLASS, SOURCE, TEXT, Roles, types_of, unpack_tokens
from transformer.data.forms.examples import ExampleForm
from transformer.data.shards import Shards
from transformer.data.source import WHOLE, Converted, ExampleSource, Joined
from transformer.data.token_shards import Job
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokens import stored_tokens


def roles_of(form: ExampleForm, names: Sequence[str]) -> Roles:
    """What the parts of examples are, by their names in the records."""
    special = {form.class_part: CLASS, form.source_part: SOURCE}
    return {name: special.get(index, TEXT) for index, name in enumerate(names)}


class _StoredTokens(Sequence[Any]):
    """Examples whose texts are ids."""

    def __init__(self, shards: Shards, form: ExampleForm, types: Mapping[str, Any]) -> None:
        self._shards, self._form, self._types = shards, form, types

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: Any) -> Any:
        return self._form.example(*unpack_tokens(self._shards[index], self._types))


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
    """The tokens of stored examples, stored now if they were not before; None where they cannot be kept.

    Args:
        form: of the examples.
        records: theirs.
        roles: what their parts are.
        folder: of the tokens.
        split: that they are.
        tokenizer: that makes them.
        name: of the source, for the user.
        store: whether they are stored where they are not.
    """
    job = Job(records.paths, records.lengths, "", split, 0, False, dict(roles))
    found = stored_tokens(folder, split, job, tokenizer, name, store=store)
    return found and _StoredTokens(found.shards, form, types_of(roles, tokenizer))


def open_example_tokens(
    source: ExampleSource, form: ExampleForm, split: str, tokenizer: Tokenizer, *, store: bool = True
) -> Sequence[Any]:
    """The examples of a split as `ExampleForm.tokens` gives them: stored, or made of each whenever it is read."""
    if split == WHOLE and WHOLE not in source.sizes:
        parts = [open_example_tokens(source, form, name, tokenizer, store=store) for name in source.split_names]
        return parts[0] if len(parts) == 1 else Joined(parts)
    examples = source.examples(split)  # a missing split is an error
    stored = source.tokens(split, tokenizer, store) if source.tokens else None
    return Converted(examples, lambda example: form.tokens(example, tokenizer)) if stored is None else stored


def open_encoded(
    source: ExampleSource, form: ExampleForm, split: str, tokenizer: Tokenizer, config: DataConfig
) -> Sequence[Any]:
    """The examples of a split as they are in rows (`ExampleForm.encode`)."""
    if type(form).encode is not ExampleForm.encode:  # what it makes of a text is not known
        return Converted(source.examples(split), lambda example: form.encode(example, tokenizer, config))
    tokens = open_example_tokens(source, form, split, tokenizer)
    return Converted(tokens, lambda example: form.frame(example, tokenizer, config))
