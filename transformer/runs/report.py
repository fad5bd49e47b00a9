"""The content of a report page, read from run directories: curves, samples, scores, settings, and times."""

import array
import collections
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from transformer.analysis.report_page import Curve, RunView, render_report
from transformer.config import Config
from transformer.config_io import CONFIG_FILE, leaves, to_dict
from transformer.runs.directory import CHECKPOINTS, METRICS_FILE, SAMPLES_FILE, SCORES_FILE
from transformer.storage import expand, explained
from transformer.training.metrics import PARTS
from transformer.training.writers import SamplesWriter, json_object, jsonl_rows
from transformer.validation import counted, require

_MOST_METRICS = 200
_MOST_TEXT = 50_000_000  # bytes; of a longer samples file, only the end is read


def report_page(workdirs: Sequence[epath.PathLike]) -> str:
    """An HTML report of runs: it needs no network, and its size is bounded regardless of the length of the runs.

    Args:
        workdirs: run directories, including active runs and directories in a bucket.

    Raises:
        UserError: one of them is no run, or is given twice.

    Example:
        `pathlib.Path("report.html").write_text(report_page(["runs/python_stdlib"]))`
    """
    paths = [epath.Path(expand(workdir)) for workdir in workdirs]
    require(len(paths) > 0, "A report needs at least one run, got none.")
    return render_report([_view(path, name) for path, name in zip(paths, _names(paths), strict=True)])


def _names(paths: Sequence[epath.Path]) -> list[str]:
    """The last component of each path; the whole path if others have the same last component."""
    last = collections.Counter(path.name for path in paths)
    names = [path.name if last[path.name] == 1 and path.name else str(path) for path in paths]
    require(len(set(names)) == len(names), f"Each run must be named once, got {', '.join(map(str, paths))}.")
    return names


def _view(workdir: epath.Path, name: str) -> RunView:
    """The content of a run's directory; missing or damaged files are mentioned in notes."""
    with explained(f"{workdir}", "read"):
        return _read(workdir, name)


def _read(workdir: epath.Path, name: str) -> RunView:
    require(workdir.is_dir(), f"A run to report must be a directory, {workdir} is none; give the directory of a run.")
    there = [f for f in (CONFIG_FILE, METRICS_FILE, CHECKPOINTS) if (workdir / f).exists()]
    require(
        len(there) > 0,
        f"A run's directory must hold {CONFIG_FILE}, {METRICS_FILE} or {CHECKPOINTS}, {workdir} has none of them; give the "
        "directory of a run.",
    )
    config, notes = _read_config(workdir)
    rows = _read_metrics(workdir, notes)
    samples = _read_samples(workdir)
    scores = _read_scores(workdir, notes)
    if (workdir / "profile").exists():
        notes.append(f"A trace of some of its steps is in {workdir / 'profile'}.")
    settings = dict(leaves(config))
    default = dict(leaves(json.loads(json.dumps(to_dict(Config())))))
    changed = [path for path, value in settings.items() if path != "workdir" and default.get(path) != value]
    return RunView(name, settings, changed, rows.curves, rows.seconds, rows.latest, samples, scores, notes)


def _read_config(workdir: epath.Path) -> tuple[dict[str, Any], list[str]]:
    """The config as JSON, empty if it cannot be read, and notes."""
    try:
        config = json_object((workdir / CONFIG_FILE).read_bytes())
    except FileNotFoundError:
        return {}, [f"Its {CONFIG_FILE} is missing; its settings are unknown."]
    if config is None:
        return {}, [f"Its {CONFIG_FILE} is damaged; its settings are unknown."]
    return config, []


class _Rows(NamedTuple):
    curves: dict[tuple[str, str], Curve]
    """The columns by (metric, split)."""
    seconds: dict[str, float]
    latest: int


def _read_metrics(workdir: epath.Path, notes: list[str]) -> _Rows:
    """The columns of a metrics file, read line by line, in 16 bytes per number."""
    path = workdir / METRICS_FILE
    columns: dict[tuple[str, str], tuple[array.array, array.array]] = {}
    seconds = dict[str, float]()
    latest, damaged, left_out = 0, list[int](), set[str]()
    timing = {f"{part}_seconds": part for part in PARTS}
    for number, row in jsonl_rows(path) if path.exists() else ():
        if isinstance(row, bytes) or not 0 <= row["step"] < 2**53:
            damaged.append(number)
            continue
        step, split = row["step"], str(row.get("split", ""))
        latest = max(latest, step)
        for name, value in row.items():
            number_of = _number(value)
            if number_of is None or name == "step":
                continue
            if name in timing:
                seconds[timing[name]] = seconds.get(timing[name], 0.0) + (
                    number_of if math.isfinite(number_of) else 0.0
                )
                continue
            if (name, split) not in columns and len(columns) >= _MOST_METRICS:
                left_out.add(name)
                continue
            steps, values = columns.setdefault((name, split), (array.array("q"), array.array("d")))
            steps.append(step)
            values.append(number_of)
    if latest == 0 and not damaged:
        notes.append("It has no rows of metrics yet.")
    if damaged:
        lines = ", ".join(map(str, damaged[:3])) + (", ..." if len(damaged) > 3 else "")
        notes.append(f"Left out: {counted(len(damaged), 'damaged line')} of its {METRICS_FILE} ({lines}).")
    if left_out:
        notes.append(f"It has more metrics than are drawn; left out: {', '.join(sorted(left_out)[:5])} and others.")
    return _Rows({key: _curve(*column) for key, column in columns.items()}, seconds, latest)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _curve(steps: array.array, values: array.array) -> Curve:
    steps_N, values_N = np.asarray(steps, np.int64), np.asarray(values, np.float64)
    if (np.diff(steps_N) < 0).any():
        order_N = np.argsort(steps_N, kind="stable")
        steps_N, values_N = steps_N[order_N], values_N[order_N]
    return Curve(steps_N, values_N)


def _read_samples(workdir: epath.Path) -> list[tuple[int, str]]:
    path = workdir / SAMPLES_FILE
    if not path.exists():
        return []
    content = path.read_bytes()
    begin = content.find(b"\n---- step ", len(content) - _MOST_TEXT) + 1 if len(content) > _MOST_TEXT else 0
    return [(step, text.decode(errors="replace")) for step, text, _ in SamplesWriter.read(content[begin:])]


def _read_scores(workdir: epath.Path, notes: list[str]) -> list[dict[str, Any]]:
    """The recorded results of `transformer evaluate`: the latest for each split of each source."""
    path, found = workdir / SCORES_FILE, dict[str, dict[str, Any]]()
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        scores = json_object(line)
        if scores is None:
            notes.append(f"Line {number} of its {SCORES_FILE} is damaged, and left out.")
            continue
        place = json.dumps([scores.get("source"), scores.get("split")])
        found.pop(place, None)
        found[place] = scores
    return list(found.values())
