"""Update rules as one optax chain: clipping, preconditioning, decay, learning rate, parameter groups."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer.adapter_config import AdapterConfig
from transformer.layers.adapters import LORA_A, join, split
from transformer.optimizer import Optimizer
from transformer.training.learning_rate import make_schedule
from transformer.types import Array, Loss, LossOutput, PyTree, UserError

_BLOCK = re.compile(r"(.*blocks/)block_(\d+)(/.*)")


def make_optimizer(
    config: Optimizer, steps: int, params: PyTree
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run and its learning-rate schedule.

    Args:
        config: the update rule and its settings.
        steps: length of the run, for the schedule.
        params: the parameters or their shapes; only paths are read.

    Raises:
        UserError: a parameter group matches no parameter, or all parameters are frozen.
    """
    schedule = make_schedule(config, steps)
    scales = group_scales(config, params)
    transforms = [
        *([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []),
        config.rule(),
        *([optax.add_decayed_weights(config.weight_decay, decay_mask)] if config.weight_decay > 0 else []),
        optax.scale_by_learning_rate(schedule),
    ]
    if any(scale not in (0.0, 1.0) for scale in jax.tree.leaves(scales)):
        transforms.append(_scale_groups(scales))
    optimizer = optax.chain(*transforms)
    if any(scale == 0.0 for scale in jax.tree.leaves(scales)):
        labels = jax.tree.map(lambda scale: "frozen" if scale == 0.0 else "trained", scales)
        optimizer = optax.partition({"trained": optimizer, "frozen": _freeze()}, labels)
    return optimizer, schedule


def parameter_path(path: tuple) -> str:
    """A leaf's path in user notation: `decoder/blocks/block_0/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_mask(params: PyTree) -> PyTree:
    """True for matrices; False for norms, biases and learned position tables.

    Decided by name, not by rank: a bias of heads has two axes, and a scanned stack adds an axis to every parameter.
    """

    def decays(path: tuple, _: object) -> bool:
        names = parameter_path(path).split("/")
        return names[-1] in ("kernel", "embedding", "lora_a", "lora_b") and not {
            "position_embedding",
            "relative_bias",
        } & set(names)

    return jax.tree_util.tree_map_with_path(decays, params)


def check_scanned_groups(config: Optimizer, params: PyTree) -> None:
    """Require that no group distinguishes layers that are one parameter in a scanned stack."""

    groups = config.groups()
    found = [(parameter_path(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    blocks = [(match, x) for path, x in found if (match := _BLOCK.fullmatch(path))]
    for match, x in blocks:
        stack, block, rest = match.groups()
        length = 1 + max(int(other.group(2)) for other, _ in blocks if other.group(1) == stack)
        for layer in range(int(block), x.shape[0] * length, length):
            path = f"{stack}block_{layer}{rest}"
            if _first_scale(groups, path) != _first_scale(groups, match.group()):
                raise UserError(
                    "optimizer.parameter_groups cannot tell the layers of a scanned stack apart, which are one parameter; got "
                    f"{config.parameter_groups}, of which {match.group()} and {path} would be in different groups. Set "
                    "model.scan_layers=False, or give patterns without a block's number."
                )


def check_adapters(config: AdapterConfig, trained: PyTree) -> None:
    """Require that every pattern of `adapter.paths` matches a kernel with an adapter."""
    paths = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    kernels = [path.removesuffix(LORA_A) + "kernel" for path in paths if path.endswith(f"/{LORA_A}")]
    for pattern in config.paths if config.rank else ():
        if not any(re.search(pattern, kernel) for kernel in kernels):
            raise UserError(
                f"adapter.paths: {pattern!r} must match the kernel of a linear layer, as .../attention/query/kernel is; experts, "
                "embeddings, norms and biases have no adapters (`inspect` lists all parameters)."
            )


def group_scales(config: Optimizer, params: PyTree) -> PyTree:
    """The learning-rate factor of every parameter: the first group whose pattern occurs in its path sets it; else 1."""
    groups = config.groups()
    paths = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern, _ in groups:
        if not any(pattern.search(path) for path in paths):
            raise UserError(
                f"optimizer.parameter_groups: {pattern.pattern!r} must match a parameter; the parameters are "
                f"{', '.join(paths[:4])}, ... (`inspect` lists them all)."
            )

    scales = jax.tree_util.tree_map_with_path(lambda path, _: _first_scale(groups, parameter_path(path)), params)
    if all(scale == 0.0 for scale in jax.tree.leaves(scales)):
        raise UserError(
            f"optimizer.parameter_groups must leave something to train, got {config.parameter_groups}; "
            "drop the pattern that freezes everything."
        )
    return scales


def _first_scale(groups: Sequence[tuple[re.Pattern[str], float]], path: str) -> float:
    return next((scale for pattern, scale in groups if pattern.search(path)), 1.0)


def freeze(loss: Loss, config: Optimizer, params: PyTree) -> Loss:
    """The loss with frozen parameters held constant: their gradient is neither computed nor counted in the norm.

    Args:
        loss: the model's loss.
        config: its parameter groups apply to the trained parameters.
        params: all parameters of the model, or their shapes; the base of adapters is frozen.
    """
    frozen, trained = split(params)
    scales = join(jax.tree.map(lambda _: 0.0, frozen), group_scales(config, trained))
    if all(scale != 0.0 for scale in jax.tree.leaves(scales)):
        return loss

    def held_loss(params: PyTree, carry: PyTree, batch: Any, key: Array, train: bool) -> LossOutput:
        held = jax.tree.map(lambda p, scale: jax.lax.stop_gradient(p) if scale == 0.0 else p, params, scales)
        return loss.loss(held, carry, batch, key, train)

    return loss._replace(loss=held_loss)


def _scale_groups(scales: PyTree) -> optax.GradientTransformation:
    by_path = {parameter_path(path): scale for path, scale in jax.tree_util.tree_leaves_with_path(scales)}

    def update(updates: PyTree, _: PyTree) -> PyTree:
        # By path, because frozen parameters are masked out of `updates`.
        return jax.tree_util.tree_map_with_path(lambda path, u: u * by_path[parameter_path(path)], updates)

    return optax.stateless(update)


def _freeze() -> optax.GradientTransformation:
    # Minus zero, because x + -0.0 is x for every x, whereas -0.0 + 0.0 is 0.0.
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))
