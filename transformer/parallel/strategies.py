"""The kinds of `parallel.strategy`."""

from collections.abc import Mapping

from transformer.parallel.mesh import MeshRunner
from transformer.parallel.pmap import PmapRunner
from transformer.parallel.runner import Runner

STRATEGIES: Mapping[str, type[Runner]] = {"mesh": MeshRunner, "pmap": PmapRunner}
"""Name -> the class that runs the steps."""
