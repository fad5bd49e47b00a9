"""What a run minimises: the base of every objective, the package's and one's own."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, runtime_checkable

import jax
import numpy as np

from transformer.form import FORMS, Form, Shown
from transformer.kinds import Family, Kind
from transformer.model_kinds import POOLINGS
from transformer.tokenizer import prompt_ids
from transformer.types import Array, Batch, Loss, LossOutput, PyTree, Reading, UserError
from transformer.validation import require_at_least, require_range

if TYPE_CHECKING:
    from transformer.config import Config
    from transformer.model_config import ModelConfig

OBJECTIVES = Family(
    "objective",
    {
        "next_token": "transformer.objectives.next_token",
        "prefix_lm": "transformer.objectives.prefix_lm",
        "masked_lm": "transformer.objectives.masked_lm",
        "classification": "transformer.objectives.classification",
        "seq2seq": "transformer.objectives.seq2seq",
        "span_corruption": "transformer.objectives.span_corruption",
        "embedding": "transformer.objectives.embedding",
    },
)


@runtime_checkable
class Trained(Protocol):
    """A trained model with what belongs to it, as `load` gives it."""

    @property
    def model(self) -> Any:
        """The linen module."""

    @property
    def params(self) -> PyTree:
        """Its parameters."""

    @property
    def tokenizer(self) -> Any:
        """That it was trained with."""

    @property
    def config(self) -> "Config":
        """Of the run, resolved."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of a classifier, in the order of its logits."""
        ...

    def place(self, rows: np.ndarray) -> Any:
        """Rows of a batch, spread over the devices that the parameters are on."""
        ...


