"""Recovery from every state in which a kill can leave a run's directory, to the bits of an undisturbed run.

    python benchmarks/crash_states.py decoder classifier vocabulary [--every 1] [--kills 4] [--directory DIR]

A tiny run is recorded once at system-call level (strace). Its file operations are replayed on a model of the directory, whose
final state must equal the real one. The states after each operation, and in the middle of each write, are the states that a
kill can leave. Each distinct state is written to disk, and the run is started in it, in this process with its compiled
programs. `--kills` adds real SIGKILLs of each run. Prints one JSON line for each run.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
from rich.console import Console

from transformer.cli.main import main as transformer
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.config_io import to_dict
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import Bytes
from transformer.data.tokenizers.words import Words
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.objectives.next_token import NextToken
from transformer.optimizers.adamw import AdamW
from transformer.runs import recipe
from transformer.runs.compare import compare, read_outcome
from transformer.runs.train import train
from transformer.schedules.cosine import CosineSchedule

CALLS = (
    "openat,open,creat,close,write,pwrite64,writev,pwritev,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "ftruncate,truncate,dup,dup2,dup3,lseek,link,linkat,symlink,symlinkat,copy_file_range,sendfile,fallocate"
)
KINDS = ("decoder", "classifier", "vocabulary")
CONSOLE = Console(quiet=True)


# ---- The runs --------------------------------------------------------------------------------------------------------


def prepare(root: pathlib.Path) -> None:
    """Texts, labelled ones too."""
    words = random.Random(0)
    (root / "text").mkdir(parents=True)
    with (root / "labelled.jsonl").open("w") as labelled:
        for index in range(60):
            text = " ".join(words.choice(("to", "be", "or", "not", "that", "question")) for _ in range(40))
            (root / "text" / f"{index}.txt").write_text(text)
            labelled.write(json.dumps({"text": text[:30], "label": ("no", "yes")[index % 2]}) + "\n")
    source = str(root / "labelled.jsonl")
    transformer(["prepare", source, "--kind", "labelled", "--name", "mine", "--data-dir", str(root / "data")])


def make_config(root: pathlib.Path, kind: str, workdir: pathlib.Path) -> Config:
    """A run of a second, with all that writes files: rows, evaluations, samples, checkpoints that are removed again."""
    classifies = kind == "classifier"
    return Config(
        model=ModelConfig(
            num_layers=1,
            embed_dim=8,
            pattern=(BlockConfig(AttentionConfig(num_heads=1)),),
        ),
        data=DataConfig(
            source=("mine",) if classifies else (str(root / "text"),),
            data_dir=str(root / "data"),
            tokenizer={"decoder": Bytes(), "classifier": Words(size=260), "vocabulary": BytePairs(size=260)}[kind],
            sequence_length=16,
            batch_size=8,
            **({} if classifies else {"record_bytes": 512}),
        ),
        objective=(Classification if classifies else NextToken)(),
        optimizer=AdamW(schedule=CosineSchedule(warmup_steps=1)),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(
            steps=6,
            log_every=1,
            eval_every=3,
            checkpoint_every=2,
            keep_checkpoints=1,
            **({} if classifies else {"sample_every": 3, "sample_length": 4}),
        ),
        workdir=str(workdir),
    )


def keep_compiled() -> None:
    """Have the runs of this process share their compiled steps."""
    make, kept = recipe.Steps, {}

    def make_once(config, tokenizer, *rest, **named):
        key = json.dumps(to_dict(dataclasses.replace(config, workdir=""))) + str((rest, sorted(named)))
        if key not in kept:
            kept[key] = make(config, tokenizer, *rest, **named)
        steps = copy.copy(kept[key])
        steps.parts = dataclasses.replace(steps.parts, config=config)
        return steps

    recipe.Steps = make_once


# ---- The record of system calls --------------------------------------------------------------------------------------


def record(root: pathlib.Path, kind: str, workdir: pathlib.Path, *, wrapper: list[str]) -> subprocess.Popen:
    """The run, started in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, "--directory", str(root), "--workdir", str(workdir)]
    return subprocess.Popen([*wrapper, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def system_calls(log: pathlib.Path):
    """(name, arguments, result) of each that ended well, in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in log.read_text(errors="replace").splitlines():
        process, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[process] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", text):
            text = begun.pop(process) + resumed[1]
        if call := re.match(r"(\w+)\((.*)\)\s+= (\d+)", text):
            yield call[1], call[2], int(call[3])


def unquote(text: str) -> list[bytes]:
    """The strings of a call's arguments, which strace writes as `"\\x61\\x62"`."""
    return [bytes.fromhex(found.replace("\\x", "")) for found in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', text)]


class Disk:
    """The files below a directory, as far as system calls tell."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = str(root)
        self.files: dict[str, bytearray | None] = {}  # None is a folder
        self.open: dict[int, list] = {}  # descriptor -> [content, position, appends]

    def paths(self, arguments: str) -> list[str]:
        """Absolute paths among the arguments, those below a folder's descriptor included."""
        found = []
        for folder, name in re.findall(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:\\x[0-9a-f]{2})*)"', arguments):
            path = os.fsdecode(bytes.fromhex(name.replace("\\x", "")))
            folder = os.fsdecode(bytes.fromhex(folder.replace("\\x", ""))) if "\\x" in folder else folder
            found.append(os.path.normpath(os.path.join(folder, path)))
        return found

    def inside(self, path: str) -> bool:
        """Whether it is the directory or below it."""
        return path == self.root or path.startswith(self.root + "/")

    def apply(self, name: str, arguments: str, result: int):
        """Make the change of a call; yields when the directory has changed, in the middle of a write too."""
        if name in ("open", "openat", "creat"):
            (path,) = self.paths(arguments)
            self.open.pop(result, None)
            if not self.inside(path) or "O_DIRECTORY" in arguments:
                return
            changed = "O_CREAT" in arguments and path not in self.files
            changed = changed or ("O_TRUNC" in arguments and bool(self.files.get(path)))
            content = self.files.get(path)
            if content is None:
                if "O_CREAT" not in arguments:
                    return
                content = self.files[path] = bytearray()
            if "O_TRUNC" in arguments:
                content.clear()
            self.open[result] = [content, 0, "O_APPEND" in arguments]
            if changed:
                yield
        elif name == "close":
            self.open.pop(int(arguments.partition("<")[0]), None)
        elif name in ("write", "pwrite64", "writev", "ftruncate", "lseek", "dup", "dup2", "dup3"):
            file = self.open.get(int(re.match(r"\d+", arguments)[0]))
            if file is None:
                return
            content, position, appends = file
            if name.startswith("dup"):
                self.open[result] = file
            elif name == "lseek":
                file[1] = result
            elif name == "ftruncate":
                size = int(arguments.rpartition(", ")[2])
                content[size:] = bytes(max(0, size - len(content)))
                yield
            else:
                data = b"".join(unquote(arguments))[:result]
                at = int(arguments.rpartition(", ")[2]) if name == "pwrite64" else len(content) if appends else position
                content.extend(bytes(max(0, at - len(content))))
                if len(data) > 1:
                    half = len(data) // 2
                    content[at : at + half] = data[:half]
                    yield
                content[at : at + len(data)] = data
                if name != "pwrite64":
                    file[1] = at + len(data)
                yield
        elif name.startswith("mkdir"):
            (path,) = self.paths(arguments)
            if self.inside(path):
                self.files[path] = None
                yield
        elif name in ("unlink", "unlinkat", "rmdir"):
            (path,) = self.paths(arguments)
            if self.files.pop(path, 0) != 0:
                yield
        elif name.startswith("rename"):
            old, new = self.paths(arguments)
            moved = {path: c for path, c in self.files.items() if path == old or path.startswith(old + "/")}
            for path in moved:
                del self.files[path]
            self.files |= {new + path.removeprefix(old): content for path, content in moved.items()}
            if moved:
                yield
        elif any(self.inside(path) for path in self.paths(arguments)):
            raise NotImplementedError(f"{name}({arguments[:200]})")

    def state(self) -> dict[str, bytes | None]:
        """Path from the root -> content, None for a folder."""
        return {
            p[len(self.root) + 1 :]: None if c is None else bytes(c) for p, c in self.files.items() if p != self.root
        }


def states(log: pathlib.Path, workdir: pathlib.Path) -> list[dict[str, bytes | None]]:
    """The distinct states of a run's directory, in order."""
    disk, seen, found = Disk(workdir), set(), []
    for call in system_calls(log):
        for _ in disk.apply(*call):
            state = disk.state()
            key = hashlib.sha256(repr(sorted(state.items())).encode()).digest()
            if key not in seen:
                seen.add(key)
                found.append(state)
    there = {str(p.relative_to(workdir)): p.read_bytes() if p.is_file() else None for p in workdir.rglob("*")}
    if disk.state() != there:
        wrong = sorted(n for n in disk.state().keys() | there.keys() if disk.state().get(n, 0) != there.get(n, 0))
        raise RuntimeError(f"The record of system calls is not whole: it differs from the directory in {wrong[:5]}.")
    return found


# ---- Recovery --------------------------------------------------------------------------------------------------------


def same(workdir: pathlib.Path, reference: pathlib.Path) -> str:
    """What differs from the reference; nothing if the runs are equal to the bit, and nothing is left over."""
    difference = compare(read_outcome(workdir), read_outcome(reference))
    names = [
        sorted(str(p.relative_to(w)) for d in (".", "checkpoints") for p in (w / d).iterdir())
        for w in (workdir, reference)
    ]
    text = [(w / "samples.txt").read_bytes() if (w / "samples.txt").exists() else b"" for w in (workdir, reference)]
    problems = [f"{difference.bits} bits"] if difference.bits else []
    problems += [f"{difference.rows} rows"] if difference.rows else []
    problems += ["samples"] if text[0] != text[1] else []
    problems += [f"files {set(names[0]) ^ set(names[1])}"] if names[0] != names[1] else []
    return ", ".join(problems)


def recover(root: pathlib.Path, kind: str, workdir: pathlib.Path, reference: pathlib.Path) -> str:
    """Start the run in a directory; what went wrong, nothing if it ended as the reference did."""
    try:
        train(make_config(root, kind, workdir), console=CONSOLE)
        return same(workdir, reference)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def try_kind(root: pathlib.Path, kind: str, every: int, kills: int) -> dict:
    """All states of one run, and some real kills."""
    start = time.monotonic()
    log, recorded = root / f"{kind}.strace", root / f"{kind}-recorded"
    wrapper = ["strace", "-f", "-y", "-xx", "-s", str(1 << 24), "-e", f"trace={CALLS}", "-o", str(log)]
    if record(root, kind, recorded, wrapper=wrapper).wait() != 0:
        raise RuntimeError(f"The recorded run of {kind} failed.")
    found, failed = states(log, recorded), []
    log.unlink()
    chosen = found[::every]
    for index, state in enumerate(chosen):
        workdir = root / f"{kind}-state-{index}"
        workdir.mkdir()
        for name, content in sorted(state.items()):
            (workdir / name).mkdir() if content is None else (workdir / name).write_bytes(content)
        if problem := recover(root, kind, workdir, recorded):
            failed.append(f"state {index * every}: {problem}")
            print(f"{kind} {failed[-1]}; last {list(state)[-1:]}", file=sys.stderr, flush=True)
        shutil.rmtree(workdir)
    killed = 0
    chance = random.Random(0)
    for index in range(kills):
        workdir = root / f"{kind}-killed-{index}"
        process = record(root, kind, workdir, wrapper=[])
        while process.poll() is None and not workdir.exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 6))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if problem := recover(root, kind, workdir, recorded):
            failed.append(f"kill {index}: {problem}")
        shutil.rmtree(workdir)
    return {
        "benchmark": "crash_states",
        "run": kind,
        "states": len(found),
        "tried": len(chosen),
        "killed": killed,
        "not_recovered": len(failed),
        "problems": failed[:10],
        "seconds": round(time.monotonic() - start),
    }


def main() -> None:
    """Try the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--every", type=int, default=1, help="try every so many-th state")
    parser.add_argument("--kills", type=int, default=0, help="real kills of each run")
    parser.add_argument("--directory", type=pathlib.Path, help="where; by default a temporary one")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--workdir", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train(make_config(options.directory, options.child, options.workdir), console=CONSOLE)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = pathlib.Path(directory)
        prepare(root)
        keep_compiled()
        for kind in options.kinds:
            train(make_config(root, kind, root / f"{kind}-warm"), console=CONSOLE)
            print(json.dumps(try_kind(root, kind, options.every, options.kills)), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
