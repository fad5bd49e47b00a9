"""The table of a family: the correspondence of stored tensors and parameters, for both directions, exact or refused."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.interop.forms import Form, parse
from transformer.types import Array, PyTree
from transformer.validation import require, shown

_LAYER, _EXPERT = "{layer}", "{expert}"
_BLOCK = re.compile(r"(?P<stack>.*?)(?P<part>first|blocks|last)/block_(?P<index>\d+)/(?P<rest>.*)")


class Rule(NamedTuple):
    """One stored tensor (or one per layer or expert), and one or more parameters.

    `{layer}` in a name is the number of the layer; `{expert}`, only in stored names, the number of the expert. Parameters have
    an axis of experts before the axes of the form.
    """

    theirs: str
    ours: str | tuple[str, ...]
    """Paths in the tree of a looped model, with `/`. Several parameters are fused in one stored tensor: along the form's axis
    `part`, or without it concatenated along the stored tensor's first axis."""
    form: str


class Bound(NamedTuple):
    """A rule for one layer and one expert."""

    theirs: str
    ours: tuple[str, ...]
    expert: int | None
    form: Form


def bind(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], layers: int) -> list[Bound]:
    """The rules for every layer and expert of a model, without the rules of parameters that it does not have.

    Args:
        rules: the rules of a family.
        shapes: the shapes of a looped model's parameters, by path.
        layers: number of layers of each stack.
    """
    bound = []
    for rule in rules:
        form, ours = parse(rule.form), ((rule.ours,) if isinstance(rule.ours, str) else rule.ours)
        for layer in range(layers) if _LAYER in rule.theirs + ours[0] else (0,):
            paths = tuple(path.replace(_LAYER, str(layer)) for path in ours)
            theirs = rule.theirs.replace(_LAYER, str(layer))
            axes = form.num_axes + (_EXPERT in theirs)  # layers without experts use the same paths
            if not all(len(shapes.get(path, ())) == axes for path in paths):
                continue
            experts = range(shapes[paths[0]][0]) if _EXPERT in theirs else (None,)
            bound += [Bound(theirs.replace(_EXPERT, str(expert)), paths, expert, form) for expert in experts]
    return bound


