"""Next-token prediction: the cross-entropy of each token given the previous ones."""

import dataclasses
from typing import TYPE_CHECKING, Protocol

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
    import flax.linen as nn

    from transformer.config import Config
    from transformer.data.tokenizers import Vocabulary

_MEMORY = "recurrence_BLPD"  # name of the Transformer-XL memory in checkpoints


class LanguageModel(Protocol):
    """The call signature of a linen module that `NextToken` trains instead of a `Decoder`."""

    def __call__(
        self, tokens_BT: Array, *, positions_BT: Array = None, segment_ids_BT: Array = None, train: bool = False
    ) -> Float[jax.Array, "B T V"]:
        """Logits of the next token at each position. Initialised with tokens only, called with all arguments.

        Args:
            tokens_BT: int32, from 0 up to `config.model.vocab_size`, which is V.
            positions_BT: int32, from 0 in each document.
            segment_ids_BT: int32; tokens see earlier ones of their own segment, 0 is padding. None means that each row is one
                document without padding, as with `data.pack=False`.
            train: apply dropout, from the random stream `dropout`.
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
        self,
        model: "nn.Module",
        vocabulary: "Vocabulary",
        params: PyTree,
        carry: PyTree,
        batch: Batch,
        key: Array,
        train: bool,
    ) -> LossOutput:
        """The loss of a decoder.

        Args:
            model: a `LanguageModel`; with logits in chunks, a `Decoder`, which returns hidden states [B, T, D] for
                `head=False`. With a memory_length, its Transformer-XL memory is carried from batch to batch.
            vocabulary: its `token_bytes`, int [V], are for bits per byte.
            params: of the model.
            carry: the Transformer-XL memory.
            batch: rows of text.
            key: for dropout.
            train: apply dropout.

        Its statistics are sums over valid targets: `loss` (negative log-likelihood, nats), `weight` (targets),
        `correct` (targets that were the most likely token), `bytes` (of predicted text), and `objective` (the training
        loss: with smoothing and z-loss).
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
            **({"memory_BLPD": carry[_MEMORY]} if carry else {}),
        )
        if carry:
            predicted, memory_BLPD = predicted
            carry = {_MEMORY: memory_BLPD}
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

    def init_carry(self, model: "nn.Module", rows: int) -> PyTree:
        """An empty Transformer-XL memory, if the model has one."""
        config = getattr(model, "config", None)
        return {_MEMORY: model.init_memory(rows)} if getattr(config, "memory_length", 0) > 0 else ()

    def check(self, config: "Config") -> None:
        """A Transformer-XL memory needs rows that continue the previous ones."""
        data, memory_length = config.data, config.model.memory_length
        require(
            memory_length == 0 or (data.pack and data.stride == 0 and len(data.source) == 1),
            "A Transformer-XL memory needs packed rows of one source that follow each other, got "
            f"model.memory_length={memory_length}, data.pack={data.pack}, data.stride={data.stride} and {len(data.source)} "
            "sources; set data.pack=True, data.stride=0 and one source, or model.memory_length=0.",
        )
        require(
            memory_length == 0 or data.num_streams in (0, data.batch_size),
            f"A Transformer-XL memory needs one stream for each of {data.batch_size} rows, got "
            f"data.num_streams={data.num_streams}; set it to 0.",
        )

    def max_segments(self, config: "Config") -> int:
        """No promise with a Transformer-XL memory: continued rows hold any number of documents."""
        return 0 if config.model.memory_length > 0 else super().max_segments(config)

    def check_context(self, config: "Config") -> None:
        """Rows have one length; a Transformer-XL memory cannot be sharded over positions."""
        require(
            config.model.memory_length == 0,
            "parallel.context is for the next_token objective, whose rows have one length and no memory, got the next_token "
            f"objective and model.memory_length={config.model.memory_length}; set parallel.context=1.",
        )
