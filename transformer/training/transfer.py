"""Initialization from the parameters of another run, for matching names and shapes, with a report of the differences."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.layers.scan_params import is_scanned, loop_params, scan_params
from transformer.types import PyTree, UserError


class Transfer(NamedTuple):
    """Initial parameters, and the paths of those that were not copied unchanged."""

    params: PyTree
    taken: tuple[str, ...]
    reshaped: tuple[str, ...]
    """Parameters with another number of rows: common rows were copied (a longer position table, a larger vocabulary)."""
    fresh: tuple[str, ...]
    """Parameters that are missing there, or have another shape there: initialized randomly."""
    skipped: tuple[str, ...]
    """Parameters that exist there, but not here."""

    def report(self) -> str:
        """The differences, one per line."""
        lines = [f"{len(self.taken)} parameters taken"]
        for what in ("reshaped", "fresh", "skipped"):
            lines += [f"  {what}: {path}" for path in getattr(self, what)]
        return "\n".join(lines)


def transfer(params: PyTree, donor: PyTree, *, pattern_length: int = 1, num_first: int = 0) -> Transfer:
    """Replace each of `params` by the donor's parameter with the same path.

    Layers are compared one by one, whether scanned or looped.

    Args:
        params: the initialized parameters of the model to train.
        donor: the parameters of the other run.
        pattern_length: number of blocks in the pattern of the model to train.
        num_first: number of blocks before the pattern.

    Raises:
        UserError: the two have no parameter in common.
    """
    here, there = is_scanned(params), is_scanned(donor)
    if here or there:
        looped = transfer(loop_params(params) if here else params, loop_params(donor) if there else donor)
        return looped._replace(params=scan_params(looped.params, pattern_length, num_first)) if here else looped
    given = {_path(path): value for path, value in jax.tree_util.tree_leaves_with_path(donor)}
    taken, reshaped, fresh = [], [], []

    def choose(path: Any, own: Any) -> Any:
        name = _path(path)
        other = given.pop(name, None)
        if other is not None and other.shape == own.shape:
            taken.append(name)
            return jnp.asarray(other, own.dtype)
        if other is not None and other.ndim == own.ndim and other.shape[1:] == own.shape[1:]:
            rows = min(len(own), len(other))
            reshaped.append(f"{name} (the first {rows} of {len(own)} rows)")
            return own.at[:rows].set(jnp.asarray(other[:rows], own.dtype))
        fresh.append(name if other is None else f"{name} ({list(own.shape)} here, {list(other.shape)} there)")
        return own

    params = jax.tree_util.tree_map_with_path(choose, params)
    if not taken and not reshaped:
        raise UserError(
            f"training.init_from must be a run of a similar model; of its parameters ({', '.join(sorted(given)[:3])}, ...) "
            f"none fits this one ({', '.join(fresh[:3])}, ...)."
        )
    return Transfer(params, tuple(taken), tuple(reshaped), tuple(fresh), tuple(sorted(given)))


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
