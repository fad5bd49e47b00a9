"""Next-token prediction: the cross-entropy of each token given those before it."""

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer.models.decoder import Decoder
from transformer.objective import OBJECTIVES
from transformer.objectives.continuation import ContinuesText
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import chunked, predicted_statistics
from transformer.types import Array, Batch, LossOutput, PyTree
from transformer.validation import require, shown

if TYPE_CHECKING:
    from transformer.config import Config


class LanguageModel(Protocol):
    """How a linen module is called that `NextToken` trains in the place of a `Decoder`."""

    def __call__(
        self, tokens_BT: Array, *, positions_BT: Any = None, segment_ids_BT: Any = None, train: bool = False
    ) -> Float[jax.Array, "B T V"]:
        """Logits of the token that follows each. Initialised with tokens alone, and called with all.

        Args:
            tokens_BT: int32, from 0 up to `config.model.vocab_size`, which is V.
            positions_BT: int32, from 0 in each document.
            segment_ids_BT: int32; tokens see earlier ones of their own segment, 0 is padding. None: each row is one
                document, as rows of `data.pack=False` are. None means that each row is one
                document without padding.
            train: with dropout, from the random stream `dropout`.
        """
        ...


@OBJECTIVES.register
@dataclasses.dataclass(frozen=True)
class NextToken(ContinuesText):
    """Cross-entropy of the token that follows."""

    kind = "next_token"
    model_class = Decoder
    reads = "text"
    settings = ("data.stride", "model.memory_length")

    def loss(
        self, model: Any, vocabulary: Any, params: PyTree, carry: PyTree, batch: Batch, key: Array, train: bool
    ) -> LossOutput:
        """The loss of a decoder.

        Args:
            model: a `LanguageModel`; where logits are computed in parts, a `Decoder`, which `head=False` has give hidden states
                [B, T, D]. With a memory_length, its recurrence is what is carried from batch to batch.
            vocabulary: its `token_bytes`, int [V], are for bits per byte.
            params: of the model.
            carry: the recurrence.
            batch: rows of text.
            key: for dropout.
            train: with dropout.

        Its statistics are sums over valid targets: `loss` (negative log-likelihood, nats), `weight` (targets),
        `correct` (targets that were the most likely token), `bytes` (of text predicted), and `objective` (what is
        minimised: the loss with smoothing and z-loss).
        """
        predicted, routing = model.apply(
            {"params": params},
            batch.inputs,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            train=train,
            rngs={"dropout": key} if train else {},
            mutable="routing",
            **({"head": False} if chunked(self) else {}),
            **(carry or {}),
        )
        if carry:
            predicted, recurrence_BLPD = predicted
            carry = {"recurrence_BLPD": recurrence_BLPD}
        require(
            chunked(self) or (hasattr(predicted, "shape") and predicted.shape[:-1] == batch.targets.shape),
            f"A language model must give logits [B, T, V] alone, got {shown(jax.tree.map(jnp.shape, predicted))} for tokens "
            f"{batch.targets.shape}.",
        )
        require(
            chunked(self) or predicted.shape[-1] >= len(vocabulary.token_bytes),
            f"A language model must give a logit for each of the tokenizer's {len(vocabulary.token_bytes)} ids, got "
            f"{predicted.shape[-1]}.",
        )
        require(
            jnp.issubdtype(predicted.dtype, jnp.floating),
            f"A language model must give logits of a floating type, got {predicted.dtype}, which have no gradient.",
        )
        statistics = predicted_statistics(model, params, predicted, batch.targets, batch.weights, self)
        statistics = add_routing(statistics, routing, self)
        bytes_V = jnp.asarray(vocabulary.token_bytes, jnp.float32)
        statistics["bytes"] = jnp.sum(bytes_V[batch.targets] * batch.weights)
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))

    def init_carry(self, model: Any, rows: int) -> PyTree:
        """An empty memory, where the model has one."""
        config = getattr(model, "config", None)
        return {"recurrence_BLPD": model.init_recurrence(rows)} if getattr(config, "memory_length", 0) > 0 else ()

    def check(self, config: "Config") -> None:
        """A memory is of rows that continue those before."""
        data, memory_length = config.data, config.model.memory_length
        require(
            memory_length == 0 or (data.pack and data.stride == 0 and len(data.source) == 1),
            "A memory needs packed rows of one source that follow each other, got "
            f"model.memory_length={memory_length}, data.pack={data.pack}, data.stride={data.stride} and {len(data.source)} "
            "sources; set data.pack=True, data.stride=0 and one source, or model.memory_length=0.",
        )
        require(
            memory_length == 0 or data.num_streams in (0, data.batch_size),
            f"A memory needs a stream for each of {data.batch_size} rows, got data.num_streams={data.num_streams}; set it to 0.",
        )

    def max_segments(self, config: "Config") -> int:
        """Rows that continue each other have as many documents as there are."""
        return 0 if config.model.memory_length > 0 else super().max_segments(config)

    def check_context(self, config: "Config") -> None:
        """Rows have one length; a memory would be spread too."""
        require(
            config.model.memory_length == 0,
            "parallel.context is for the next_token objective, whose rows have one length and no memory, got the next_token "
            f"objective and model.memory_length={config.model.memory_length}; set parallel.context=1.",
        )
