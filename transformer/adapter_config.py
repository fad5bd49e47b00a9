"""Low-rank adapters as a frozen dataclass: which kernels have them, and their rank."""

import dataclasses
import functools
import re
from collections.abc import Mapping

from transformer.validation import Settings, require, require_at_least, require_range


@dataclasses.dataclass(frozen=True)
class AdapterConfig(Settings):
    """Low-rank adapters (LoRA, Hu et al. 2021): `x · kernel + alpha / rank · x · A · B`; only A and B are trained.

    Example:
        >>> AdapterConfig(rank=4).adapts("decoder/blocks/block_0/attention/query/kernel")
        True
        >>> AdapterConfig(rank=4).adapts("output/kernel")
        False
    """

    rank: int = 0
    """Columns of A and rows of B; 0 means no adapters. Adapters freeze the run's other parameters, from training.init_from."""
    alpha: float = 16.0
    """Scale of the adapters' output is alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an element of the input of A, in training."""
    paths: tuple[str, ...] = (r"attention/(query|key|value|out)/kernel|feed_forward/(up|gate|down)/kernel",)
    """Regular expressions for the paths of kernels with adapters (as in optimizer.parameter_groups); by default all
    kernels of attention and feed-forward networks."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "rank")
        require_range(self, 0, 1, "dropout")
        require(self.alpha > 0, f"AdapterConfig.alpha must be positive, got {self.alpha}.")
        require(len(self.paths) > 0 and all(self.paths), f"AdapterConfig.paths must be patterns, got {self.paths}.")
        for path in self.paths:
            try:
                re.compile(path)
            except re.error as error:
                require(False, f"AdapterConfig.paths must be regular expressions, got {path!r} ({error}).")

    def unused(self) -> Mapping[str, str]:
        """Without adapters, all settings except the rank."""
        return {} if self.rank else dict.fromkeys(("alpha", "dropout", "paths"), "runs with adapters (adapter.rank)")

    @property
    def scale(self) -> float:
        """The factor on the product with A and B."""
        return self.alpha / self.rank

    def adapts(self, path: str) -> bool:
        """Whether the kernel with this path has an adapter."""
        return self.rank > 0 and any(_compiled(pattern).search(path) for pattern in self.paths)


_compiled = functools.cache(re.compile)
