"""Renders runs as a page: one HTML file of curves, samples, scores, settings and times, without network access."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer.analysis.assemble import assemble
from transformer.validation import counted

MOST_POINTS = 150_000
"""Most points of all curves together; a longer curve keeps the lowest and the highest value of each interval."""
MOST_SAMPLES, MOST_CHARACTERS = 40, 2_000
MOST_CLASSES = 60
"""Most classes of a drawn confusion matrix; for more classes, the most frequent confusions are listed."""
_KNOWN = {
    "loss": ("Loss", "nats"),
    "bits_per_byte": ("Bits per byte", ""),
    "accuracy": ("Accuracy", ""),
    "macro_f1": ("Macro-F1", ""),
    "bleu": ("BLEU", ""),
    "chrf": ("chrF", ""),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "tokens_per_second": ("Throughput", "tokens a second"),
    "mfu": ("Model FLOPs utilisation", "share of the peak"),
}
_LOSS = ("objective.kind", "data.tokenizer.kind")
"""Settings that change the meaning of a loss."""
_FOOT = "Points are rows of metrics.jsonl with seven digits, without smoothing."


class Curve(NamedTuple):
    """A metric by step."""

    steps: np.ndarray
    values: np.ndarray


class RunView(NamedTuple):
    """The contents of a page about one run."""

    name: str
    settings: dict[str, Any]
    """Values of the settings by path."""
    changed: list[str]
    """Paths of the settings that differ from the defaults."""
    curves: dict[tuple[str, str], Curve]
    """Curves by metric and split."""
    seconds: dict[str, float]
    """Seconds by phase of the training."""
    latest: int
    """The last step with a row of metrics."""
    samples: list[tuple[int, str]]
    scores: list[dict[str, Any]]
    """Scores of `transformer evaluate`."""
    notes: list[str]


def render_report(runs: Sequence[RunView]) -> str:
    """The HTML text of a report page."""
    drawn = [key for run in runs for key in run.curves]
    most = max(30, MOST_POINTS // max(1, len(drawn)))
    own = sorted({metric for metric, _ in drawn if metric not in _KNOWN and metric != "epoch"})
    metrics = [(name, *_KNOWN[name]) for name in _KNOWN if any(metric == name for metric, _ in drawn)]
    splits = sorted({split for _, split in drawn}, key=lambda split: (split != "train", split != "validation", split))
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    data = {
        "runs": [_run(run, most) for run in runs],
        "metrics": [*metrics, *((name, name.replace("_", " ").capitalize(), "") for name in own)],
        "splits": splits,
        "paths": list(paths),
        "differing": [path for path in paths if path != "workdir" and _differs(path, runs)],
        "notes": _compared(runs),
    }
    names = " · ".join(run.name for run in runs)
    heading = names if len(runs) <= 3 else f"{runs[0].name} and {len(runs) - 1} other runs"
    return assemble("report", data, kicker="Report", heading=heading, about=_about(runs), foot=_FOOT)


_ABSENT = object()


def _differs(path: str, runs: Sequence[RunView]) -> bool:
    return len({_shown(run.settings.get(path, _ABSENT)) for run in runs}) > 1


def _shown(value: Any) -> str:
    return "–" if value is _ABSENT else value if isinstance(value, str) else json.dumps(value)


def _about(runs: Sequence[RunView]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs, each with its own colour."
    (run,) = runs
    settings = run.settings
    if not settings:
        return f"Step {run.latest:,}."
    kind, layers, width = (settings.get(f) for f in ("objective.kind", "model.num_layers", "model.embed_dim"))
    steps = f"step {run.latest:,} of {_shown(settings.get('training.steps'))}"
    return f"{str(kind).replace('_', ' ')}, {_shown(layers)} layer{'s' * (layers != 1)}, {width} wide; {steps}."


def _compared(runs: Sequence[RunView]) -> list[str]:
    """Notes on numbers that cannot be compared between the runs."""
    kinds = {path: sorted({_shown(run.settings[path]) for run in runs if path in run.settings}) for path in _LOSS}
    differing = [
        f"{path.removesuffix('.kind').rpartition('.')[2]} ({', '.join(kinds[path])})"
        for path in _LOSS
        if len(kinds[path]) > 1
    ]
    if not differing:
        return []
    return [
        f"These runs differ in their {' and '.join(differing)}. A loss is a mean over predicted tokens or classes. Therefore "
        "their losses are not comparable; bits per byte are, for equal texts."
    ]


def _run(run: RunView, most: int) -> dict[str, Any]:
    curves: dict[str, dict[str, list[Any]]] = {}
    rows = 0
    for (metric, split), curve in run.curves.items():
        kept = thinned(curve.values, most)
        rows = max(rows, len(curve.steps) if len(kept) < len(curve.steps) else 0)
        curves.setdefault(metric, {})[split] = [curve.steps[kept].tolist(), [_digits(x) for x in curve.values[kept]]]
    notes, samples = list(run.notes), _some(run.samples)
    strange = sum(int((~np.isfinite(curve.values)).sum()) for curve in run.curves.values())
    if strange:
        notes.append(f"{counted(strange, 'value')} not finite (NaN or infinite): the curves have gaps there.")
    if rows:
        notes.append(f"Of {rows:,} rows, a curve shows the lowest and the highest value of each interval.")
    if len(samples) < len(run.samples):
        notes.append(f"{len(samples)} of {len(run.samples):,} samples are shown.")
    return {
        "name": run.name,
        "latest": run.latest,
        "settings": {path: _shown(value) for path, value in run.settings.items()},
        "changed": run.changed,
        "curves": curves,
        "seconds": {part: round(x, 3) for part, x in run.seconds.items() if x > 0},
        "samples": [(step, text[:MOST_CHARACTERS] + "…" * (len(text) > MOST_CHARACTERS)) for step, text in samples],
        "scores": [_scores(scores) for scores in run.scores[-12:]],
        "notes": notes,
    }


def thinned(values_N: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` values: all, or the ends and the lowest, the highest and a gap of each interval.

    Example:
        >>> values = np.zeros(1000)
        >>> values[500] = 9
        >>> kept = thinned(values, 30)
        >>> len(kept) <= 30, 500 in kept, 0 in kept, 999 in kept
        (True, True, True, True)
    """
    N = len(values_N)
    if most >= N:
        return np.arange(N)
    kept = {0, N - 1}
    edges = np.linspace(0, N, max(1, (most - 2) // 3) + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        finite = start + np.flatnonzero(np.isfinite(values_N[start:end]))
        if len(finite):
            kept |= {int(finite[values_N[finite].argmin()]), int(finite[values_N[finite].argmax()])}
        if len(finite) < end - start:
            kept.add(int(start + np.flatnonzero(~np.isfinite(values_N[start:end]))[0]))
    return np.array(sorted(kept))


def _digits(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _some(samples: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """At most `MOST_SAMPLES` samples at even distances, with the first and the last."""
    if len(samples) <= MOST_SAMPLES:
        return samples
    return [samples[i] for i in np.linspace(0, len(samples) - 1, MOST_SAMPLES).astype(int)]


def _scores(scores: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation; also the confusion matrix, if it is valid."""
    split, step, source = (scores.get(name) for name in ("split", "step", "source"))
    numbers = {name: _number(x) for name, x in scores.items() if _number(x) is not None and name != "step"}
    found: dict[str, Any] = {
        "what": f"{'all' if split == 'all' else f'the {split} split'} of {_listed(source)}, step {_shown(step)}",
        "numbers": numbers,
    }
    names = [str(name) for name in _list(scores.get("classes"))]
    matrix = [_list(row) for row in _list(scores.get("confusion"))]
    if names and all(len(row) == len(names) for row in (matrix, *matrix)):
        found |= {"classes": names[:MOST_CLASSES]}
        counts = np.array([[_number(x) or 0 for x in row] for row in matrix], np.float64)
        wrong = counts * (1 - np.eye(len(names)))
        order = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None, kind="stable")[:20]]
        found["confusions"] = [(names[i], names[j], int(wrong[i, j])) for i, j in order if wrong[i, j] > 0]
        found["confusion"] = counts.astype(int).tolist() if len(names) <= MOST_CLASSES else None
        found["count"] = len(names)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _listed(source: Any) -> str:
    parts: Iterable[Any] = source if isinstance(source, list) else [source]
    return ", ".join(str(part) for part in parts)


def _number(value: Any) -> float | int | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain and abs(value) < 2**53 else None
