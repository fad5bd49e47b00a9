"""Starting from the parameters of another run, where names and shapes agree, and saying what was done."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.layers.scan_params import is_scanned, loop_params, scan_params
from transformer.types import PyTree, UserError


class Transfer(NamedTuple):
    """Parameters to start from, and the paths that were not simply taken."""

    params: PyTree
    taken: tuple[str, ...]
    reshaped: tuple[str, ...]
    """Of another number of rows: those that both have were taken (a longer position table, a larger vocabulary)."""
    fresh: tuple[str, ...]
    """Not there, or of another shape: initialised anew."""
    skipped: tuple[str, ...]
    """There, but not here."""

    def report(self) -> str:
        """The difference, a line each."""
        lines = [f"{len(self.taken)} parameters taken"]
        for what in ("reshaped", "fresh", "skipped"):
            lines += [f"  {what}: {path}" for path in getattr(self, what)]
        return "\n".join(lines)


def transfer(params: PyTree, donor: PyTree, *, pattern_length: int = 1, num_first: int = 0) -> Transfer:
    """Replace each of `params` by the donor's of the same path.

    Layers are compared one by one, scanned or looped.

    Args:
        params: initialised, of the model to train.
        donor: of the other run.
        pattern_length: blocks of the pattern of the model to train.
        num_first: blocks before it.

    Raises:
        UserError: they have nothing in common.
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
