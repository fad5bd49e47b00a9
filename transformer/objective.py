"""Training objectives: the base class of the package's and of user-defined objectives."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import jax
import numpy as np

from transformer.form import FORMS, Form, Shown
from transformer.kinds import Family, Kind
from transformer.model_kinds import POOLINGS, Pooling
from transformer.tokenizer import prompt_ids
from transformer.trained import Trained
from transformer.types import Array, Batch, GeneratedTexts, Loss, LossOutput, PyTree, Reading, UserError
from transformer.validation import require_at_least, require_range

if TYPE_CHECKING:
    import flax.linen as nn

    from transformer.config import Config, DataConfig
    from transformer.data.datasets import Dataset
    from transformer.data.tokenizers import Tokenizer, Vocabulary
    from transformer.generation.beams import BeamConfig
    from transformer.generation.generate import Generator
    from transformer.generation.sampling import SamplingConfig
    from transformer.layers.runtime import Runtime
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


@dataclasses.dataclass(frozen=True)
class Objective(Kind):
    """A loss, with the model and the data that it is for. Its fields are its settings.

    A user-defined objective derives from this or from one of the package's, has a name (`kind`), and is registered by
    `OBJECTIVES.register`. It must define `model_class`, `reads` and `loss`.
    """

    family = OBJECTIVES
    model_class: ClassVar[Any]
    """The linen module to train, constructed from a model's config and a `Runtime`."""
    init_method: ClassVar[str] = "__call__"
    """A method of the model that uses all its parameters."""
    num_stacks: ClassVar[int] = 1
    """Number of stacks of blocks in the model, each with its own input tokens."""
    continues_text: ClassVar[bool] = False
    """Whether the model can continue a text."""
    reads: ClassVar[str]
    """The form of data that it learns from, by name: text, labelled, pairs, or a registered one."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Settings from `config.OF_SOME` that it uses, besides the form's."""
    predicts_from: ClassVar[str] = "text_key"
    """The data config's field that names the feature to read for predictions."""
    scored_keys: ClassVar[tuple[str, str]] = ("prompt_key", "text_key")
    """The data config's fields that name a prompt, and the text after it to score."""
    draws_nothing: ClassVar[str] = ""
    """Why `generate` never samples, if it does not."""
    loss_chunks = 1
    """A setting of objectives whose logits can be computed in chunks."""
    instead: ClassVar[str] = "`transformer evaluate` scores it"
    """A command for its runs, named where another command refuses them."""

    label_smoothing: float = 0.0
    """Share of the target's probability distributed over the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser (Chowdhery et al. 2022, section 5)."""
    load_balance: float = 0.01
    """Weight of each mixture's load-balance loss (Fedus et al. 2022, section 2.2); no effect without experts."""
    router_z: float = 0.001
    """Weight of each mixture's router z-loss (Zoph et al. 2022, section 3); no effect without experts."""

    def __post_init__(self) -> None:
        require_range(self, 0, 1, "label_smoothing")
        require_at_least(self, 0, "z_loss", "load_balance", "router_z")

    @property
    def form(self) -> Form:
        """The form of the data that it learns from."""
        return FORMS.find(self.reads)()

    @classmethod
    def uses(cls, setting: str) -> bool:
        """Whether its runs use a setting of `config.OF_SOME`; subclasses inherit what a class declares."""
        kinds = (*cls.__mro__, FORMS.find(cls.reads))
        return any(setting in vars(kind).get("settings", ()) for kind in kinds)

    # ---- The model ---------------------------------------------------------------------------------------------------

    def make_model(
        self,
        config: "ModelConfig",
        runtime: "Runtime | None" = None,
        *,
        vocabulary: "Vocabulary | None" = None,
        class_names: tuple[str, ...] = (),
    ) -> "nn.Module":
        """The linen module of a resolved config.

        Args:
            config: of the model.
            runtime: how the model computes; None has every derivative and ignores meshes.
            vocabulary: the tokenizer's, where the model depends on it.
            class_names: class names, if the data is labelled.
        """
        own = dict(self.model_settings(vocabulary, class_names))
        return self.model_class(config, **(own if runtime is None else own | {"runtime": runtime}))

    def init_inputs(self, length: int) -> tuple[Any, ...]:
        """Inputs for initialisation: by default, one row of this many tokens for each stack."""
        return (np.zeros((1, length), np.int32),) * self.num_stacks

    # ---- The loss ----------------------------------------------------------------------------------------------------

    def loss(
        self,
        model: "nn.Module",
        vocabulary: "Vocabulary",
        params: PyTree,
        carry: PyTree,
        batch: PyTree,
        key: Array,
        train: bool,
    ) -> LossOutput:
        """`(loss_sum, weight_sum), (carry, statistics)` of a batch; pure, and differentiated by `params`.

        Args:
            model: the linen module.
            vocabulary: the tokenizer's `vocab_size` and `token_bytes`.
            params: of the model.
            carry: the result of `init_carry`, or of the previous batch.
            batch: a batch of the data, or a part of its rows.
            key: for random numbers in training.
            train: apply dropout, and leave out terms that are only scored.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss().")

    def weight(self, batch: PyTree) -> Array:
        """The divisor of the summed loss, float32; it does not depend on the parameters."""
        return batch.weights.sum()

    def init_carry(self, model: "nn.Module", rows: int) -> PyTree:
        """The value carried from batch to batch, for the first batch of this many rows; by default nothing."""
        del model, rows
        return ()

    def bind(self, model: "nn.Module", vocabulary: "Vocabulary") -> Loss:
        """The loss of a model."""
        return Loss(
            self.weight,
            functools.partial(self.loss, model, vocabulary),
            functools.partial(self.init_carry, model),
        )

    # ---- Requirements on the run -------------------------------------------------------------------------------------

    def check(self, config: "Config") -> None:
        """Raise UserError if the run's config does not fit."""

    def check_batch(self, batch: PyTree) -> None:
        """Raise UserError if the loss cannot take a batch on the host; ids and shapes are checked elsewhere."""

    def check_context(self, config: "Config") -> None:
        """Raise UserError unless rows may be sharded over devices (`parallel.context`)."""
        raise UserError(
            "parallel.context is for the next_token objective, whose rows have one length and no memory, got the "
            f"{self.kind} objective and model.memory_length={config.model.memory_length}; set parallel.context=1."
        )

    def extra_tokens(self, vocabulary: "Vocabulary", length: int) -> int:
        """Number of ids that the model needs after the vocabulary's, for rows of `length` tokens."""
        del vocabulary, length
        return 0

    def model_settings(self, vocabulary: "Vocabulary | None", class_names: tuple[str, ...]) -> Mapping[str, Any]:
        """Attributes of the model, besides its config, that depend on the objective and the data."""
        del vocabulary, class_names
        return {}

    def tokenizer_settings(self, tokenizer: "Tokenizer") -> Mapping[str, Any]:
        """Fields of the data config, besides kind and size, that determine the tokenizer."""
        del tokenizer
        return {}

    def changes(self, tokenizer: "Tokenizer", length: int, seed: int) -> Mapping[str, Any]:
        """Its changes to rows of running text: `noise` changes a row in place, `convert` makes other batches of rows, and
        `joined` makes the documents of a row one text.
        """
        del tokenizer, length, seed
        return {}

    def max_segments(self, config: "Config") -> int:
        """The promise about the segment ids of its batches (`AttentionMask.max_segments`), under this config."""
        return self.form.max_segments(config.data)

    def batch_shapes(self, config: "Config") -> PyTree:
        """Shapes of a training batch of full rows; by default, of running text."""
        shape = (config.data.batch_size, config.data.sequence_length)
        tokens, weights = shaped(shape, np.int32), shaped(shape, np.float32)
        return Batch(tokens, tokens, weights, tokens if config.data.pack else None, tokens)

    def show(self, batch: PyTree, tokenizer: "Tokenizer", class_names: Sequence[str]) -> Iterator[Shown]:
        """The rows of a batch, formatted for display; by default, by the form of the data."""
        return self.form.show(batch, tokenizer, class_names)

    def fit(self, data: "Dataset") -> "tuple[Objective, str]":
        """The objective with its data-dependent settings filled in, and a line for the user."""
        del data
        return self, ""

    def in_chunks(self, count: int) -> "Objective":
        """The same loss with another `loss_chunks`, if it has that setting."""
        del count
        return self

    # ---- Uses of a trained run ---------------------------------------------------------------------------------------

    def generation_scores(
        self, model: Any, params: PyTree, tokenizer: "Tokenizer", data: "Dataset", split: str, config: "Config"
    ) -> dict[str, Any]:
        """Scores of the model's outputs for a whole split; by default none."""
        del model, params, tokenizer, data, split, config
        return {}

    def encode(self, text: str, tokenizer: "Tokenizer", data: "DataConfig") -> Array:
        """Ids of a text as input of a trained model, int32 [n]; `data` is the data config."""
        del data
        return np.array(prompt_ids(tokenizer, text), np.int32)

    def generate(
        self,
        run: Trained,
        prompt: str,
        max_new_tokens: int,
        sampling: "SamplingConfig",
        seed: int,
        note: Callable[[str], None],
        beams: "BeamConfig | None" = None,
    ) -> Iterator[str]:
        """The output of a trained model for a prompt, piece by piece.

        Args:
            run: the trained model.
            prompt: a text.
            max_new_tokens: upper limit; 0 means as many as fit in the model.
            sampling: a `SamplingConfig`.
            seed: of the random numbers.
            note: called with messages for the user, before the first piece.
            beams: a `BeamConfig`, for beam search instead of sampling; the output is then the best texts, one per line.

        Raises:
            UserError: the prompt does not fit, or the model cannot generate.
        """
        self._refuse("generates must be a language model or a translator")

    def make_generator(self, run: Trained, draft: Trained | None = None, draft_tokens: int = 4) -> "Generator | None":
        """The argument `generator` of `generate`, `generate_all` and `reply`, prepared for many calls; by default, None.

        A `draft` is a smaller model with the same vocabulary, for speculative decoding with `draft_tokens` in each round.
        """
        del run, draft, draft_tokens

    def generate_all(
        self,
        run: Trained,
        prompts: Sequence[str],
        batch_size: int,
        max_new_tokens: int,
        sampling: "SamplingConfig",
        seed: int,
        note: Callable[[str], None],
        *,
        beams: "BeamConfig | None" = None,
    ) -> Iterator[GeneratedTexts]:
        """Generate texts for several prompts, in order; by default, by `generate`, one prompt after the other.

        `batch_size` texts are computed together. A subclass may have further options, with defaults.
        """
        del batch_size
        options = {"beams": beams} if beams is not None else {}
        for prompt in prompts:
            parts = self.generate(run, prompt, max_new_tokens, sampling, seed, note, **options)
            yield GeneratedTexts("", ("".join(parts),))

    def reply(
        self,
        run: Trained,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int,
        sampling: "SamplingConfig",
        seed: int,
        note: Callable[[str], None],
    ) -> Iterator[str]:
        """The next message of a trained model in a conversation, piece by piece, as in `generate`.

        Raises:
            UserError: there is no chat template, the conversation does not fit, or the model holds none.
        """
        self._refuse("replies must be a language model")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"A run that {what}, got a run of {self.kind}; {self.instead}.")

    def predict(
        self, run: Trained, texts: Sequence[str], names: Sequence[str], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """The outputs of a trained model for each text, in order: columns by name. A result does not depend on the other texts.

        Further arguments, with defaults, are this kind's options.

        Args:
            run: the trained model.
            texts: none of them blank.
            names: name of each text in messages.
            batch_size: texts per batch; texts of similar length are batched together.

        Raises:
            UserError: it cannot read a text, or the model cannot predict.
        """
        self._refuse("predicts must be a classifier, a translator or a language model")

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """How a trained model reads a text, to inspect its attention.

        Args:
            run: the trained model.
            text: not blank.
            target: input of the decoder; None means the kind's default.

        Raises:
            UserError: the text is longer than the model reads, a target is not supported, or there is no attention to inspect.
        """
        self._refuse("shows its attention must be of an objective that defines reading()")

    def score(
        self, run: Trained, texts: Sequence[tuple[str, str]], names: Sequence[str], batch_size: int, stride: int
    ) -> Iterator[tuple[Array, Array]]:
        """Tokens of each text, int32 [n], and their log-probabilities, float32 [n]. A result does not depend on other texts.

        Args:
            run: the trained model.
            texts: each with the prompt before it, which may be empty.
            names: name of each text in messages.
            batch_size: rows per batch; rows of similar length are batched together.
            stride: step of the windows over a text that is longer than the model reads.

        Raises:
            UserError: the model gives no probabilities of texts, or a text does not fit.
        """
        self._refuse("scores given texts must be a language model, a masked model or a translator")

    def reads_texts(self, segment_ids_BT: Array) -> tuple[str, Mapping[str, Any]]:
        """The model's method that maps texts to hidden states, and its options besides their tokens.

        Args:
            segment_ids_BT: 1 for tokens, 0 for the padding behind them.
        """
        return "__call__", {"segment_ids_BT": segment_ids_BT}

    def pooling_of(self, config: "ModelConfig") -> Pooling:
        """The default pooling of `embed`: the mean of the hidden states."""
        del config
        return POOLINGS.find("mean")()

    def next_command(self, prompt: str) -> tuple[str, ...]:
        """The command to try after training, without `transformer` and the run's directory."""
        del prompt
        return ("evaluate",)


def shaped(shape: tuple[int, ...], dtype: type[np.generic]) -> jax.ShapeDtypeStruct:
    """The shape of a part of a batch, as a `jax.ShapeDtypeStruct`."""
    return jax.ShapeDtypeStruct(shape, dtype)
