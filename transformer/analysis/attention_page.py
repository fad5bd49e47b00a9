"""Renders attention weights as a page: one HTML file without network access."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from transformer.analysis.assemble import assemble
from transformer.analysis.attention import AttentionMap, TextAttention
from transformer.analysis.heads import head_statistics, most_concentrated_head

MOST_BYTES = 14_500_000
"""Most bytes of all weights as text; if both states of a model exceed it, the initial state has only statistics."""
_FOOT = (
    "The square root of each weight is rounded to 8 bits, with an error of a weight of at most 1/255. Statistics are "
    "computed from the exact weights."
)
Candidates = list[list[tuple[str, float, bool]]]
"""Candidates of each row of logits: text, probability, and whether it is the token of the text."""


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
    """The HTML text of an attention page.

    Args:
        seen: the attention weights of one text.
        texts: the tokens of each stack as readable text.
        heading: name of the model.
        about: a line about the model.
        candidates: the model's most likely tokens.
        initial: the attention weights of the same text with other parameters of the model.
        initial_name: name of the other parameters, such as `before training`.
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
        "start": most_concentrated_head(seen.maps[0].weights, one_text=seen.maps[0].queries == seen.maps[0].keys),
    }
    return assemble("attention", data, kicker="Attention", heading=heading, about=about, foot=_FOOT)


def _map(found: AttentionMap, initial: AttentionMap | None, count: int) -> dict[str, Any]:
    """A map for the script: weights and statistics of heads of each layer."""
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
    """Weights as text: square roots in 8 bits, compressed by zlib, in base 64.

    A code c means the weight (c / 255)². Rounding to the nearest code changes a weight by less than 1/255. Small weights, which
    are the most frequent, change by far less.
    """
    codes = np.rint(255 * np.sqrt(np.clip(weights_HTS, 0, 1))).astype(np.uint8)
    return base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode()


def unpack(text: str, shape: tuple[int, int, int]) -> Float[np.ndarray, "H T S"]:
    """The weights that the page shows, from the text of `pack`.

    Example:
        >>> unpack(pack(np.array([[[0.25, 0.75]]])), (1, 1, 2)).round(2).tolist()
        [[[0.25, 0.75]]]
    """
    codes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape)
    return np.square(codes / 255)
