"""Faults of a run, each tried through the command line; prints one JSON line, and a line for each fault on standard error.

    python benchmarks/faults.py [--directory /tmp/transformer-faults] [--only damage signals disk ...]

`damage`: each file of a run's directory is removed, cut in half, given a flipped bit, and replaced by the file of another run,
one at a time. Then `evaluate`, `generate` and `train` must give the result of the undamaged directory (from the newest
checkpoint or the previous one), or refuse with a short error. A complete checkpoint is replaced too.

The other faults affect processes: signals, kills in the first start, two starts, a removed or moved directory, incomplete
copies, looping symbolic links, NaN, and too little memory. A clock that goes back needs a C compiler. A full or read-only disk
needs root, for file systems in memory. If a run continues, its outcome must equal an undisturbed run's to the bit. Every trial
is recorded in DIRECTORY/trials.jsonl, from which a stopped benchmark continues.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from transformer.cli.main import main as command_line
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.characters import Characters
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizers.adamw import AdamW
from transformer.runs.compare import compare, read_outcome
from transformer.schedules.constant import ConstantSchedule

TRIALS = "trials.jsonl"
SHORT, LONG = 8, 400
DAMAGES = ("removed", "cut in half", "a bit flipped", "swapped with another run's")
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  static time_t first;
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int status = real(id, t);
  struct timespec m;
  real(CLOCK_MONOTONIC, &m);
  if (!first) first = m.tv_sec;
  if (id == CLOCK_REALTIME && m.tv_sec - first > 4) t->tv_sec -= 86400L * (m.tv_sec - first);
  return status;
}
"""


def get_config(variant: str = "short") -> Config:
    """The run; this file is its config file. Its tokenizer is made from the text."""
    long = variant == "long"
    return Config(
        model=ModelConfig(
            num_layers=1, embed_dim=16, dropout=0.1, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)
        ),
        data=DataConfig(
            source=("text",), data_dir="prepared", tokenizer=Characters(), sequence_length=32, batch_size=8
        ),
        optimizer=AdamW(schedule=ConstantSchedule()),
        training=TrainingConfig(
            steps=LONG if long else SHORT,
            log_every=5 if long else 2,
            eval_every=100 if long else 2,
            checkpoint_every=20 if long else 2,
            sample_length=4,
        ),
    )


class Ended(NamedTuple):
    """The end of a command."""

    status: int
    out: str
    err: str

    @property
    def refused(self) -> bool:
        """In a short error of the user's."""
        return self.status == 2 and "error: " in self.err and "Traceback" not in self.out + self.err

    @property
    def last(self) -> str:
        """The error, or the last line."""
        lines = (self.err.strip() or self.out.strip() or "-").splitlines()
        found = [line for line in lines if "error: " in line] or lines[-1:]
        return f"status {self.status}: {found[0][:300]}"