@dataclasses.dataclass(frozen=True)
class Objective(Kind):
    """A loss, with the model and the rows that it is for. Its fields are its settings.

    One's own derives from this or from one of the package's, has a name (`kind`), and is made known by
    `OBJECTIVES.register`. What it must bring is `model_class`, `reads` and `loss`.
    """

    family = OBJECTIVES
    model_class: ClassVar[Any]
    """The linen module that it trains, made with a model's config and a `Runtime`."""
    init_method: ClassVar[str] = "__call__"
    """The method of the model that uses all its parameters."""
    num_stacks: ClassVar[int] = 1
    """Stacks of blocks of the model, each of which reads tokens of its own."""
    continues_text: ClassVar[bool] = False
    """Whether the model can continue a text."""
    reads: ClassVar[str]
    """The form of the data that it learns from, by its name: text, labelled, pairs, or one's own."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Settings of a run that it uses, beside those of the form, of those that not every run does (`config.OF_SOME`)."""
    predicts_from: ClassVar[str] = "text_key"
    """The field of the data's config that names what is read of a row to predict from it."""
    scored_keys: ClassVar[tuple[str, str]] = ("prompt_key", "text_key")
    """Fields of the data's config that name a prompt and the text behind it whose probability is asked for."""
    draws_nothing: ClassVar[str] = ""
    """Why `generate` draws no token, where it never does."""
    loss_chunks = 1
    """A setting of those whose logits can be computed in parts."""

    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser (Chowdhery et al. 2022, section 5)."""
    load_balance: float = 0.01
    """Weight of each mixture's load-balance loss (Fedus et al. 2022, section 2.2); models without experts have none."""
    router_z: float = 0.001
    """Weight of each mixture's router z-loss (Zoph et al. 2022, section 3); models without experts have none."""

    def __post_init__(self) -> None:
        require_range(self, 0, 1, "label_smoothing")
        require_at_least(self, 0, "z_loss", "load_balance", "router_z")

    @property
    def form(self) -> Form:
        """The form of the data that it learns from."""
        return FORMS.find(self.reads)()

    @classmethod
    def uses(cls, setting: str) -> bool:
        """Whether a run of it uses a setting of `config.OF_SOME`: what a class declares, those that derive from it use too."""
        kinds = (*cls.__mro__, FORMS.find(cls.reads))
        return any(setting in vars(kind).get("settings", ()) for kind in kinds)

    # ---- The model ---------------------------------------------------------------------------------------------------

    def make_model(
        self, config: "ModelConfig", runtime: Any = None, *, vocabulary: Any = None, class_names: tuple[str, ...] = ()
    ) -> Any:
        """The linen module of a resolved config.

        Args:
            config: of the model.
            runtime: how it computes; None has every derivative and looks at no mesh.
            vocabulary: the tokenizer's, where the model depends on it.
            class_names: of the data, if it is labelled.
        """
        own = dict(self.model_settings(vocabulary, class_names))
        return self.model_class(config, **(own if runtime is None else own | {"runtime": runtime}))

    def init_inputs(self, length: int) -> tuple[Any, ...]:
        """What the model is initialised with: by default, a row of so many tokens for each stack."""
        return (np.zeros((1, length), np.int32),) * self.num_stacks

    # ---- The loss ----------------------------------------------------------------------------------------------------

    def loss(
        self, model: Any, vocabulary: Any, params: PyTree, carry: PyTree, batch: Any, key: Array, train: bool
    ) -> LossOutput:
        """`(loss_sum, weight_sum), (carry, statistics)` of a batch; pure, and differentiated by `params`.

        Args:
            model: the linen module.
            vocabulary: the tokenizer's `vocab_size` and `token_bytes`.
            params: of the model.
            carry: what `init_carry` made, or the batch before left.
            batch: as the data gives it, or a part of its rows.
            key: for what is random in training.
            train: with dropout, and without what is only scored.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss().")

    def weight(self, batch: Any) -> Array:
        """What the summed loss is divided by, float32; it does not depend on the parameters."""
        return batch.weights.sum()

    def init_carry(self, model: Any, rows: int) -> PyTree:
        """What is carried from batch to batch, before the first one of so many rows; by default nothing."""
        del model, rows
        return ()

    def bind(self, model: Any, vocabulary: Any) -> Loss:
        """The loss of a model."""
        return Loss(
            self.weight,
            functools.partial(self.loss, model, vocabulary),
            functools.partial(self.init_carry, model),
        )

    # ---- What it asks of the rest of a run ---------------------------------------------------------------------------

    def check(self, config: "Config") -> None:
        """Raise UserError where the config around it does not fit."""

    def check_batch(self, batch: Any) -> None:
        """Raise UserError where a batch on the host is not as the loss takes it; ids and shapes are checked elsewhere."""

    def check_context(self, config: "Config") -> None:
        """Raise UserError unless rows may be spread over devices (`parallel.context`)."""
        raise UserError(
            "parallel.context is for the next_token objective, whose rows have one length and no memory, got the "
            f"{self.kind} objective and model.memory_length={config.model.memory_length}; set parallel.context=1."
        )

    def extra_tokens(self, vocabulary: Any, length: int) -> int:
        """Ids that the model needs after the vocabulary's, for rows of `length` tokens."""
        del vocabulary, length
        return 0

    def model_settings(self, vocabulary: Any, class_names: tuple[str, ...]) -> Mapping[str, Any]:
        """Attributes of the model, besides its config, that follow from the objective and the data."""
        del vocabulary, class_names
        return {}

    def tokenizer_settings(self, tokenizer: Any) -> Mapping[str, Any]:
        """Fields of the data's config, besides its kind and size, that say which tokenizer is used."""
        del tokenizer
        return {}

    def changes(self, tokenizer: Any, length: int, seed: int) -> Mapping[str, Any]:
        """What it does to rows of running text: `noise` changes a row in place, `convert` makes other batches of them; where they
        are `joined`, the documents of a row are one text.
        """
        del tokenizer, length, seed
        return {}

    def max_segments(self, config: "Config") -> int:
        """What is promised of the segment ids of its batches (`AttentionMask.max_segments`), made as the config says."""
        return self.form.max_segments(config.data)

    def batch_shapes(self, config: "Config") -> Any:
        """Shapes of a training batch of full rows: by default, of running text."""
        shape = (config.data.batch_size, config.data.sequence_length)
        tokens, weights = shaped(shape, np.int32), shaped(shape, np.float32)
        return Batch(tokens, tokens, weights, tokens if config.data.pack else None, tokens)

    def show(self, batch: Any, tokenizer: Any, class_names: Sequence[str]) -> Iterator[Shown]:
        """The rows of a batch, for a person: by default, as the form of the data has them."""
        return self.form.show(batch, tokenizer, class_names)

    def fit(self, data: Any) -> "tuple[Objective, str]":
        """Itself with the settings that are left to the data, and a line for the user."""
        del data
        return self, ""

    def in_chunks(self, count: int) -> "Objective":
        """The same loss with other `loss_chunks`, where it has that setting."""
        del count
        return self

    # ---- What a trained run can do -----------------------------------------------------------------------------------

    def generation_scores(
        self, model: Any, params: PyTree, tokenizer: Any, data: Any, split: str, config: "Config"
    ) -> dict[str, Any]:
        """Scores of what the model says to a whole split; by default none."""
        del model, params, tokenizer, data, split, config
        return {}

    def encode(self, text: str, tokenizer: Any, data: Any) -> Array:
        """Ids of a text as a trained model reads it, int32 [n]; `data` is the config of the data."""
        del data
        return np.array(prompt_ids(tokenizer, text), np.int32)

    def generate(
        self,
        run: Trained,
        prompt: str,
        max_new_tokens: int,
        sampling: Any,
        seed: int,
        note: Callable[[str], None],
        beams: Any = None,
    ) -> Iterator[str]:
        """What a trained model says to a prompt, piece by piece.

        Args:
            run: the trained model.
            prompt: a text.
            max_new_tokens: at most; 0 means as many as the model has room for.
            sampling: a `SamplingConfig`.
            seed: for what is drawn.
            note: called with what the user should know, before the first piece.
            beams: a `BeamConfig`, to search in the place of sampling; its best texts then, a line break between them.

        Raises:
            UserError: the prompt does not fit; or it generates nothing.
        """
        self._refuse("generates must be a language model or a translator")

    def reply(
        self,
        run: Trained,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int,
        sampling: Any,
        seed: int,
        note: Callable[[str], None],
    ) -> Iterator[str]:
        """What a trained model says next in a conversation, piece by piece, as `generate`.

        Raises:
            UserError: there is no chat template, the conversation does not fit, or the model holds none.
        """
        self._refuse("replies must be a language model")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"A run that {what}, got one of {self.kind}; `transformer evaluate` scores it.")

    def predict(
        self, run: Trained, texts: Sequence[str], names: Sequence[str], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """What a trained model says to each text, in order: columns by name. The texts beside it change nothing.

        Further arguments, with defaults, are this kind's options.

        Args:
            run: the trained model.
            texts: none of them blank.
            names: what each text is called in messages.
            batch_size: texts that are read together, those of similar length.

        Raises:
            UserError: it cannot read a text; or it predicts nothing.
        """
        self._refuse("predicts must be a classifier, a translator or a language model")

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """How a trained model reads a text, for a look at its attention.

        Args:
            run: the trained model.
            text: not blank.
            target: what a decoder reads beside it; None is the kind's own.

        Raises:
            UserError: the text is longer than the model reads; a target means nothing here; or there is nothing to look at.
        """
        self._refuse("shows its attention must be of an objective that defines reading()")

    def score(
        self, run: Trained, texts: Sequence[tuple[str, str]], names: Sequence[str], batch_size: int, stride: int
    ) -> Iterator[tuple[Array, Array]]:
        """Tokens of each given text, int32 [n], with their log-probabilities, float32 [n]. Texts beside it change nothing.

        Args:
            run: the trained model.
            texts: each with the prompt that stands before it, which may be empty.
            names: what each text is called in messages.
            batch_size: rows that are computed together, those of similar length.
            stride: where a text is longer than the model reads, windows of it go so many tokens further each time.

        Raises:
            UserError: the model gives no probabilities of texts, or a text does not fit.
        """
        self._refuse("scores given texts must be a language model, a masked model or a translator")

    def reads_texts(self, segment_ids_BT: Array) -> tuple[str, Mapping[str, Any]]:
        """The method of the model that reads texts into hidden states, and its options beside their tokens.

        Args:
            segment_ids_BT: 1 for tokens, 0 for the padding behind them.
        """
        return "__call__", {"segment_ids_BT": segment_ids_BT}

    def pooling_of(self, config: "ModelConfig") -> Any:
        """How `embed` makes one vector of hidden states, if nothing else is asked for: by default, their mean."""
        del config
        return POOLINGS.find("mean")()

    def next_command(self, prompt: str) -> tuple[str, ...]:
        """What to type after training to use the model of a run, after `transformer` and without the run."""
        del prompt
        return ("evaluate",)


def shaped(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of a part of a batch."""
    return jax.ShapeDtypeStruct(shape, dtype)
