"""Rows reach terminal, file and TensorBoard, and those after a checkpoint are taken back."""

import io
import json
import re
import struct
import sys
import types

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from transformer.training import writers
from transformer.training.writers import (
    ConsoleWriter,
    JsonlWriter,
    TensorBoardWriter,
    Writer,
    format_metrics,
    read_jsonl,
)

ODD = {"loss": 0.1 + 0.2, "tiny": 5e-324, "big": 1.7976931348623157e308, "third": 1 / 3}


def write_three(writer):
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": step / 7})
    return writer


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def test_jsonl_reads_back_the_same_floats(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    JsonlWriter(path).write(3, "validation", ODD)
    assert path.read_text().count("\n") == 1
    assert read_jsonl(path) == [{"step": 3, "split": "validation", **ODD}]


def test_jsonl_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_three(JsonlWriter(path))
    JsonlWriter(path).write(4, "train", ODD)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_jsonl_drops_a_line_torn_anywhere(tmp_path, cut):
    """Even one that lacks its newline only; and what is appended then stands on a line of its own."""
    path = tmp_path / "metrics.jsonl"
    write_three(JsonlWriter(path))
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [row["step"] for row in read_jsonl(path)]
    assert kept == [1, 2]
    writer = JsonlWriter(path)
    writer.resume(10)
    writer.write(11, "train", {})
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 11]


def test_jsonl_drops_rows_after_the_step_it_resumes_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = write_three(JsonlWriter(path))
    writer.write(2, "validation", ODD)
    before = path.read_text().splitlines()
    writer.resume(2)
    assert path.read_text().splitlines() == [before[0], before[1], before[3]]
    writer.resume(0)
    assert path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_resume_replaces_the_file_in_one_go(tmp_path, monkeypatch):
    """A death while the rows are dropped loses none of those kept."""
    path = tmp_path / "metrics.jsonl"
    writer = write_three(JsonlWriter(path))
    before = path.read_text()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(writers.epath.Path("/")), "replace", die)
    with pytest.raises(KeyboardInterrupt):
        writer.resume(1)
    assert path.read_text() == before


def test_jsonl_resume_of_a_new_run(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.resume(0)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_jsonl_that_is_none_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"must hold one JSON object with a step a line, line 2 is 'hello'"):
        read_jsonl(tmp_path / "metrics.jsonl")


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def events(directory):
    """Every event of every file, in order of time: TensorBoard's records are length, checksum, bytes, checksum."""
    found = []
    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_tensorboard_scalars(tmp_path):
    writer = write_three(TensorBoardWriter(tmp_path))
    writer.write(3, "validation", {"loss": 0.5})
    writer.close()
    scalars = [(e.step, v.tag, round(v.simple_value, 4)) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [
        (1, "train/loss", 0.1429),
        (2, "train/loss", 0.2857),
        (3, "train/loss", 0.4286),
        (3, "validation/loss", 0.5),
    ]


def test_tensorboard_purges_what_is_written_again(tmp_path):
    write_three(TensorBoardWriter(tmp_path)).close()
    writer = TensorBoardWriter(tmp_path)
    writer.resume(1)
    writer.write(2, "train", {"loss": 0.0})
    writer.close()
    started = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert started == [2], "TensorBoard drops earlier events from this step on"


def test_tensorboard_writes_nothing_before_the_first_row(tmp_path):
    TensorBoardWriter(tmp_path / "tensorboard").close()
    assert list(tmp_path.iterdir()) == []


# ---- Console ---------------------------------------------------------------------------------------------------------


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False)


ROW = {
    "loss": 1.23456,
    "bits_per_byte": 1.7811,
    "accuracy": 0.6543,
    "tokens_per_second": 12345.6,
    "mfu": 0.4321,
    "learning_rate": 3e-4,
    "grad_norm": 0.98,
}


def test_format_is_what_a_person_follows():
    text = "loss 1.2346  bpb 1.7811  acc 0.654  tok/s 12,346  mfu 43.2%  lr 3.00e-04  grad 0.98"
    assert format_metrics(ROW) == text
    assert format_metrics({"grad_norm": 1.0, "bleu": 2.0, "loss": 0.0}) == "loss 0.0000  grad 1.00"


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
    out = console(False)
    writer = ConsoleWriter(500, out)
    writer.resume(0)
    writer.write(10, "train", ROW)
    now[0] += 20.0
    writer.write(20, "train", ROW)
    writer.write(20, "validation", {"loss": 1.0})
    now[0] += 960.0
    writer.write(500, "train", ROW)
    writer.close()
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == f"step  10/500  train       {format_metrics(ROW)}"
    assert lines[1].endswith("eta 960 s")  # 480 steps at 2 s
    assert lines[2] == "step  20/500  validation  loss 1.0000"
    assert "eta" not in lines[3]


