"""The base of families of pretrained models: the conversion of their config and tensors, in both directions."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from transformer.interop.table import Rule
from transformer.kinds import Family, Kind
from transformer.memory import MOST_LOOPED_LAYERS
from transformer.model_config import BlockConfig, ModelConfig
from transformer.types import Json, UserError
from transformer.validation import require, shown

FAMILIES = Family(
    "model_type",
    {
        name: f"transformer.interop.families.{module}"
        for module, names in {
            "gpt2": ("gpt2",),
            "llama": ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2"),
            "mixtures": ("mixtral", "qwen3_moe"),
            "gemma": ("gemma2", "gemma3_text"),
            "gpt_neox": ("gpt_neox",),
            "bert": ("bert", "roberta"),
            "modernbert": ("modernbert",),
            "t5": ("t5",),
        }.items()
        for name in names
    },
    field="model_type",
)
"""Families by the `model_type` in config.json."""

T = TypeVar("T")

# Keys of any config.json that do not affect logits: names, training, format of outputs, defaults of generation, and labels of
# tasks. A family reads every other key, or it is refused.
COMMON_KEYS = (
    *("_name_or_path", "_model_name_or_path", "_commit_hash", "_attn_implementation", "_num_labels", "architectures"),
    *("auto_map", "transformers.js_config", "is_llama_config"),
    *("transformers_version", "torch_dtype", "dtype", "use_cache", "torchscript"),
    *(
        "initializer_range",
        "attention_dropout",
        "classifier_dropout",
        "gradient_checkpointing",
        "chunk_size_feed_forward",
    ),
    *("return_dict", "output_hidden_states", "output_attentions", "problem_type", "id2label", "label2id"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id"),
    *(
        "decoder_start_token_id",
        "task_specific_params",
        "finetuning_task",
        "_attn_implementation_autoset",
        "pretraining_tp",
    ),
    *("max_length", "min_length", "do_sample", "num_beams", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("num_return_sequences", "length_penalty", "early_stopping", "no_repeat_ngram_size", "model_max_length"),
)


def typed_number(value: Json, kind: type[T], name: str, least: int = 1) -> T:
    """A checked value of a config.json; `name` begins the message.

    Raises:
        UserError: it has another type, is a size below `least` or beyond 31 bits, or a float that is not positive and finite.
    """
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    words = {int: f"a whole number from {least} to {2**31 - 1}", float: "a positive number", str: "a text"}
    fits = type(value) is kind
    if fits and kind is int:
        fits = least <= value < 2**31
    if fits and kind is float:
        fits = 0 < value < math.inf
    require(fits, f"{name} must be {words.get(kind, kind.__name__)}, got {shown(value)}.")
    return cast(Any, value)


class Pretrained(NamedTuple):
    """The content of a config.json in this package's terms."""

    model: ModelConfig
    objective: str
    """The kind of objective that trains and uses such a model."""
    class_names: tuple[str, ...] = ()
    """The classes of a classifier, in the order of its logits."""
    settings: Mapping[str, Any] = {}
    """Further fields of the objective."""
    longest_text: int = 0
    """Length in tokens to which the folder cuts a text; 0 means the model's length."""


