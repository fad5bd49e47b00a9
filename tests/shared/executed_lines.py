"""A program: the lines of the package that two training steps of a tiny decoder and its generation execute, as JSON."""

import collections
import inspect
import json
import pathlib
import sys

import jax
import numpy as np

import transformer
from transformer import Batch, Config, DataConfig, Decoder, ModelConfig, TrainingConfig, generate
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.parts import Steps, resolve

PACKAGE = str(pathlib.Path(transformer.__file__).parent)
lines: dict[str, set[int]] = collections.defaultdict(set)


def trace(frame, event, argument):
    """Note each line of the package's functions; imports execute the bodies of modules and classes, which are left out."""
    if not frame.f_code.co_filename.startswith(PACKAGE) or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return None
    lines[frame.f_code.co_filename].add(frame.f_lineno)
    return trace


def main() -> None:
    """Train for two steps and generate four tokens."""
    config = Config(
        model=ModelConfig(num_layers=2, embed_dim=32),
        data=DataConfig(source=("text",), sequence_length=16, batch_size=4),
        training=TrainingConfig(steps=2),
        workdir="run",
    )
    tokenizer = ByteTokenizer()
    config = resolve(config, tokenizer)
    steps = Steps(config, tokenizer)
    state = steps.init_state()
    tokens = np.arange(64, dtype=np.int32).reshape(4, 16)
    batch = steps.runner.place_batch(Batch.of(tokens, tokens + 1))
    model = Decoder(config.model)
    sys.settrace(trace)
    for _ in range(2):
        state, _ = steps.runner.step(state, batch)
    generate(model, jax.device_get(state.params), [[1, 2, 3]], max_new_tokens=4)
    sys.settrace(None)


if __name__ == "__main__":
    main()
    json.dump(
        {str(pathlib.Path(name).relative_to(PACKAGE)): sorted(found) for name, found in lines.items()}, sys.stdout
    )
