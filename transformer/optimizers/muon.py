"""Muon: orthogonalised updates for the matrices of blocks, Adam for other parameters (Jordan 2024)."""

import dataclasses

import jax
import optax

from transformer.optimizer import OPTIMIZERS
from transformer.optimizers.bases import AdaptiveOptimizer
from transformer.types import PyTree
from transformer.validation import require_range

# Location of the matrices in a block, and their axes from the end: (contracted, produced).
# Attention keeps heads apart: query, key, value are (embed, heads, head_dim), out is (heads, head_dim, embed).
# Preceding axes, of scanned layers and of experts, number separate matrices.
MATRICES = {
    "query": ((-3,), (-2, -1)),
    "key": ((-3,), (-2, -1)),
    "value": ((-3,), (-2, -1)),
    "relative_position": ((-3,), (-2, -1)),
    "out": ((-3, -2), (-1,)),
    "up": ((-2,), (-1,)),
    "gate": ((-2,), (-1,)),
    "down": ((-2,), (-1,)),
}


@OPTIMIZERS.register
@dataclasses.dataclass(frozen=True)
class Muon(AdaptiveOptimizer):
    """The orthogonalised momentum of each matrix of a block; b1, b2 and eps belong to Adam, for other parameters."""

    kind = "muon"

    momentum: float = 0.95
    """Decay of the momentum of the blocks' matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, 1, "momentum")

    def rule(self) -> optax.GradientTransformation:
        """Orthogonalised updates of matrices, Adam's of other parameters."""
        # consistent_rms=0.2 gives Muon's matrices the update size of AdamW (Liu et al. 2025): one learning rate and one decay
        # then serve both. The learning rate of -1 undoes optax's change of sign: ours comes last in the chain.
        return optax.contrib.muon(
            learning_rate=-1.0,
            beta=self.momentum,
            adam_b1=self.b1,
            adam_b2=self.b2,
            eps=self.eps,
            consistent_rms=0.2,
            mu_dtype=self.first_moment(),
            muon_weight_dimension_numbers=muon_dimensions,
        )


def muon_dimensions(params: PyTree) -> PyTree:
    """The axes of each matrix that Muon orthogonalises; None for embeddings, norms, biases, routers and the output layer."""

    def dimensions(path: tuple, _: object) -> optax.contrib.MuonDimensionNumbers | None:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[-1] != "kernel" or len(names) < 2 or names[-2] not in MATRICES:
            return None
        return optax.contrib.MuonDimensionNumbers(*MATRICES[names[-2]])

    return jax.tree_util.tree_map_with_path(dimensions, params)
