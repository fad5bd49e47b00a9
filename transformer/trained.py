"""The interface of a trained model, as objectives and generation use it."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from transformer.types import Array, PyTree

if TYPE_CHECKING:
    from transformer.config import Config
    from transformer.data.tokenizers import Tokenizer


@runtime_checkable
class Trained(Protocol):
    """A trained model with its tokenizer and config, as returned by `load`."""

    @property
    def model(self) -> Any:
        """The linen module."""

    @property
    def params(self) -> PyTree:
        """Its parameters."""

    @property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer of the training run."""
        ...

    @property
    def config(self) -> "Config":
        """The run's config, resolved."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of a classifier, in the order of its logits."""
        ...

    def place(self, rows: np.ndarray) -> Array:
        """Place rows of a batch on the devices of the parameters."""
        ...