def own_shapes(bound: Bound, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of a rule's parameters, without the axis of experts for a rule of one expert."""
    return [shapes[path][1:] if bound.expert is not None else shapes[path] for path in bound.ours]


def their_shape(bound: Bound, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a rule's stored tensor."""
    return bound.form.shape(own_shapes(bound, shapes))


# ---- Looped and scanned trees ------------------------------------------------------------------------------------------


class Leaf(NamedTuple):
    """A parameter of a tree: one parameter of a looped model, or the stacked ones of a scanned model's periods."""

    looped: tuple[str, ...]
    """Paths in the tree of the looped model; several are stacked on a leading axis."""
    value: Array
    scanned: bool


def leaves(tree: PyTree, num_first: int, period: int, *, scanned: bool) -> dict[str, Leaf]:
    """The parameters of a tree by path; in a scanned tree, each lists its layers.

    Args:
        tree: parameters or their shapes.
        num_first: number of blocks before the pattern.
        period: number of blocks in the pattern.
        scanned: whether the pattern's blocks have a leading axis of periods.
    """
    found = {}
    for keys, value in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        block = _BLOCK.fullmatch(path) if scanned else None
        if block is None:
            found[path] = Leaf((path,), value, False)
            continue
        stack, index = block["stack"], int(block["index"])
        periods = _periods(tree, stack)
        numbers = {
            "first": [index],
            "blocks": [num_first + index + period * number for number in range(periods)],
            "last": [num_first + period * periods + index],
        }[block["part"]]
        looped = tuple(f"{stack}blocks/block_{number}/{block['rest']}" for number in numbers)
        found[path] = Leaf(looped, value, block["part"] == "blocks")
    return found


def _periods(tree: PyTree, stack: str) -> int:
    for name in filter(None, stack.split("/")):
        tree = tree[name]
    return jax.tree.leaves(tree["blocks"])[0].shape[0]


def looped_shapes(tree: Mapping[str, Leaf]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of the looped model, by path."""
    return {
        path: tuple(leaf.value.shape[1:] if leaf.scanned else leaf.value.shape)
        for leaf in tree.values()
        for path in leaf.looped
    }


# ---- Reading -----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """The origin of a looped model's parameter: views of a stored tensor, or of one per expert."""

    views: tuple[Callable[[], np.ndarray], ...]
    experts: bool

    def fill(self, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copy a slice of the parameter, cast to the type of `out`."""
        if not self.experts:
            out[...] = self.views[0]()[index]
            return
        for place, expert in enumerate(range(len(self.views))[index[0]]):
            out[place] = self.views[expert]()[index[1:]]


def sources(
    bound: Sequence[Bound], shapes: Mapping[str, tuple[int, ...]], view: Callable[[str], np.ndarray]
) -> dict[str, Source]:
    """The source of each parameter of the looped model.

    Args:
        bound: the rules of a model.
        shapes: the shapes of its parameters.
        view: returns a stored tensor as a view, by name.
    """
    found: dict[str, list[Callable[[], np.ndarray]]] = {}
    experts = set()
    for rule in bound:
        for place, path in enumerate(rule.ours):
            found.setdefault(path, []).append(functools.partial(_part, rule, own_shapes(rule, shapes), view, place))
            if rule.expert is not None:
                experts.add(path)
    return {path: Source(tuple(views), path in experts) for path, views in found.items()}


def _part(rule: Bound, shapes: list[tuple[int, ...]], view: Callable[[str], np.ndarray], place: int) -> np.ndarray:
    return rule.form.to_ours(view(rule.theirs), shapes)[place]


def make_array(leaf: Leaf, found: Mapping[str, Source], dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    """A parameter on its devices; a process reads the bytes of its own shards into its own memory."""
    shape = tuple(leaf.value.shape)

    def shard(index: Any) -> np.ndarray:
        out = _aligned(tuple(len(range(size)[part]) for size, part in zip(shape, index, strict=True)), dtype)
        if not leaf.scanned:
            found[leaf.looped[0]].fill(index, out)
            return out
        for place, path in enumerate(leaf.looped[index[0]]):
            found[path].fill(index[1:], out[place])
        return out

    return jax.make_array_from_callback(shape, sharding, shard)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that a CPU device uses without a copy: XLA copies arrays not aligned to 64 bytes, which doubles a large table."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


# ---- Strictness --------------------------------------------------------------------------------------------------------


def check_tensors(
    stored: Mapping[str, tuple[int, ...]],
    bound: Sequence[Bound],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Sequence[str],
    copies: Mapping[str, str],
    where: str,
) -> list[str]:
    """Require that every stored tensor is used once, and every parameter is filled.

    Args:
        stored: the shape of each stored tensor.
        bound: the rules of the model.
        shapes: the shapes of its parameters.
        ignored: patterns of tensor names that the family ignores.
        copies: redundant tensors -> the tensors that they must equal.
        where: the name of the folder, for messages.

    Returns:
        The names of ignored tensors.
    """
    wanted = {rule.theirs: their_shape(rule, shapes) for rule in bound}
    missing = [name for name in wanted if name not in stored]
    unfilled = sorted(set(shapes).difference(path for rule in bound for path in rule.ours))
    extra = [name for name in stored if name not in wanted and name not in copies]
    left_out = [name for name in extra if any(re.fullmatch(pattern, name) for pattern in ignored)]
    unknown = [name for name in extra if name not in left_out]
    differing = [name for name in wanted if name in stored and stored[name] != wanted[name]]
    require(
        not missing,
        f"{where} must hold every tensor of its model, it lacks {_some(missing)}; copy all its files, or check config.json.",
    )
    require(
        not differing,
        f"{where} must have the shapes that its config.json says, but "
        + _some(
            [f"{name:.60} has {shown(list(stored[name])):.40} instead of {list(wanted[name])}" for name in differing]
        )
        + ".",
    )
    require(
        not unknown,
        f"{where} must hold no tensor that has no place in the model, it has {_some(unknown)}; the model is another one than "
        "config.json says, or of a variant that is not supported.",
    )
    require(not unfilled, f"{where} must fill every parameter, it does not fill {_some(unfilled)}.")
    return left_out


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"{name:.80}" for name in names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def check_copies(
    stored: Mapping[str, Any], copies: Mapping[str, str], view: Callable[[str], np.ndarray], where: str
) -> Iterator[str]:
    """The redundant tensors in the folder; each must equal its counterpart bit for bit.

    Raises:
        UserError: one differs.
    """
    for name, other in copies.items():
        if name in stored:
            copy, original = view(name), view(other)
            require(
                copy.dtype == original.dtype and copy.shape == original.shape and _same_bits(copy, original),
                f"{where} must have {name} equal to {other}, with which it is tied, but they differ: config.json says "
                "tie_word_embeddings, and the weights do not.",
            )
            yield name


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal, compared in pieces, so that no copy of a large table is made."""
    kind = f"u{one.dtype.itemsize}"
    rows = max(1, 2**24 // max(1, one[:1].nbytes)) if one.ndim else 1
    flat = (one.view(kind), other.view(kind)) if one.ndim else (one.reshape(1).view(kind), other.reshape(1).view(kind))
    return all(
        np.array_equal(flat[0][start : start + rows], flat[1][start : start + rows])
        for start in range(0, len(flat[0]), rows)
    )
