"""Statistics of attention heads: entropy, distance, and divergence from other heads."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class HeadStatistics(NamedTuple):
    """Statistics of the heads of a layer, float [H] each: means over all queries but the first."""

    entropy: np.ndarray
    """Entropy in bits: 0 for a single key, 3 for eight keys of equal weight."""
    first: np.ndarray
    """Weight of the first token."""
    distance: np.ndarray | None
    """Weighted mean distance from query to key, in tokens; None if queries and keys belong to two texts."""
    previous: np.ndarray | None
    """Weight of the token before the query; None if queries and keys belong to two texts."""
    divergence: np.ndarray
    """Mean Jensen-Shannon divergence from the other heads of the layer, in bits: 0 if all are equal, 1 if none shares a key
    with another; 0 for a single head."""


def entropy(weights: Array | np.ndarray) -> Array:
    """Entropy in bits over the last axis."""
    return -(weights * jnp.log2(jnp.where(weights > 0, weights, 1))).sum(axis=-1)


def divergence(weights_BHTS: Float[Array | np.ndarray, "B H T S"]) -> Float[Array, " pairs"]:
    """Jensen-Shannon divergence of each pair of heads (Lin 1991), in bits, as a mean over queries.

    Pairs are in the order of `np.triu_indices(H, k=1)`; for a single head, the result is one 0.
    """
    first, second = np.triu_indices(weights_BHTS.shape[1], k=1)
    single_BHT = entropy(weights_BHTS)
    pairs = [
        entropy((weights_BHTS[:, i] + weights_BHTS[:, j]) / 2) - (single_BHT[:, i] + single_BHT[:, j]) / 2
        for i, j in zip(first, second, strict=True)
    ]
    return jnp.stack([pair.mean() for pair in pairs]) if pairs else jnp.zeros(1)


def share_by_distance(weights_HTS: Array | np.ndarray) -> np.ndarray:
    """Weight at each distance back from the query, as a mean over queries [H, S]; queries are the last of the keys."""
    _, T, S = weights_HTS.shape
    distance_TS = np.arange(S - T, S)[:, None] - np.arange(S)[None]
    return np.stack([(weights_HTS * (distance_TS == d)).sum(axis=(1, 2)) / T for d in range(S)], axis=-1)


def head_statistics(weights_HTS: Float[np.ndarray, "H T S"], *, one_text: bool = True) -> HeadStatistics:
    """The statistics of a layer's heads.

    Args:
        weights_HTS: weights of one text. If there are more queries, the first one is left out, since it sees only itself in a
            causal model.
        one_text: whether queries are the last of the keys. Otherwise distances have no meaning.
    """
    H, T, S = weights_HTS.shape
    queries_T = np.arange(S - T, S) if one_text else np.arange(T)
    late_HTS, queries_T = (weights_HTS[:, 1:], queries_T[1:]) if T > 1 else (weights_HTS, queries_T)
    distance = previous = None
    if one_text:
        away_TS = np.abs(queries_T[:, None] - np.arange(S)[None])
        distance = (late_HTS * away_TS[None]).sum(axis=-1).mean(axis=-1)
        before_TS = np.arange(S)[None] == queries_T[:, None] - 1
        previous = (late_HTS * before_TS[None]).sum(axis=-1).mean(axis=-1)
    divergence_HH = np.zeros((H, H))
    if H > 1:
        divergence_HH[np.triu_indices(H, k=1)] = divergence(late_HTS[None])
    mean_divergence_H = (divergence_HH + divergence_HH.T).sum(axis=-1) / max(H - 1, 1)
    entropies = np.asarray(entropy(late_HTS)).mean(axis=-1)
    return HeadStatistics(entropies, late_HTS[:, :, 0].mean(axis=-1), distance, previous, mean_divergence_H)


def most_concentrated_head(layers: Sequence[np.ndarray], *, one_text: bool = True) -> tuple[int, int]:
    """Layer and index of the head with the lowest entropy among heads without a fixed target.

    A head has a fixed target if half of its weight or more goes to the first token or, within one text, to the previous token
    or the query's own. If all heads have one, the lowest entropy of all heads counts. `layers` has the weights [heads,
    queries, keys] of each layer.
    """
    found = []
    for layer, weights_HTS in enumerate(layers):
        statistics = head_statistics(weights_HTS, one_text=one_text)
        _, T, S = weights_HTS.shape
        fixed = [statistics.first]
        if one_text and statistics.previous is not None:
            itself_HT = np.diagonal(weights_HTS, offset=S - T, axis1=1, axis2=2)
            fixed += [statistics.previous, itself_HT[:, min(1, T - 1) :].mean(axis=-1)]
        is_fixed_H = np.max(fixed, axis=0) >= 0.5
        found += [
            (bool(p), float(e), layer, head)
            for head, (p, e) in enumerate(zip(is_fixed_H, statistics.entropy, strict=True))
        ]
    return min(found)[2:]
