"""Small wrong changes to the package, one at a time: do the tests beside each notice it? `make mutants`.

`mutants.toml` has the table. Each worker has a copy of the checkout (tracked files and new ones, as they are). It makes one
change and runs the tests that the table names, without the type-checking hook (`TRANSFORMER_TEST_TYPES=0`). A change is killed
if a test fails or crashes, and hung if the tests take longer than `--limit`, which counts too. First the same tests run on the
unchanged copy; where one fails, its changes are errors. The last line is JSON. The exit status is 1 if there is an error, if a
change survived that has no reason in the table, or if more than 2 in 100 survived.

    python tests/mutants.py --only transformer/ops --workers 2
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
TABLE = pathlib.Path(__file__).with_suffix(".toml")
AREAS = ("ops", "layers", "models", "objectives", "data", "training", "parallel", "generation", "evaluation", "interop")
MOST_SURVIVORS = 0.02
NO_TESTS = 5  # pytest's exit status
ENDED_FROM_OUTSIDE = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)  # says nothing of the change


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A wrong change: the one occurrence of `old` in `file` becomes `new`; `tests`, ids of pytest, should fail."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""
    """Why it may survive; empty if it must not."""

    @property
    def area(self) -> str:
        """The package of the file: ops, layers, ..."""
        return self.file.split("/")[1]

    def changed(self, root: pathlib.Path) -> str:
        """The text of the file with the change; ValueError unless `old` occurs once."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.old!r} must occur once in {self.file}, it occurs {text.count(self.old)} times.")
        return text.replace(self.old, self.new)


def read_table(path: pathlib.Path = TABLE) -> list[Mutant]:
    """All mutants; the table has one list of changes for each file."""
    found = []
    for file, changes in tomllib.loads(path.read_text()).items():
        found += [Mutant(file=file, **{**change, "tests": tuple(change["tests"])}) for change in changes]
    return found


@functools.cache
def functions_of(path: pathlib.Path) -> frozenset[str] | None:
    """The functions of a test file; None if there is no file."""
    if not path.is_file():
        return None
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def missing_tests(mutant: Mutant, root: pathlib.Path = ROOT) -> list[str]:
    """The ids of its tests that name no file or no function."""
    missing = []
    for test in mutant.tests:
        name, _, function = test.partition("::")
        functions = functions_of(root / name)
        if functions is None or (function and function.partition("[")[0] not in functions):
            missing.append(test)
    return missing


def copy_checkout(source: pathlib.Path, target: pathlib.Path) -> None:
    """Tracked and new files of a checkout, as they are, compiled so that a change counts whatever the time of its file."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    compile_all = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "transformer"]
    subprocess.run(compile_all, cwd=target, check=True)


def run_tests(root: pathlib.Path, tests: tuple[str, ...], limit: float, *options: str) -> tuple[int | None, str]:
    """Pytest's exit status (None: it took too long) and output."""
    given = {
        "TRANSFORMER_TEST_TYPES": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *options, *tests]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=root, env={**os.environ, **given}, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return status, output.read().decode(errors="replace")


def failing_unchanged(root: pathlib.Path, tests: tuple[str, ...], limit: float) -> list[str]:
    """The ids of tests that fail without a change, each with pytest's message; all ids if pytest ends earlier."""
    status, output = run_tests(root, tests, limit, "-rfE")
    if status == 0:
        return []
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    found = [
        test for test in tests if any(name == test or name.startswith((f"{test}[", f"{test}::")) for name in failed)
    ]
    print(f"unchanged: exit status {status}\n{output[-2000:]}", flush=True)
    return found if found and status == 1 else list(tests)


def try_mutant(mutant: Mutant, root: pathlib.Path, limit: float) -> str:
    """`killed`, `hung`, `survived`, or `error` if somebody ended the tests; the copy is as before at the end."""
    path = root / mutant.file
    before = path.read_bytes()
    path.write_text(mutant.changed(root))
    try:
        status, _ = run_tests(root, mutant.tests, limit, "-x")
    finally:
        path.write_bytes(before)
    if status is None:
        return "hung"
    if status in ENDED_FROM_OUTSIDE:
        return "error"
    return "survived" if status in (0, NO_TESTS) else "killed"


def try_all(
    mutants: list[Mutant], roots: list[pathlib.Path], limit: float, *, check: bool = True
) -> dict[str, list[Mutant]]:
    """Mutants by how they ended: `killed`, `hung`, `survived` or `error`."""
    ended: dict[str, list[Mutant]] = {"killed": [], "hung": [], "survived": [], "error": []}
    free: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()
    for root in roots:
        free.put(root)

    def on_a_copy(work, *arguments):
        root = free.get()
        try:
            return work(root, *arguments)
        finally:
            free.put(root)

    def timed(root: pathlib.Path, mutant: Mutant) -> None:
        start = time.monotonic()
        how = "error" if set(mutant.tests) & unfit else try_mutant(mutant, root, limit)
        ended[how].append(mutant)
        print(f"{how:<8} {time.monotonic() - start:4.0f} s  {mutant.file}: {mutant.what}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(roots)) as pool:
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        ends = [len(tests) * number // len(roots) for number in range(len(roots) + 1)]  # a file's tests stay together
        parts = [tuple(tests[start:end]) for start, end in itertools.pairwise(ends)] if check else []
        longest = limit * max(1, len(tests))
        checked = pool.map(lambda part: on_a_copy(failing_unchanged, part, longest), filter(None, parts))
        unfit = set(itertools.chain.from_iterable(checked))
        try:
            list(pool.map(lambda mutant: on_a_copy(timed, mutant), mutants))
        except BaseException:  # Ctrl-C ends with the changes that are being tried
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return ended


def summary(ended: dict[str, list[Mutant]], seconds: float) -> tuple[dict[str, object], bool]:
    """What the last line says, and whether all is well."""
    survived, count = ended["survived"], sum(map(len, ended.values()))
    well = not ended["error"] and all(mutant.reason for mutant in survived) and len(survived) <= MOST_SURVIVORS * count
    named = {how: [f"{m.file}: {m.what}" for m in ended[how]] for how in ("hung", "error")}
    reasons = {f"{m.file}: {m.what}": m.reason for m in survived}
    return {
        "mutants": count,
        "killed": len(ended["killed"]),
        **named,
        "survived": reasons,
        "seconds": round(seconds),
    }, well


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="those whose file or description has TEXT"
    )
    parser.add_argument("--workers", type=int, default=2, help="copies that are tested at the same time (default 2)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for the tests of one change (default 300)")
    parser.add_argument(
        "--unchecked", action="store_true", help="without trying the tests on the unchanged copy before"
    )
    options = parser.parse_args()
    chosen = [m for m in read_table() if any(text in f"{m.file}: {m.what}" for text in options.only or [""])]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        roots = [pathlib.Path(folder, str(number)) for number in range(options.workers)]
        copy_checkout(ROOT, roots[0])
        for root in roots[1:]:
            shutil.copytree(roots[0], root)
        ended = try_all(chosen, roots, options.limit, check=not options.unchecked)
    found, well = summary(ended, time.monotonic() - start)
    print(json.dumps(found))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
