"""Loads the weights of a folder as parameters on devices; each process reads the bytes of its own shards only."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from transformer.interop import table
from transformer.interop.folder import Folder, common_dtype
from transformer.interop.tensors import DTYPES, FLOATS, Stored
from transformer.model_config import ModelConfig
from transformer.types import PyTree
from transformer.validation import require


class Weights(NamedTuple):
    """The tensors of a folder, checked against the parameters of a model, but not yet read."""

    folder: Folder
    tensors: dict[str, Stored]
    bound: list[table.Bound]
    shapes: dict[str, tuple[int, ...]]
    """The shapes of the looped model's parameters."""
    leaves: dict[str, table.Leaf]
    """The parameters of the model."""
    ignored: list[str]
    """Tensors that are ignored."""

    @property
    def dtype(self) -> np.dtype:
        """The type in which all parameters are stored.

        Raises:
            UserError: they have several types.
        """
        return common_dtype({rule.theirs: self.tensors[rule.theirs] for rule in self.bound}, self.folder.path)

    @property
    def dtypes(self) -> dict[str, str]:
        """The stored type of each tensor that is used."""
        return {rule.theirs: str(DTYPES.get(self.tensors[rule.theirs].dtype)) for rule in self.bound}

    def read(self, params: PyTree) -> PyTree:
        """Read the parameters.

        Args:
            params: their shapes and types, with the target shardings; without one, the first device is used.
        """
        view = self._view
        found = table.sources(self.bound, self.shapes, view)
        leaves = iter(self.leaves.values())

        def array(shape: Any) -> jax.Array:
            sharding = getattr(shape, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
            return table.make_array(next(leaves), found, shape.dtype, sharding)

        return jax.tree.map(array, params)

    def _view(self, name: str) -> np.ndarray:
        return self.folder.view(self.tensors[name])


def open_weights(folder: Folder, config: ModelConfig, shapes: PyTree) -> Weights:
    """The weights of a folder, which must provide every parameter of a model.

    Args:
        folder: the folder of the pretrained model.
        config: the config of the model, whose layers may be scanned.
        shapes: the shapes of its parameters.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; or tied tensors differ.
    """
    family, where = folder.family, str(folder.path)
    tensors = folder.tensors
    leaves = table.leaves(shapes, len(config.first), len(config.pattern), scanned=config.scan_layers)
    looped = table.looped_shapes(leaves)
    bound = table.bind(
        family.rules(config, folder.pretrained.objective), looped, max(config.num_layers, config.decoder_layers)
    )
    stored: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in tensors.items()}
    copies = family.copies(config)
    ignored = table.check_tensors(stored, bound, looped, family.ignored, copies, where)
    strange = [rule.theirs for rule in bound if tensors[rule.theirs].dtype not in FLOATS]
    require(
        not strange,
        f"Parameters must be stored in a type of floating-point numbers ({', '.join(FLOATS)}), {where} has "
        f"{tensors[strange[0]].dtype if strange else ''} for {strange[:1]}; use a folder that is not quantised.",
    )
    weights = Weights(folder, tensors, bound, looped, leaves, ignored)
    ignored += table.check_copies(tensors, copies, weights._view, where)
    return weights
