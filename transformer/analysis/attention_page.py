"""Attention as a page: one HTML file to look into, which needs no network."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from transformer.analysis.assemble import assemble
from transformer.analysis.attention import AttentionMap, TextAttention
from transformer.analysis.heads import head_statistics, telling_head

MOST_BYTES = 14_500_000
"""Of all weights together, as text: where both states of a model take more, the initial one has its statistics alone."""
_FOOT = (
    "Weights are rounded to 8 bits of their square root: no number of a single weight is off by more than 1/255. Statistics are "
    "of the exact weights."
)
Candidates = list[list[tuple[str, float, bool]]]
"""Of each row of logits: texts, their probabilities, and whether it is the one of the text."""


def render_page(
    seen: TextAttention,
    texts: Mapping[str, Sequence[str]],
    *,
    heading: str,
    about: str,
    candidates: Candidates | None = None,
    initial: TextAttention | None = None,
    initial_name: str = "",
) -> str:
    """The page.

    Args:
        seen: the attention of one text.
        texts: the tokens of each stack, for people.
        heading: names the model.
        about: says more of it.
        candidates: what the model holds likely.
        initial: the attention of other parameters of the same model while it reads the same.
        initial_name: what those are called, as `before training`.
    """
    maps = [_map(found, initial and initial.maps[index], len(seen.maps)) for index, found in enumerate(seen.maps)]
    layers = [layer for found in maps for layer in found["layers"]]
    drawn = sum(len(layer[state]) for layer in layers for state in ("weights", "initial")) <= MOST_BYTES
    if not drawn:
        for layer in layers:
            layer["initial"] = ""
    data = {
        "texts": {stack: list(tokens) for stack, tokens in texts.items()},
        "maps": maps,
        "initial": initial_name,
        "drawn": drawn,
        "predicts": seen.reading.predicts,
        "of": seen.reading.of,
        "candidates": candidates,
        "start": telling_head(seen.maps[0].weights, one_text=seen.maps[0].queries == seen.maps[0].keys),
    }
    return assemble("attention", data, kicker="Attention", heading=heading, about=about, foot=_FOOT)


def _map(found: AttentionMap, initial: AttentionMap | None, count: int) -> dict[str, Any]:
    """A map for the script: each layer's weights, and the statistics of its heads."""
    one_text = found.queries == found.keys
    name = f"{found.queries} to itself" if one_text else f"{found.queries} to {found.keys}"
    layers = []
    for layer, weights_HTS in enumerate(found.weights):
        part: dict[str, Any] = {"heads": len(weights_HTS), "weights": pack(weights_HTS), "initial": "", "before": None}
        part["after"] = _numbers(weights_HTS, one_text)
        if initial is not None:
            part |= {"initial": pack(initial.weights[layer]), "before": _numbers(initial.weights[layer], one_text)}
        layers.append(part)
    return {"name": name if count > 1 else "", "queries": found.queries, "keys": found.keys, "layers": layers}


def _numbers(weights_HTS: np.ndarray, one_text: bool) -> dict[str, list[float] | None]:
    found = head_statistics(weights_HTS, one_text=one_text)._asdict()
    return {kind: None if x is None else [round(float(value), 5) for value in x] for kind, x in found.items()}


def pack(weights_HTS: Float[np.ndarray, "H T S"]) -> str:
    """Weights as text: 8 bits of their square roots, compressed by zlib, in base 64.

    A code c stands for (c / 255)². Rounded to the nearest code, a weight moves by less than 1/255, a small one by far less: a
    square root has more codes where most weights are.
    """
    codes = np.rint(255 * np.sqrt(np.clip(weights_HTS, 0, 1))).astype(np.uint8)
    return base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode()


def unpack(text: str, shape: tuple[int, int, int]) -> Float[np.ndarray, "H T S"]:
    """The weights that the page shows, of the text that `pack` made.

    Example:
        >>> unpack(pack(np.array([[[0.25, 0.75]]])), (1, 1, 2)).round(2).tolist()
        [[[0.25, 0.75]]]
    """
    codes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape)
    return np.square(codes / 255)