def here(*arguments: str) -> Ended:
    """Run a command in this process, with its compiled programs."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line(list(arguments))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            status = 1
            traceback.print_exc()
    return Ended(status, out.getvalue(), err.getvalue())


class Process:
    """A command in a process of its own."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None, limit: int = 0) -> None:
        self.begin = time.monotonic()
        root = pathlib.Path(__file__).parents[1]
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "transformer", *arguments],
            env=os.environ | {"PYTHONPATH": path} | (environment or {}),
            stdout=self._files[0],
            stderr=self._files[1],
        )
        if limit:
            resource.prlimit(self.process.pid, resource.RLIMIT_AS, (limit, limit))

    def when(self, condition: Callable[[], bool]) -> "Process":
        """Returns when the condition holds, or the process has ended."""
        while self.process.poll() is None and not condition():
            time.sleep(0.01)
        return self

    def send(self, number: int) -> "Process":
        """A signal."""
        self.process.send_signal(number)
        return self

    def end(self, timeout: float = 300) -> Ended:
        """Wait for it."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait() - 1000  # it hung
        out, err = ((file.seek(0), file.read())[1] for file in self._files)
        return Ended(status, out, err)


class Bench:
    """A directory with data, an undisturbed run of each variant, a run at step 6 of 8, and the notes of what was tried."""

    def __init__(self, directory: pathlib.Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        os.chdir(directory)
        os.environ |= {
            "COLUMNS": "1000",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_platforms", "cpu")
        self.directory = directory
        self.trials = [json.loads(line) for line in _lines(directory / TRIALS)]
        if not (directory / "ready").exists():
            for name, alphabet in (("text", "abcdef"), ("other_text", "defghijkl")):
                chance = random.Random(name)
                pathlib.Path(name).mkdir(exist_ok=True)
                for index in range(30):
                    words = ("".join(chance.choices(alphabet, k=4)) for _ in range(60))
                    pathlib.Path(name, f"{index}.txt").write_text(" ".join(words))
            other = ("--data.source", "other_text", "--training.seed", "1")
            for options in (
                train("whole", "short"),
                train("long", "long"),
                (*train("six", "short"), "--training.steps", "6"),
                (*train("other", "short"), "--training.steps", "6", *other),
                (*train("four", "short"), "--training.steps", "4"),
            ):
                ended = here(*options)
                assert ended.status == 0, ended.err
            (directory / "ready").touch()

    def note(self, fault: str, ended: str, *, ok: bool, **more: Any) -> None:
        """One trial, once."""
        self.trials.append({"fault": fault, "ended": ended, "ok": ok, **more})
        with (self.directory / TRIALS).open("a") as file:
            file.write(json.dumps(self.trials[-1]) + "\n")
        print(f"{'ok  ' if ok else 'FAIL'}  {fault}: {ended}", file=sys.stderr, flush=True)

    def tried(self, fault: str) -> bool:
        """Whether a trial is recorded."""
        return any(trial["fault"] == fault for trial in self.trials)


def train(workdir: str, variant: str = "long") -> tuple[str, ...]:
    """The arguments of a run."""
    return ("train", f"{pathlib.Path(__file__).absolute()}:{variant}", "--workdir", workdir)


def equal(workdir: str | pathlib.Path, reference: str, *, rows: bool = True) -> bool:
    """Whether a run ended as the reference did, to the bit."""
    difference = compare(read_outcome(workdir), read_outcome(reference))
    return difference.bits == 0 and (difference.rows == 0 or not rows)


def fresh(name: str, source: str = "") -> pathlib.Path:
    """A path below the directory with nothing there, or a copy of a run."""
    path = pathlib.Path(name)
    shutil.rmtree(path, ignore_errors=True)
    if source:
        shutil.copytree(source, path)
    return path


def goes_on(workdir: str, reference: str = "long") -> tuple[str, bool]:
    """Run the same command again; whether its outcome equals the reference."""
    variant = "long" if reference == "long" else "short"
    ended = Process(*train(workdir, variant)).end()
    if ended.status:
        return f"the same command: {ended.last}", False
    same = equal(workdir, reference)
    return f"the same command goes on, and ends {'equal to the bit' if same else 'DIFFERENT'}", same


# ---- Damaged and swapped files ---------------------------------------------------------------------------------------


def damage_file(path: pathlib.Path, how: str, other: pathlib.Path | None) -> None:
    """Damage one file."""
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "cut in half":
        path.write_bytes(data[: len(data) // 2])
    elif how == "a bit flipped" and data:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif other is not None:
        shutil.copyfile(other, path)


def counterpart(path: pathlib.Path, source: str, target: str) -> pathlib.Path | None:
    """The file of another run that has the same role: names that are random go by their order."""
    there = pathlib.Path(target, *path.parts[1:])
    if there.exists():
        return there
    siblings = sorted(there.parent.iterdir()) if there.parent.exists() else []
    mine = sorted(pathlib.Path(source, *path.parts[1:]).parent.iterdir())
    index = mine.index(pathlib.Path(source, *path.parts[1:]))
    return siblings[index] if index < len(siblings) and siblings[index].is_file() else None


def try_damage(
    bench: Bench, fault: str, damage: Callable[[pathlib.Path], None], expected: dict[int, list[str]]
) -> None:
    """Damage a copy of the run at step 6, and record the result of each command."""
    if bench.tried(fault):
        return
    work = fresh("work", "six")
    damage(work)
    found = []
    for name, ended in zip(("evaluate", "generate"), look("work"), strict=True):
        right = [step for step, answers in expected.items() if ended.status == 0 and ended.out in answers]
        found.append(f"{name} " + (f"right (step {right[0]})" if right else verdict(ended)))
    ended = here(*train("work", "short"))
    if ended.status == 0 and read_outcome("work").step == SHORT and equal("work", "whole", rows=False):
        found.append("train right" + ("" if equal("work", "whole") else ", rows differ"))
    else:
        found.append(f"train {verdict(ended)}")
    # Metric rows have no checksum: their damage is reported, and must not fail with another file.
    bad = ("WRONG", "CRASH") if fault.startswith("metrics.jsonl") else ("WRONG", "CRASH", "rows differ")
    ok = not any(word in text for text in found for word in bad)
    bench.note(fault, "; ".join(found), ok=ok, kind="damage")


def look(workdir: str) -> list[Ended]:
    """Scores and a continuation of a run."""
    scores = here("evaluate", workdir)
    if scores.status == 0:
        kept = {k: v for k, v in json.loads(scores.out).items() if k != "workdir"}
        scores = scores._replace(out=json.dumps(kept))
    return [scores, here("generate", workdir, "--prompt", "abc", "--temperature", "0", "--max-new-tokens", "8")]


def verdict(ended: Ended) -> str:
    """Of a command that did not give what it should."""
    if ended.refused:
        return f"refused ({' '.join(ended.err.split())[7:160]})"
    if ended.status == 0:
        return f"WRONG ({ended.out[-160:]!r})"
    return f"CRASH (status {ended.status}: {ended.err.strip()[-200:]!r})"


def damage(bench: Bench) -> None:
    """Every file in turn, and whole checkpoints."""
    expected: dict[int, list[str]] = {}
    for step, run in ((6, "six"), (4, "four")):
        expected[step] = [ended.out for ended in look(run)]
    files = sorted(path for path in pathlib.Path("six").rglob("*") if path.is_file())
    for number, path in enumerate(files):
        relative = path.relative_to("six")
        # Files of the older checkpoint matter only for other checkpoints: one kind of damage each.
        older = relative.parts[:2] == ("checkpoints", "4")
        for how in (DAMAGES[number % 4],) if older else DAMAGES:
            other = counterpart(path, "six", "other")

            def act(work: pathlib.Path, how: str = how, relative: pathlib.Path = relative, other: Any = other) -> None:
                damage_file(work / relative, how, other)

            try_damage(bench, f"{relative} {how}", act, expected)
    # A checkpoint holds all of a run: one of another run is that run's, which `train` refuses and `generate` continues with.
    own = {0: [ended.out for ended in look("other")], **expected}
    for name in ("checkpoints/6", "tensorboard"):

        def remove(work: pathlib.Path, name: str = name) -> None:
            shutil.rmtree(work / name)

        def swap(work: pathlib.Path, name: str = name) -> None:
            shutil.rmtree(work / name)
            shutil.copytree(pathlib.Path("other", name), work / name)

        try_damage(bench, f"{name}/ swapped with another run's", swap, own)
        try_damage(bench, f"{name}/ removed", remove, expected)


# ---- Signals, kills, starts ------------------------------------------------------------------------------------------


def rows_of(name: str) -> Callable[[], bool]:
    """Whether a run has begun to write rows."""
    return lambda: pathlib.Path(name, "metrics.jsonl").exists()


def signals(bench: Bench) -> None:
    """SIGINT and SIGTERM."""
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        name = fresh(f"signal-{number}").name
        ended = Process(*train(name)).when(rows_of(name)).send(number).end()
        text, same = goes_on(name)
        bench.note(
            f"{number.name} in training",
            f"{ended.last}; {text}",
            ok=ended.status == status and same and not tracebacks(ended),
        )


def tracebacks(*ended: Ended) -> bool:
    """Whether one of them printed a traceback, or hung."""
    return any("Traceback" in one.out + one.err or one.status < -900 for one in ended)


def first_start(bench: Bench) -> None:
    """Kills at even distances in the first start, in one directory after the other."""
    same = []
    for index in range(6):
        name = fresh(f"first-{index}").name
        process = Process(*train(name, "short"))
        while process.process.poll() is None and time.monotonic() - process.begin < 1.5 * (index + 1):
            time.sleep(0.01)
        process.send(signal.SIGKILL).end()
        same.append(goes_on(name, "whole"))
    failed = [text for text, good in same if not good]
    bench.note("six SIGKILLs in the first start", failed[0] if failed else same[0][0], ok=not failed)


def two_starts(bench: Bench) -> None:
    """A second start while the first trains."""
    name = fresh("two").name
    first = Process(*train(name)).when(rows_of(name))
    second = Process(*train(name)).end()
    done = first.end()
    same = done.status == 0 and equal(name, "long")
    text = f"the second: {second.last}; the first {'ends equal to the bit' if same else done.last}"
    bench.note("two starts in one directory", text, ok=second.refused and same and not tracebacks(done))


def directories(bench: Bench) -> None:
    """Removed, moved and partial directories, and links that loop."""
    name = fresh("gone").name
    process = Process(*train(name), "--training.steps", "100000").when(
        lambda: pathlib.Path(name, "checkpoints", "20").exists()
    )
    fresh("removed")
    pathlib.Path(name).rename("removed")  # at once, as no file is written between
    shutil.rmtree("removed", ignore_errors=True)
    ended = process.end()
    bench.note("the directory removed in training", ended.last, ok=ended.refused)

    fresh("moved-before", "six")
    target = fresh("elsewhere")
    target.mkdir()
    shutil.move("moved-before", "elsewhere/moved")
    text, same = goes_on("elsewhere/moved", "whole")
    bench.note("the directory moved and renamed", text, ok=same)

    path = fresh("partial", "six")
    for manifest in path.rglob("MANIFEST*"):
        manifest.unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    ended = Process(*train("partial", "short")).end()
    kept = all(file.exists() and file.read_bytes() == data for file, data in before.items())
    bench.note(
        "a copy without the manifests",
        f"{ended.last}; {'nothing' if kept else 'SOMETHING'} removed",
        ok=ended.refused and kept,
    )

    path = fresh("loop", "six")
    for link in ("a", "b"):
        (path / "checkpoints" / "6" / link).symlink_to(".")
    commands = (train("loop", "short"), ("evaluate", "loop"))
    results = [Process(*arguments).end(60) for arguments in commands]
    bench.note(
        "links in a checkpoint that loop",
        "; ".join(f"{arguments[0]} {ended.last}" for arguments, ended in zip(commands, results, strict=True)),
        ok=not tracebacks(*results) and all(ended.status == 0 or ended.refused for ended in results),
    )
    path = fresh("looped_text", "text")
    for link in ("a", "b"):
        (path / link).symlink_to(".")
    ended = Process(*train(fresh("loop-text").name, "short"), "--data.source", "looped_text").end(60)
    bench.note("links in a folder of text that loop", ended.last, ok=ended.status in (0, 2) and not tracebacks(ended))


def numbers(bench: Bench) -> None:
    """Divergence, and too little memory."""
    ended = Process(*train(fresh("nan").name), "--optimizer.learning-rate", "1e30").end()
    bench.note("a learning rate of 1e30 (NaN)", ended.last, ok=ended.refused)
    for gigabytes in (1, 2, 3, 4, 6):
        name = fresh("memory").name
        ended = Process(*train(name), limit=gigabytes << 30).end(120)
        good = ended.status == 0 or ended.refused
        bench.note(f"ulimit -v of {gigabytes} GiB", ended.last, ok=good)
    big = ("--model.embed-dim", "32768", "--model.num-layers", "64")
    ended = Process(*train(fresh("big").name), *big).end(120)
    bench.note("a model of 824 billion parameters", ended.last, ok=ended.refused)


def clock(bench: Bench) -> None:
    """The time of day goes back by a day each second, from the fifth second on."""
    if shutil.which("cc") is None:
        return
    pathlib.Path("clock.c").write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "clock.so", "clock.c", "-ldl"], check=True)
    name = fresh("clock").name
    environment = {"LD_PRELOAD": str(pathlib.Path("clock.so").absolute())}
    ended = (
        Process(*train(name), environment=environment)
        .when(lambda: pathlib.Path(name, "checkpoints", "200").exists())
        .send(signal.SIGKILL)
        .end()
    )
    again = Process(*train(name), environment=environment).end()
    same = again.status == 0 and equal(name, "long")
    text = f"killed ({ended.status}), then {again.last}; {'equal to the bit' if same else 'DIFFERENT'}"
    bench.note("a clock that goes back", text, ok=same)


# ---- Disks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(kilobytes: int) -> Iterator[pathlib.Path]:
    """A file system in memory."""
    path = pathlib.Path("disk")
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def disk(bench: Bench) -> None:
    """A disk that is full after so many kilobytes, from the first file on; read-only; both in training."""
    if os.geteuid() != 0:
        return
    for kilobytes in (4, 16, 64, 128, 256, 512):
        with small_disk(kilobytes):
            ended = Process(*train("disk/run")).end()
            subprocess.run(["mount", "-o", "remount,size=64m", "disk"], check=True)
            text, same = goes_on("disk/run")
            fault = f"a disk of {kilobytes} kB, then larger"
            bench.note(fault, f"{ended.last}; {text}", ok=ended.refused and same, printed=ended.err[-3000:])
    for moment in ("at the start", "in training"):
        with small_disk(65536):
            if moment == "at the start":
                subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
            process = Process(*train("disk/run"))
            if moment == "in training":
                process.when(lambda: pathlib.Path("disk/run/checkpoints/20").exists())
                fill = ["dd", "if=/dev/zero", "of=disk/fill", "bs=64k"]
                subprocess.run(fill, check=False, stderr=subprocess.DEVNULL)
            ended = process.end()
            if moment == "at the start":
                subprocess.run(["mount", "-o", "remount,rw", "disk"], check=True)
            else:
                pathlib.Path("disk/fill").unlink()
            text, same = goes_on("disk/run")
            what = "read-only at the start" if moment == "at the start" else "filled by another in training"
            bench.note(
                f"a disk {what}, then good",
                f"{ended.last}; {text}",
                ok=ended.refused and same,
                printed=ended.err[-3000:],
            )


GROUPS = {
    "signals": signals,
    "first_start": first_start,
    "two_starts": two_starts,
    "directories": directories,
    "numbers": numbers,
    "clock": clock,
    "disk": disk,
    "damage": damage,
}


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Try everything that was not tried, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = pathlib.Path(tempfile.gettempdir()) / "transformer-faults"
    parser.add_argument("--directory", type=pathlib.Path, default=default, help="of the runs")
    parser.add_argument("--only", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS), help="groups of accidents")
    options = parser.parse_args()
    bench = Bench(options.directory.absolute())
    for name in options.only:
        if not bench.tried(name):
            GROUPS[name](bench)
            bench.note(name, "all tried", ok=True, kind="group")
    damaged = [trial for trial in bench.trials if trial.get("kind") == "damage"]
    others = [trial for trial in bench.trials if "kind" not in trial]
    print(
        json.dumps(
            {
                "benchmark": "faults",
                "jax": jax.__version__,
                "faults": len(others),
                "damaged_files": len(damaged),
                "failures": [(trial["fault"], trial["ended"]) for trial in bench.trials if not trial["ok"]],
                "damage": collections.Counter(
                    command + (" right" if f"{command} right" in trial["ended"] else " refused")
                    for trial in damaged
                    for command in ("evaluate", "generate", "train")
                    if trial["ok"]
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
