"""Tokens per second of greedy decoding with a 10.7M-parameter decoder, at batch 1 and 8; prints one JSON line.

    python benchmarks/decode.py [--rounds 10] [--new-tokens 128]

The model has 6 layers, width 384, 6 heads, vocabulary 65 and float32. Times include reading 32 tokens and generating 128,
without compilation and the preparation of the parameters. If torch and transformers are installed, Hugging Face's `generate`
with a GPT-2 of this size takes turns with our model; otherwise its fields are null. Times are minima over the rounds. The
ratio is also given as the median over rounds, since both have the same load within a round.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from transformer.generation.generate import Generator
from transformer.generation.sampling import SamplingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.ops.positions.learned import LearnedPositions

CONFIG = ModelConfig(
    vocab_size=65,
    max_length=256,
    num_layers=6,
    embed_dim=384,
    pattern=(BlockConfig(AttentionConfig(num_heads=6)),),
    positions=LearnedPositions(),
)


def ours(new_tokens: int) -> tuple[Callable[[np.ndarray], Any], int]:
    """Our generation, and the bytes of parameters that a step reads."""
    model = Decoder(CONFIG)
    params, _ = init_params(model, jax.random.key(0))
    generator = Generator(model, params)
    greedy = SamplingConfig(temperature=0)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return lambda prompts: generator.generate(prompts, max_new_tokens=new_tokens, sampling=greedy), num_bytes


def hugging_face(new_tokens: int) -> Callable[[np.ndarray], Any] | None:
    """Hugging Face's generation, if it is installed."""
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError:
        return None
    config = transformers.GPT2Config(
        vocab_size=CONFIG.vocab_size,
        n_positions=CONFIG.max_length,
        n_embd=CONFIG.embed_dim,
        n_layer=CONFIG.num_layers,
        n_head=6,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()

    def run(prompts: np.ndarray) -> Any:
        with torch.inference_mode():
            tokens = torch.from_numpy(prompts)
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False
            )
        assert out.shape[1] == prompts.shape[1] + new_tokens
        return out

    return run


def read_bandwidth(num_bytes: int) -> float:
    """Bytes per second of reading a matrix of this size: the fastest of 50 products with a vector."""
    matrix = np.ones((num_bytes // 4 // 384, 384), np.float32)
    vector = np.ones(384, np.float32)
    return matrix.nbytes / min(seconds(lambda: matrix @ vector) for _ in range(50))


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure both batch sizes and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens generated")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "decode", "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    run_ours, num_bytes = ours(options.new_tokens)
    run_theirs = hugging_face(options.new_tokens)
    for batch in (1, 8):
        prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, 32))
        first = seconds(lambda prompts=prompts: run_ours(prompts))
        if run_theirs:
            run_theirs(prompts)
        times: list[tuple[float, float]] = []
        for _ in range(options.rounds):
            mine = seconds(lambda prompts=prompts: run_ours(prompts))
            theirs = seconds(lambda prompts=prompts: run_theirs(prompts)) if run_theirs else float("nan")
            times.append((mine, theirs))
        mine, theirs = (min(column) for column in zip(*times, strict=True))
        count = batch * options.new_tokens
        result[f"batch_{batch}"] = {
            "tokens_per_second": round(count / mine, 1),
            "compile_seconds": round(first - mine, 2),
            "hugging_face_tokens_per_second": round(count / theirs, 1) if run_theirs else None,
            "ratio": round(theirs / mine, 2) if run_theirs else None,
            "ratio_median": round(statistics.median(t / m for m, t in times), 2) if run_theirs else None,
            "weights_read_bound": round(batch * read_bandwidth(num_bytes) / num_bytes, 1),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