class Keys:
    """The keys of a config.json; each is read, known to have no effect, or refused.

    Args:
        values: the content of the file.
        defaults: defaults of the family's own class, for missing keys.
        where: the name of the file, for messages.
        tensors: the names of the tensors beside it, which also indicate tied parameters.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        where: str,
        tensors: Collection[str] = (),
    ) -> None:
        self._values, self._defaults, self.where = dict(values), dict(defaults), where
        self.tensors = tensors
        self._read: set[str] = set()
        self.ignored: dict[str, Any] = {}

    def get(self, name: str, kind: type[T], *, least: int = 1) -> T:
        """The value of a key, or its default if the file has no such key.

        Args:
            name: the key.
            kind: bool, str, list; int for a size, or float for a positive number.
            least: the smallest size.

        Raises:
            UserError: it has another type, is missing without a default, or is out of range.
        """
        return typed_number(self.optional(name), kind, f"{self.where}: {name}", least)

    def num_layers(self, name: str) -> int:
        """A number of layers, bounded before any list of that length is made."""
        count = self.get(name, int)
        require(
            count <= MOST_LOOPED_LAYERS,
            f"{self.where}: {name} must be at most {MOST_LOOPED_LAYERS:,}, got {count:,}.",
        )
        return count

    def each_layer(self, name: str, values: Sequence[T], otherwise: Sequence[T]) -> list[T]:
        """A list with one value per layer.

        Args:
            name: the key.
            values: the permitted values.
            otherwise: the result if the key is missing or null.

        Raises:
            UserError: it has another length, or other values.
        """
        found = self.optional(name)
        found = list(otherwise) if found is None else found
        known = isinstance(found, list) and all(any(type(v) is type(k) and v == k for k in values) for v in found)
        require(
            known and len(found) == len(otherwise),
            f"{self.where}: {name} must have {' or '.join(map(str, values))} for each of {len(otherwise)} layers, got "
            f"{shown(found)}.",
        )
        return found

    def optional(self, name: str) -> Json:
        """The value of a key, of any type; the default if it is missing. Null is an ordinary value."""
        self._read.add(name)
        return self._values.get(name, self._defaults.get(name))

    def only(self, name: str, *values: object) -> None:
        """Refuse a key with another value than these, the only supported ones."""
        value = self.optional(name)
        require(
            value in values and type(value) in {type(v) for v in values},
            f"{self.where}: {name} must be {' or '.join(map(str, values))} for a model of this library, got {shown(value)}.",
        )

    def ignore(self, *names: str) -> None:
        """Accept keys without effect; they are kept for an export."""
        for name in names:
            if name in self._values and name not in self._read:
                self.ignored[name] = self._values[name]
                self._read.add(name)

    def finish(self) -> None:
        """Refuse keys that were not read."""
        self.ignore(*COMMON_KEYS)
        unknown = sorted(set(self._values) - self._read - {"model_type"})
        require(
            not unknown,
            f"{self.where} must have keys that are known for this model_type, it has "
            + ", ".join(f"{name:.40}={shown(self._values[name]):.60}" for name in unknown[:2])
            + (f" and {len(unknown) - 2} more" if len(unknown) > 2 else "")
            + "; the model may be a variant that is not supported. If a key changes nothing, remove it from a copy.",
        )


@dataclasses.dataclass(frozen=True)
class ModelFamily(Kind):
    """Models of one `model_type`. A subclass must define `read`, `write` and `rules`."""

    family = FAMILIES
    architectures: ClassVar[Mapping[str, str]]
    """The kind of objective for each class in config.json; an export names the first class."""
    defaults: ClassVar[Mapping[str, Any]]
    """Defaults of missing keys in config.json, as in the class of the family's config."""
    prefix: ClassVar[str] = "model."
    """Prefix of the tensors of a model with a head; a model without one is saved without the prefix."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Patterns of unused tensors: buffers, and heads of other tasks."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Suffixes of names in older files -> current suffixes."""

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """The model that a config.json describes.

        Raises:
            UserError: the variant is not supported.
        """
        raise NotImplementedError(f"{type(self).__name__} must define read().")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """A config.json that `read` converts back to this model, as far as the family can express it; without `architectures`.

        Raises:
            UserError: the family cannot express the model.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write().")

    def rules(self, model: ModelConfig, objective: str) -> Sequence[Rule]:
        """The correspondence of tensors and parameters of a model for an objective; names as in a model with a head."""
        raise NotImplementedError(f"{type(self).__name__} must define rules().")

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """Redundant tensors that may be stored beside those with which they are tied."""
        del model
        return {}

    def has_head(self, objective: str) -> bool:
        """Whether the class exported for an objective has a head, and its names the prefix."""
        named = next(name for name, kind in self.architectures.items() if kind == objective)
        return not named.endswith("Model")

    def outside_prefix(self, name: str) -> bool:
        """Whether a tensor belongs to a head, whose name never has the prefix."""
        del name
        return False

    def pretrained(self, values: Mapping[str, Any], where: str, tensors: Collection[str]) -> tuple[Pretrained, Keys]:
        """The content of a config.json, in which every key is accounted for."""
        keys = Keys(values, self.defaults, where, tensors)
        named = values.get("architectures") or [next(iter(self.architectures))]
        known = ", ".join(self.architectures)
        require(
            isinstance(named, list) and len(named) == 1 and str(named[0]) in self.architectures,
            f"{where}: architectures must be one of {known} for the model_type {self.kind!r}, got {shown(named)}.",
        )
        require(
            "quantization_config" not in values,
            f"{where}: the weights must not be quantised, it has a quantization_config; use the original model.",
        )
        try:
            model = self.read(keys, named[0])
        except UserError as error:  # names a setting of this package, which has another name in the file
            raise UserError(f"{error}" if where in f"{error}" else f"{where}: {error}") from None
        objective = self.architectures[named[0]]
        names = _class_names(keys) if objective == "classification" else ()
        keys.finish()
        return Pretrained(model, objective, names), keys


def _class_names(keys: Keys) -> tuple[str, ...]:
    """The classes of a classifier, in the order of its logits."""
    keys.only("problem_type", None, "single_label_classification")
    names = keys.optional("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    require(
        isinstance(names, dict)
        and set(names) == {str(number) for number in range(len(names))}
        and all(isinstance(name, str) for name in names.values())
        and len(set(names.values())) == len(names) >= 2,
        f"{keys.where}: id2label must name two classes or more, each once, got {shown(names)}.",
    )
    return tuple(names[str(number)] for number in range(len(names)))


def repeated(blocks: Sequence[BlockConfig], num_first: int = 0) -> dict[str, Any]:
    """The fields of a `ModelConfig` for a list of blocks: the first blocks, then the shortest repeating pattern."""
    rest = list(blocks[num_first:])
    period = next(
        (n for n in range(1, len(rest)) if all(rest[i] == rest[i - n] for i in range(n, len(rest)))), len(rest)
    )
    return {"num_layers": len(blocks), "first": tuple(blocks[:num_first]), "pattern": tuple(rest[:period])}
