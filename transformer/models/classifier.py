"""The classifier: an encoder, one vector made of a text's hidden states, and a score for each class."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.linear import DotGeneral, Linear
from transformer.layers.stack import Stack
from transformer.model_config import ModelConfig
from transformer.models.head import capped, token_embedding
from transformer.ops import wide_product
from transformer.ops.masks import AttentionMask
from transformer.ops.pooling import pool


class Classifier(nn.Module):
    """Logits of a text's class; its encoder's parameters have the names of an `Encoder`'s.

    Padding is neither attended to nor pooled, so that a text's logits do not depend on the texts beside it.

    Attributes:
        config: the model, with vocab_size and num_classes set; `config.pooling` makes the vector.
        dot_general: replaces `jax.lax.dot_general` in the linear layers.

    Example:
        >>> import jax.numpy as jnp
        >>> config = ModelConfig(architecture="encoder", vocab_size=11, num_layers=1, embed_dim=8, num_classes=3)
        >>> tokens, segment_ids = jnp.array([[1, 2, 3, 0]]), jnp.array([[1, 1, 1, 0]])
        >>> logits, variables = Classifier(config).init_with_output(
        ...     jax.random.key(0), tokens, segment_ids_BT=segment_ids
        ... )
        >>> logits.shape
        (1, 3)
    """

    config: ModelConfig
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B C"]:
        """Float32 logits of each class.

        Args:
            tokens_BT: the tokens of one text a row.
            segment_ids_BT: 0 is padding; None means there is none.
            train: apply dropout, with the `dropout` key.
        """
        config = self.config
        if config.num_classes < 2:
            raise ValueError(f"A classifier needs at least two classes, got num_classes={config.num_classes}.")
        valid_BT = jnp.ones(tokens_BT.shape, bool) if segment_ids_BT is None else segment_ids_BT != 0
        embedding = token_embedding(config, self.dot_general, name="token_embedding")
        hidden_BTD, _ = Stack(config, dot_general=self.dot_general, name="encoder")(
            embedding(tokens_BT),
            mask=AttentionMask(query_segment_ids=segment_ids_BT, key_segment_ids=segment_ids_BT),
            train=train,
        )
        kinds: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
        scores_BT = None
        if config.pooling == "attention":
            score = Linear(features=(1,), axes=("embed", None), init_std=config.init_std, name="pooling", **kinds)
            scores_BT = score(hidden_BTD)[..., 0]
        pooled_BD = pool(hidden_BTD, valid_BT, config.pooling, scores_BT)
        pooled_BD = nn.Dropout(config.dropout)(pooled_BD, deterministic=not train)
        logits_BC = Linear(
            features=(config.num_classes,),
            axes=("embed", None),
            use_bias=True,
            init_std=config.init_std,
            output_dtype=jnp.dtype(jnp.float32),
            # A head of a few columns gains nothing from kernels for CPUs; a trainer's has the gradients of its type.
            dot_general=self.dot_general if self.dot_general is jax.lax.dot_general else wide_product.dot_general,
            name="classifier",
            **kinds,
        )(pooled_BD)
        return capped(config, logits_BC)
