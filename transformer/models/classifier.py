"""The classifier: an encoder, pooling of its hidden states, and one logit per class."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.linear import Linear
from transformer.layers.runtime import Runtime
from transformer.model_config import ModelConfig
from transformer.models.head import capped
from transformer.models.pooled import pooled_states
from transformer.types import UserError


class Classifier(nn.Module):
    """Logits of a text's class; its encoder's parameters have the names of an `Encoder`'s.

    Padding is neither attended to nor pooled: a text's logits do not depend on the other texts in its batch.

    Attributes:
        config: the model, with vocab_size set; `config.pooling` reduces the hidden states to one vector.
        runtime: `dot_general` and sharding; types and initialisation are the config's.
        num_classes: C, two or more.
        max_segments: the promise about its segment ids (`AttentionMask.max_segments`); 0 promises nothing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> config = ModelConfig(vocab_size=11, num_layers=1, embed_dim=8)
        >>> tokens, segment_ids = jnp.array([[1, 2, 3, 0]]), jnp.array([[1, 1, 1, 0]])
        >>> logits, variables = Classifier(config, num_classes=3).init_with_output(
        ...     jax.random.key(0), tokens, segment_ids_BT=segment_ids
        ... )
        >>> logits.shape
        (1, 3)
    """

    config: ModelConfig
    runtime: Runtime = Runtime()
    num_classes: int = 0
    max_segments: int = 0

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B C"]:
        """Float32 logits of each class.

        Args:
            tokens_BT: tokens, one text per row.
            segment_ids_BT: 0 is padding; None means there is none.
            token_types_BT: of each token, where the config has token types; None means 0.
            train: apply dropout, with the `dropout` key.
        """
        config = self.config
        if self.num_classes < 2:
            raise UserError(
                f"A classifier needs at least two classes, got num_classes={self.num_classes}; "
                "for your own batches, BatchData(class_names=...) names them."
            )
        runtime = self.runtime.of(config)
        pooled_BD = pooled_states(
            config,
            runtime,
            tokens_BT,
            segment_ids_BT=segment_ids_BT,
            token_types_BT=token_types_BT,
            max_segments=self.max_segments,
            train=train,
        )
        pooled_BD = nn.Dropout(config.dropout)(pooled_BD, deterministic=not train)
        logits_BC = Linear(
            features=(self.num_classes,),
            axes=("embed", None),
            use_bias=True,
            output_dtype=jnp.dtype(jnp.float32),
            runtime=runtime.of_heads,
            name="classifier",
        )(pooled_BD)
        return capped(config, logits_BC)
