"""Calibration of classifiers: the difference between confidence and accuracy, and its diagram."""

import html
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.terminal import printable

NUM_BINS = 15
"""Guo et al. (2017), section 4."""


def calibration_statistics(
    probabilities_BC: Float[Array, "B C"], labels_B: Int[Array, " B"], weights_B: Float[Array, " B"]
) -> Float[Array, "3 M"]:
    """Sums over texts in M bins of equal width: texts, confidence, and texts that are right; they add over batches.

    The confidence is the probability of the most likely class. Bin m of 0 ... M-1 holds confidences above m/M and up to (m+1)/M.

    >>> sums = calibration_statistics(jnp.array([[0.75, 0.25], [0.5, 0.5]]), jnp.array([0, 1]), jnp.ones(2))
    >>> [[int(m) for m in row.nonzero()[0]] for row in sums]
    [[7, 11], [7, 11], [11]]
    """
    confidence_B = jnp.max(probabilities_BC, axis=-1)
    right_B = (jnp.argmax(probabilities_BC, axis=-1) == labels_B).astype(jnp.float32)
    bin_B = jnp.clip(jnp.ceil(confidence_B * NUM_BINS).astype(jnp.int32) - 1, 0, NUM_BINS - 1)
    of_text_3B = jnp.stack([jnp.ones_like(right_B), confidence_B, right_B])
    # A text of no weight may have logits that are no numbers.
    of_text_3B = jnp.where(weights_B[None] > 0, of_text_3B * weights_B[None], 0.0)
    return jnp.zeros((3, NUM_BINS), jnp.float32).at[:, bin_B].add(of_text_3B)


def expected_calibration_error(sums_3M: Float[np.ndarray, "3 M"]) -> float:
    """`sum_m n_m / n |accuracy_m - confidence_m|` over bins (Guo et al. 2017, equation 5).

    >>> expected_calibration_error(np.array([[4.0, 0.0, 6.0], [1.0, 0.0, 5.4], [2.0, 0.0, 6.0]]))
    0.16
    """
    texts_M, confidence_M, right_M = sums_3M
    return float(np.round(np.abs(right_M - confidence_M).sum() / texts_M.sum(), 12))


def calibration_bins(sums_3M: Float[np.ndarray, "3 M"]) -> list[dict[str, Any]]:
    """Each bin that holds a text: its bounds, its texts, and their mean confidence and accuracy."""
    count = sums_3M.shape[1]
    return [
        {
            "above": m / count,
            "up_to": (m + 1) / count,
            "texts": int(texts),
            "confidence": float(confidence / texts),
            "accuracy": float(right / texts),
        }
        for m, (texts, confidence, right) in enumerate(sums_3M.T)
        if texts > 0
    ]


# ---- The picture -------------------------------------------------------------------------------------------------------

_SIZE, _LEFT, _TOP, _LOW = 400, 64, 64, 72  # of the square, and where it and the bars of counts lie
_STYLE = """
svg { font: 13px system-ui, sans-serif; background: #fff; color: #222 }
text { fill: currentColor } .title { font-size: 15px; font-weight: 600 } .small { fill: #666 }
.frame { fill: none; stroke: #999 } .grid { stroke: #e4e4e4 } .perfect { stroke: #666; stroke-dasharray: 5 4 }
.accuracy { fill: #3b75af } .gap { fill: #d1495b; fill-opacity: .35; stroke: #d1495b } .count { fill: #9aa5b1 }
@media (prefers-color-scheme: dark) {
svg { background: #16181c; color: #e6e6e6 } .small { fill: #aaa } .frame { stroke: #777 } .grid { stroke: #30343a }
.perfect { stroke: #aaa } .accuracy { fill: #5b9bd8 } .count { fill: #66707c } }
"""


def reliability_diagram(bins: list[dict[str, Any]], error: float, title: str) -> str:
    """An SVG of the accuracy in each bin of confidence, its distance from the mean confidence, and the share of the texts.

    Args:
        bins: as `calibration_bins` gives them.
        error: the expected calibration error.
        title: foreign text; it is escaped.
    """
    total = sum(row["texts"] for row in bins)
    parts = [*_frame(error, title, total)]
    for row in bins:
        left, width = _LEFT + _SIZE * row["above"], _SIZE * (row["up_to"] - row["above"])
        accuracy, confidence = row["accuracy"], row["confidence"]
        said = f"confidence {confidence:.3f}, accuracy {accuracy:.3f}, {row['texts']:,} texts"
        low, high = sorted((accuracy, confidence))
        parts += [
            f"<g><title>{said}</title>",
            _bar("accuracy", left, _y(accuracy), width, _SIZE * accuracy),
            _bar("gap", left, _y(high), width, _SIZE * (high - low)),
            _bar("count", left, _base() - _LOW * row["texts"] / total, width, _LOW * row["texts"] / total),
            "</g>",
        ]
    perfect = f'<line class="perfect" x1="{_LEFT}" y1="{_y(0)}" x2="{_LEFT + _SIZE}" y2="{_y(1)}"/>'
    return "\n".join([*parts, perfect, "</svg>"]) + "\n"


def _frame(error: float, title: str, total: int) -> list[str]:
    """Axes, legend and texts around the bars."""
    width, height = _LEFT + _SIZE + 24, _base() + 44
    shown = printable(title)
    shown = html.escape(shown if len(shown) <= 60 else f"{shown[:59]}…")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_LEFT}" y="24">{shown}</text>',
        f'<text class="small" x="{_LEFT}" y="46">expected calibration error {error:.4f}, {total:,} texts</text>',
    ]
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = _LEFT + _SIZE * tick, _y(tick)
        parts += [
            f'<line class="grid" x1="{_LEFT}" y1="{y:g}" x2="{_LEFT + _SIZE}" y2="{y:g}"/>',
            f'<text x="{_LEFT - 8}" y="{y + 4:g}" text-anchor="end">{tick:g}</text>',
            f'<text x="{x:g}" y="{_base() + 18}" text-anchor="middle">{tick:g}</text>',
        ]
    middle = _TOP + _SIZE / 2
    return [
        *parts,
        f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{_SIZE}" height="{_SIZE}"/>',
        f'<text x="{_LEFT + _SIZE / 2:g}" y="{_base() + 38}" text-anchor="middle">confidence</text>',
        f'<text transform="translate(18 {middle:g}) rotate(-90)" text-anchor="middle">accuracy</text>',
        f'<text class="small" x="{_LEFT - 8}" y="{_base() - _LOW / 2:g}" text-anchor="end">share</text>',
        f'<text class="small" x="{_LEFT - 8}" y="{_base() - _LOW / 2 + 15:g}" text-anchor="end">of texts</text>',
        *_legend(),
    ]


def _legend() -> list[str]:
    entries = (("accuracy", "accuracy"), ("gap", "distance from the confidence"))
    found = []
    for row, (name, words) in enumerate(entries):
        y = _TOP + 12 + 20 * row
        found += [_bar(name, _LEFT + 12, y, 12, 12), f'<text x="{_LEFT + 32}" y="{y + 11}">{words}</text>']
    return found


def _y(share: float) -> float:
    return _TOP + _SIZE * (1 - share)


def _base() -> int:
    """The y coordinate of the base of the bars of counts, below the square."""
    return _TOP + _SIZE + 16 + _LOW


def _bar(name: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{name}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"/>'
