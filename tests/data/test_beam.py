"""Text prepared on Apache Beam by several worker processes: files equal the files of one process, also after a kill."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed: make test-beam"
)
IN_PROCESS = "runner=DirectRunner"
IN_TWO = "runner=DirectRunner,direct_num_workers=2,direct_running_mode=multi_processing"

# A source that kills its worker when the file `kill` is there, and says which processes have read it.
SOURCE = """
import os, pathlib, signal, time
from transformer.data.prepare import data_directory
from transformer.data.registry import register_source
from transformer.data.seen import stamp
from transformer.data.sources.files import JsonLines
from transformer.data.sources.globs import Pattern

@register_source
class Fatal(Pattern):
    def __init__(self):
        super().__init__((JsonLines(),))
    def stamp(self, name, reading, config):
        return stamp(name, reading, data_directory(config), self.files(name))  # as a kind of the package
    def part_documents(self, name, part, config):
        root = pathlib.Path(name).parent
        for document in super().part_documents(name, part, config):
            with (root / "read.txt").open("a") as file:
                file.write(f"{os.getpid()} {document.name}\\n")
            time.sleep(0.05 * document.name.startswith("1."))  # so that the other process has begun before its end
            if document.name == "2.jsonl:3" and (root / "kill").exists():
                (root / "kill").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            yield document
"""
SCRIPT = """
import sys
import fatal
from transformer.cli.main import main
from transformer.data import prepare, tasks, tokens

if __name__ == "__main__":
    prepare._SHARD_BYTES = tokens._SHARD_BYTES = 20_000
    tasks._PART_BYTES = 1
    main(sys.argv[1:])
"""


@pytest.fixture
def corpus(tmp_path):
    """Four files, and the modules that read them."""
    for number in range(4):
        rows = [{"text": f"text {number} {i}\n" * (20 + i % 90), "prompt": f"p{i}" if i % 3 else ""} for i in range(40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{number}.jsonl").write_text(lines)
    (tmp_path / "fatal.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "script.py").write_text(SCRIPT)
    return f"{tmp_path}/*.jsonl"


def _start(corpus, data_dir, *arguments):
    root = pathlib.Path(corpus).parent
    command = [
        sys.executable,
        str(root / "script.py"),
        "prepare",
        corpus,
        "--data-dir",
        str(root / data_dir),
        *arguments,
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)]),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def _files(directory):
    paths = [path for path in directory.rglob("*") if path.is_file() and "text_seen" not in path.parts]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_a_killed_worker_then_files_of_one_process(tmp_path, corpus):
    """The direct runner waits forever for a worker that is killed: it is interrupted, and started again."""
    time.sleep(2.1)  # files that have just changed are not known to be what they were
    tokenizer = ["--tokenizer", "bpe", "--tokenizer-size", "300", "--record-bytes", "1000"]
    expected = _finish(_start(corpus, "one", *tokenizer))
    assert expected[0] == 0, expected[2]
    (tmp_path / "kill").touch()
    process = _start(corpus, "several", *tokenizer, "--beam-pipeline-options", IN_TWO)
    while (tmp_path / "kill").exists() or len(list(tmp_path.glob("several/text_tasks/*/sizes-*"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, _, err = _finish(process)
    assert code == 130, err
    assert not list(tmp_path.glob("several/text_records/*"))
    (tmp_path / "read.txt").unlink()

    code, out, err = _finish(_start(corpus, "several", *tokenizer, "--beam-pipeline-options", IN_TWO))
    assert (code, out) == (0, expected[1]), err
    read = [line.split() for line in (tmp_path / "read.txt").read_text().splitlines()]
    assert len(read) == 40, "only the file of the killed worker is read again"
    assert int(read[0][0]) != process.pid
    found = _files(tmp_path / "several")
    assert found == _files(tmp_path / "one")
    assert sum("text_records-train" in name for name in found) > 2
    assert sum("tokens-train" in name for name in found) > 2

    # Nothing is left to do, not even a pipeline.
    code, out, err = _finish(_start(corpus, "several", *tokenizer, "--beam-pipeline-options", "runner=Nowhere"))
    assert (code, out) == (0, expected[1]), err


def test_tasks_run_in_several_processes_and_their_errors_reach_the_user(tmp_path, corpus):
    lines = (tmp_path / "1.jsonl").read_text().splitlines()
    (tmp_path / "1.jsonl").write_text("\n".join([*lines, '{"text": 3}']))
    code, out, err = _finish(_start(corpus, "several", "--beam-pipeline-options", IN_TWO))
    assert (code, out) == (2, ""), err
    place = f"{tmp_path}/1.jsonl, line 41"
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and place in said[0] and "must have its text as a string" in said[0], err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("several/text_*/*"))
    workers = {line.split()[0] for line in (tmp_path / "read.txt").read_text().splitlines()}
    assert len(workers) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "runner=Nowhere",
            "error: A pipeline of Apache Beam must finish, reading of *.jsonl with --runner=Nowhere did not: ",
        ),
        (
            "runner=DirectRunner,direct_num_workers=many",
            "error: The options must be Apache Beam's, got runner=DirectRunner,direct_num_workers=many: argument "
            "--direct_num_workers: invalid int value: 'many'.",
        ),
    ],
)
def test_options_that_cannot_work_are_one_sentence(corpus, options, expected):
    code, _, err = _finish(_start(corpus, "several", "--beam-pipeline-options", options))
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


def test_training_reads_what_was_prepared(tmp_path, corpus):
    """Also in one process, the default of Beam."""
    time.sleep(2.1)
    prepare = ["--tokenizer", "bytes", "--beam-pipeline-options", IN_PROCESS]
    code, _, err = _finish(_start(corpus, "several", *prepare))
    assert code == 0, err
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("several/text_records/**/*") if path.is_file()}
    script = f"""
    from transformer.config import DataConfig
    from transformer.data import prepare, token_shards
    from transformer.data.pipeline import train_batches
    from transformer.data.tokenizers.bytes import ByteTokenizer

    prepare.write_shard = token_shards.write_shard = None
    data = DataConfig(source=({corpus!r},), data_dir={str(tmp_path / "several")!r}, sequence_length=32)
    print(next(train_batches(data, ByteTokenizer())).inputs.shape)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
