"""Results of every config, bit for bit, to separate changes of the code's form from changes of its results.

    python benchmarks/frozen.py record FILE
    python benchmarks/frozen.py compare FILE

Each config and each of its variants is made small and trained for five steps on data that this script writes. The script
records parameters, logits, losses, generated text, and the number of operations of three training steps. `compare` prints one
JSON line with the differences from FILE, and ends with status 1 if there are any. Bits depend on the machine and the version of
JAX: record and compare on the same ones. It takes one core and some five minutes; `--only WORD` restricts it to configs with the
word in their names.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pathlib
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

# One core, whichever machine this is: XLA cuts sums among threads. No trace is left with the user.
if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    _state = tempfile.TemporaryDirectory(prefix="state-")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",  # half the time
        "JAX_COMPILATION_CACHE_DIR": f"{_state.name}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_STATE_HOME": _state.name,
    }

import jax
import jax.numpy as jnp
import numpy as np

from transformer import load
from transformer.cli.arguments import parse_config
from transformer.cli.main import main as transformer
from transformer.config import Config
from transformer.parts import StandIn, Steps, resolve
from transformer.runs.train import train

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 5
LENGTH = 40
TOKENIZER_SIZE = 290  # of trained vocabularies
DRAWN = ("--temperature", "1", "--seed", "3")
GREEDY = ("--temperature", "0")

# Settings that no config in configs/ has.
MORE = {
    "prefix_lm": ["python_stdlib:debug", "--objective.kind", "prefix_lm", "--model.positions.kind", "t5"],
    "alibi": ["python_stdlib:debug", "--model.positions.kind", "alibi", "--model.norm.placement", "sandwich",
              "--model.dropout", "0.1", "--optimizer.kind", "lion", "--training.skip-spikes", "4"],
    "sinusoidal": ["multi30k_translate:debug", "--model.positions.kind", "sinusoidal", "--model.norm.placement", "post",
                   "--model.norm.kind", "layer_norm", "--model.attention.dropout", "0.1", "--optimizer.kind", "adafactor",
                   "--optimizer.accumulate-steps", "2"],
    "two_vocabularies": ["multi30k_translate:debug", "--data.share-vocabulary", "False",
                         "--model.positions.kind", "t5"],
    "weighted": ["imdb_classify:debug", "--model.pooling", "attention", "--objective.class-weights", "balanced",
                 "--model.attention.dropout", "0.1"],
    "window": ["python_stdlib:debug", "--model.attention.window", "8", "--model.attention.logits-soft-cap", "20",
               "--model.logits-soft-cap", "30", "--model.scale-embeddings", "True", "--optimizer.ema-decay", "0.9",
               "--model.scan-layers", "True"],
    "pattern": ["python_stdlib:debug", "--model.attention.pattern.kind", "strided", "--model.attention.pattern.block-size", "4",
                "--model.attention.pattern.stride", "4"],
}  # fmt: skip
# Whose training steps are counted.
COUNTED = ("python_stdlib", "multi30k_translate", "moe_8x7b:debug")


# ---- Small configs -----------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Every config with each of its variants, and what they leave out."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        table = re.search(r'\{("": [^{}]*)\}\[variant\]', path.read_text())
        variants = re.findall(r'"(\w*)":', table[1]) if table else [""]
        found += [f"{path.stem}:{variant}".removesuffix(":") for variant in variants]
    return [*found, *MORE]


def small(name: str, data: pathlib.Path, workdir: str = "") -> Config:
    """The config of a name, made small: two narrow layers, short rows, few tokens, the data in `data`."""
    reference, *more = MORE.get(name, [name])
    stem, _, variant = reference.partition(":")
    file = f"{ROOT / 'configs' / stem}.py" + (f":{variant}" if variant else "")
    config = parse([file])
    flags: list[Any] = [
        *("--model.num-layers", 2 * len(config.model.pattern), "--model.embed-dim", 32, "--model.vocab-size", 0),
        *("--model.max-length", 0, "--model.attention.num-heads", 4, "--model.attention.head-dim", 0),
        *("--model.feed-forward.hidden-dim", 48, "--data.data-dir", data / "prepared", "--data.batch-size", 10),
        *("--data.sequence-length", LENGTH, "--data.validation-fraction", 0.2),
        *("--data.limit", 0, "--training.steps", STEPS, "--training.log-every", 1, "--training.checkpoint-every", 0),
        *("--training.eval-every", 0, "--training.sample-length", 0, "--optimizer.schedule.warmup-steps", 1),
        *(
            "--training.seed",
            1,
            "--data.shuffle-seed",
            2,
            "--optimizer.learning-rate",
            0.01,
            "--workdir",
            workdir or "w",
        ),
    ]
    if getattr(config.data.tokenizer, "size", 0) > 0:
        flags += ["--data.tokenizer.size", TOKENIZER_SIZE]
    if config.objective.uses("data.record_bytes"):
        flags += ["--data.record-bytes", 512]
    if config.model.memory_length > 0:
        flags += ["--model.memory-length", 24]
    sources = {
        "classification": ["reviews"],
        "seq2seq": ["phrases"],
        "span_corruption": [data / "one.txt", data / "two.txt"],
    }.get(config.objective.kind)
    if sources is None:
        sources = [data / ("one.txt" if config.model.memory_length else "texts.jsonl")]
    return parse([file, *map(str, [*flags, "--data.source", *sources, *more])])


def parse(arguments: list[str]) -> Config:
    """The config of a command line, without its notes."""
    with contextlib.redirect_stderr(io.StringIO()):
        return parse_config(arguments, command="frozen")


def write_data(data: pathlib.Path) -> None:
    """Texts with and without prompts, labelled texts, and pairs."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(60)] + [
        "é",
        "日本",
    ]

    def text(low: int, high: int) -> str:
        line = [draw.choice(words) + draw.choice(("", "", "", ".", "\n")) for _ in range(draw.randint(low, high))]
        return " ".join(line)

    for name in ("one", "two"):
        (data / f"{name}.txt").write_text("\n\n".join(text(5, 120) for _ in range(120)))
    rows = [{"text": text(3, 150)} | ({"prompt": text(1, 4)} if n % 3 == 0 else {}) for n in range(200)]
    labelled = [{"text": f"{words[n % 3]} {text(1, 20)}", "label": "abc"[n % 3 - (n % 9 == 0)]} for n in range(150)]
    lines = [text(1, 9).replace("\n", " ") for _ in range(150)]
    pairs = [{"source": line, "target": " ".join(reversed(line.split()))} for line in lines]
    for name, records in (("texts", rows), ("labelled", labelled), ("pairs", pairs)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare = ("--data-dir", str(data / "prepared"))
    call("prepare", str(data / "labelled.jsonl"), "--kind", "labelled", "--name", "reviews", *prepare)
    call("prepare", str(data / "pairs.jsonl"), "--kind", "pairs", "--name", "phrases", *prepare)


def call(*arguments: str) -> str:
    """The standard output of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        transformer(list(arguments))
    return out.getvalue()


# ---- What is frozen ----------------------------------------------------------------------------------------------------


def measure(config: Config) -> Iterator[tuple[str, Any]]:
    """Train a config and read back what it is and says, by name."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(config)
    lines = pathlib.Path(config.workdir, "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for split in ("train", "validation"):
        losses = [float(row["loss"]).hex() for row in rows if row["split"] == split]
        yield f"{split} loss", losses
    yield "gradient norm", [float(row["grad_norm"]).hex() for row in rows if row["split"] == "train"]
    run = load(config.workdir)
    model, params, objective = run.model, run.params, run.config.objective
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield f"parameter {name}", f"{leaf.dtype} {tuple(leaf.shape)} {digest(leaf)}"
    yield "logits", digest(logits(model, params, objective))
    if objective.continues_text or objective.num_stacks == 2:
        tokens = ("--max-new-tokens", "24")
        prompt = ("generate", config.workdir, "--prompt", "a word")
        yield "greedy text", call(*prompt, *GREEDY, *tokens)
        if objective.continues_text:
            yield "drawn text", call(*prompt, *DRAWN, *tokens)


def digest(array: Any) -> str:
    """A hash of an array's bits, type and shape, and its mean absolute value for the reader."""
    array = np.asarray(array)
    found = hashlib.sha256(array.tobytes() + f"{array.dtype}{array.shape}".encode()).hexdigest()[:16]
    return f"{found} {np.abs(array.astype(np.float64)).mean():.6g}"


def logits(model: Any, params: Any, objective: Any) -> Any:
    """What a model makes of fixed tokens, all of the vocabulary among them."""
    size = model.config.vocab_size
    rows = -(-size // 16)
    tokens = jnp.arange(16 * rows, dtype=jnp.int32).reshape(rows, 16) * 7 % size
    if objective.num_stacks == 2:
        source = tokens % (model.source_vocab_size or size)
        return jax.jit(lambda params: model.apply({"params": params}, source, tokens[:, ::-1]))(params)
    return jax.jit(lambda params: model.apply({"params": params}, tokens, method=objective.init_method))(params)


def count_operations(config: Config) -> dict[str, int]:
    """Equations of a training step as JAX traces it, and instructions of the program compiled for a CPU.

    The adapter: the one function that calls what lies below the commands, `train` and `load`. Where these are renamed it
    follows; what it counts must not change.
    """
    config = resolve(config, StandIn(TOKENIZER_SIZE))
    steps = Steps(config, StandIn(TOKENIZER_SIZE))
    batch = config.objective.batch_shapes(config)
    program = steps.runner.lower(steps.state, batch).compile().as_text()
    return {
        "equations": count_equations(jax.make_jaxpr(steps.train_step)(steps.state, batch).jaxpr),
        "instructions": len(re.findall(r"^ +(?:ROOT )?%?[\w.-]+ = ", program, re.MULTILINE)),
    }


def count_equations(jaxpr: Any) -> int:
    """Equations of a program and of all programs in it."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                total += count_equations(inner) if hasattr(inner, "eqns") else 0
    return total


# ---- The commands ------------------------------------------------------------------------------------------------------


def freeze(only: str) -> dict[str, dict[str, Any]]:
    """Everything, by config and name; a config that is like an earlier one once small names that."""
    frozen: dict[str, dict[str, Any]] = {}
    seen: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="frozen-") as place:
        data = pathlib.Path(place)
        write_data(data)
        for name in names():
            if only not in name:
                continue
            start = time.perf_counter()
            alike = repr(small(name, data))
            if alike in seen:
                frozen[name] = {"like": seen[alike]}
                continue
            seen[alike] = name
            try:
                frozen[name] = dict(measure(small(name, data, f"{place}/{name.replace(':', '-')}")))
                if name in COUNTED:
                    frozen[name] |= count_operations(small(name, data))
            except (Exception, SystemExit) as error:  # a finding, not the end of the others
                frozen[name] = {"error": f"{type(error).__name__}: {error}".replace(place, "")}
            print(f"{name} {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return frozen


def differences(before: Any, after: Any) -> dict[str, Any]:
    """Differences by config and name: the old and the new value."""
    found = {}
    for name in before | after:
        old, new = before.get(name, {}), after.get(name, {})
        parts = {key: [old.get(key), new.get(key)] for key in old | new if old.get(key) != new.get(key)}
        found |= {name: parts} if parts else {}
    return found


def main() -> None:
    """Record or compare, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--only", default="", help="only configs with this word in their names")
    parser.add_argument("--short", action="store_true", help="names of differences, without values")
    options = parser.parse_args()
    start = time.perf_counter()
    frozen = freeze(options.only)
    line: dict[str, Any] = {"benchmark": "frozen", "jax": jax.__version__, "configs": len(frozen)}
    line["seconds"] = round(time.perf_counter() - start)
    line["errors"] = {name: of_config["error"] for name, of_config in frozen.items() if "error" in of_config}
    if options.command == "record":
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(json.dumps(frozen, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps(line))
        sys.exit(1 if line["errors"] else 0)
    recorded = json.loads(options.file.read_text())
    found = differences({name: value for name, value in recorded.items() if options.only in name}, frozen)
    line["differs"] = {name: list(parts) for name, parts in found.items()} if options.short else found
    print(json.dumps(line, ensure_ascii=False))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