def test_long_lines_are_not_broken():
    out = Console(file=io.StringIO(), force_terminal=False, width=20, highlight=False)
    ConsoleWriter(500, out).write(10, "train", ROW)
    assert out.file.getvalue().count("\n") == 1


def drawn(width, environment=None, step=250):
    """What a terminal of so many columns shows in the end, a line a string."""
    out = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, _environ=environment or {})
    writer = ConsoleWriter(500, out)
    writer.resume(100)
    writer.write(step - 50, "train", ROW)
    writer.write(step, "train", ROW)
    writer.write(step, "validation", ROW)
    writer.close()
    text = out.file.getvalue()
    # Each drawing begins by erasing the one before: "erase, carriage return".
    assert text.startswith("\r\x1b[J") and text.endswith("\n")
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", part) for part in text.split("\r\x1b[J")]
    return text, [line for part in shown for line in part.split("\r")[0].splitlines()]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 160])
def test_a_line_on_a_terminal_keeps_step_and_time_left(width, monkeypatch):
    now = iter([0.0, 60.0])
    monkeypatch.setattr(writers.time, "monotonic", lambda: next(now))
    _, lines = drawn(width)
    assert all(len(line) <= width for line in lines)
    last = lines[-1]
    if width >= 40:
        assert last.startswith("step 250/500  loss 1.2346") and last.endswith("  5:00 left")
    assert {60: "bpb 1.7811", 80: "acc 0.654", 100: "mfu 43.2%", 160: "grad 0.98"}.get(width, "step") in last
    assert ("━" in last) == (width == 160)
    assert any(line.startswith("step 250/500  validation"[: width - 1]) for line in lines)


def test_no_colour_where_none_is_wanted(monkeypatch):
    now = iter([0.0, 60.0] * 2)
    monkeypatch.setattr(writers.time, "monotonic", lambda: next(now))
    assert "\x1b[32m" in drawn(160)[0]
    text, lines = drawn(160, {"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*m", text)
    assert "━──" in lines[-1]  # the bar is read without colours too


def test_a_terminal_that_cannot_go_back_gets_lines():
    out = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "dumb"})
    ConsoleWriter(500, out).write(10, "train", ROW)
    assert out.file.getvalue().startswith("step  10/500  train       loss 1.2346")
    assert "\x1b" not in out.file.getvalue()


def test_a_notebook_has_one_output_that_is_updated(monkeypatch):
    shown = []

    class Cell:
        def update(self, content, raw):
            shown.append(("update", content["text/plain"]))

    def display(content, raw, display_id):
        shown.append(("display", content["text/plain"]))
        return Cell()

    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(sys.modules["IPython"], "display", sys.modules["IPython.display"], raising=False)
    out = Console(file=io.StringIO(), force_jupyter=True, width=80)
    writer = ConsoleWriter(500, out)
    for step in (10, 20, 30):
        writer.write(step, "train", ROW)
    writer.close()
    assert [kind for kind, _ in shown] == ["display", "update", "update"]
    assert shown[-1][1].startswith("step  30/500  loss 1.2346")


# ---- Contract of every writer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsonl", "tensorboard", "console", "terminal"])
def test_every_writer_takes_any_metrics_and_closes_twice(tmp_path, name):
    writer = {
        "jsonl": lambda: JsonlWriter(tmp_path / "metrics.jsonl"),
        "tensorboard": lambda: TensorBoardWriter(tmp_path),
        "console": lambda: ConsoleWriter(10, console(False)),
        "terminal": lambda: ConsoleWriter(10, console(True)),
    }[name]()
    assert isinstance(writer, Writer)
    writer.resume(3)
    writer.write(4, "train", {})
    writer.write(4, "test", ODD)
    writer.close()
    writer.close()


def test_rows_are_json_even_where_a_metric_is_an_int(tmp_path):
    JsonlWriter(tmp_path / "m").write(1, "test", {"tokens": 5})
    assert json.loads((tmp_path / "m").read_text())["tokens"] == 5
