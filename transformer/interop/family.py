"""What a family of pretrained models is: its config and its tensors as ours, both ways."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from transformer.interop.table import Rule
from transformer.kinds import Family, Kind
from transformer.memory import MOST_LOOPED_LAYERS
from transformer.model_config import BlockConfig, ModelConfig
from transformer.types import UserError
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
"""By the `model_type` of their config.json."""

T = TypeVar("T")

# Keys of any config.json that change no logits: names, training, how outputs are returned, defaults of generation and labels of
# tasks. Everything else is read by a family, or refused.
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


def typed_number(value: Any, kind: type[T], name: str, least: int = 1) -> T:
    """A value of a config.json, checked; `name` begins the message.

    Raises:
        UserError: it is of another type, a size below `least` or beyond 31 bits, or a float that is not positive and finite.
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
    """What a config.json says of a model, in this package's terms."""

    model: ModelConfig
    objective: str
    """The kind of objective that trains and uses such a model."""
    class_names: tuple[str, ...] = ()
    """Of a classifier, in the order of its logits."""
    settings: Mapping[str, Any] = {}
    """Of the objective."""
    longest_text: int = 0
    """Tokens at which the folder cuts a text; 0 means the model's length."""


class Keys:
    """The keys of a config.json, each of which is read, or known to change nothing, or refused.

    Args:
        values: of the file.
        defaults: of the family's own class, for keys that are left out.
        where: names the file, in messages.
        tensors: names of those that lie beside it: what is tied is told by both.
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
        """The value of a key, or its default where the file leaves it out.

        Args:
            name: of the key.
            kind: bool, str, list; int for a size, or float for a positive number.
            least: of a size.

        Raises:
            UserError: it is of another type, missing without a default, or a number that no model has.
        """
        return typed_number(self.optional(name), kind, f"{self.where}: {name}", least)

    def num_layers(self, name: str) -> int:
        """A number of layers, which may be listed: it is bounded before anything is as long."""
        count = self.get(name, int)
        require(
            count <= MOST_LOOPED_LAYERS,
            f"{self.where}: {name} must be at most {MOST_LOOPED_LAYERS:,}, got {count:,}.",
        )
        return count

    def each_layer(self, name: str, values: Sequence[T], otherwise: Sequence[T]) -> list[T]:
        """A list with a value for each layer.

        Args:
            name: of the key.
            values: that are known.
            otherwise: where the key is missing or null.

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

    def optional(self, name: str) -> Any:
        """The value of a key, of any type; the default where it is missing. A null is a value of its own."""
        self._read.add(name)
        return self._values.get(name, self._defaults.get(name))

    def only(self, name: str, *values: Any) -> None:
        """Refuse a key whose value is not one of these, the only ones that our models can be."""
        value = self.optional(name)
        require(
            value in values and type(value) in {type(v) for v in values},
            f"{self.where}: {name} must be {' or '.join(map(str, values))} for a model of this library, got {shown(value)}.",
        )

    def ignore(self, *names: str) -> None:
        """Keys that change nothing: they are kept for an export."""
        for name in names:
            if name in self._values and name not in self._read:
                self.ignored[name] = self._values[name]
                self._read.add(name)

    def finish(self) -> None:
        """Refuse keys that nothing has read."""
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
    """Models of one `model_type`. It must bring `read`, `write` and `rules`."""

    family = FAMILIES
    architectures: ClassVar[Mapping[str, str]]
    """Class of their config.json -> kind of objective that such a model is for; the first one is exported."""
    defaults: ClassVar[Mapping[str, Any]]
    """Of keys that a config.json may leave out, as the class of their config has them."""
    prefix: ClassVar[str] = "model."
    """Begins the names of the tensors of a model with a head; a model without one is saved without it."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Patterns of tensors without a place: buffers, and heads that are not used."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """How older files end a name -> how it ends now."""

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """The model that a config.json describes.

        Raises:
            UserError: it is of a variant that our models cannot be.
        """
        raise NotImplementedError(f"{type(self).__name__} must define read().")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """A config.json that `read` makes this model of, as far as the family can express it; without its `architectures`.

        Raises:
            UserError: it cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write().")

    def rules(self, model: ModelConfig, objective: str) -> Sequence[Rule]:
        """Which tensor is which parameter of a model for an objective; names as of a model with a head."""
        raise NotImplementedError(f"{type(self).__name__} must define rules().")

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """Tensors that may be there beside the ones that they are tied with."""
        del model
        return {}

    def has_head(self, objective: str) -> bool:
        """Whether the class that is written for an objective has a head, so that names have the prefix."""
        named = next(name for name, kind in self.architectures.items() if kind == objective)
        return not named.endswith("Model")

    def outside_prefix(self, name: str) -> bool:
        """Whether a tensor is of a head, whose name never begins with the prefix."""
        del name
        return False

    def pretrained(self, values: Mapping[str, Any], where: str, tensors: Collection[str]) -> tuple[Pretrained, Keys]:
        """What a config.json says, with every key accounted for."""
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
        except UserError as error:  # of a setting of ours, which has another name in the file
            raise UserError(f"{error}" if where in f"{error}" else f"{where}: {error}") from None
        objective = self.architectures[named[0]]
        names = _class_names(keys) if objective == "classification" else ()
        keys.finish()
        return Pretrained(model, objective, names), keys


def _class_names(keys: Keys) -> tuple[str, ...]:
    """Of a classifier, in the order of its logits."""
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
    """The fields of a `ModelConfig` for a list of blocks: the shortest pattern that gives them, after the first ones."""
    rest = list(blocks[num_first:])
    period = next(
        (n for n in range(1, len(rest)) if all(rest[i] == rest[i - n] for i in range(n, len(rest)))), len(rest)
    )
    return {"num_layers": len(blocks), "first": tuple(blocks[:num_first]), "pattern": tuple(rest[:period])}
