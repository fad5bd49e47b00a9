"""Tokens per second with and without a draft model (speculative decoding), in turn in one process; prints one JSON line.

    python benchmarks/speculative.py [RUN DRAFT] [--rounds 6] [--new-tokens 128] [--draft-tokens 4] [--prompt TEXT]

The batch has one row; sampling is at temperature 0.8 and greedy. With two runs of one vocabulary, their acceptance rate is
measured. Without runs, a decoder of 10.7 million initial parameters (6 layers of width 384) has a draft model of 0.2 million.
Both are nearly uniform. Therefore about half of the drafted tokens are accepted, and with greedy decoding all, since both
models repeat one token. The speed-ups belong to such rates, and do not predict a trained pair. Times are minima over the
rounds. The speed-up is also given as the median over rounds, since both have the same load within a round.
"""

import argparse
import json
import statistics
from typing import Any

import jax
from decode import seconds

from transformer.generation.generate import Generator
from transformer.generation.sampling import SamplingConfig
from transformer.generation.speculative import SpeculativeGenerator
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.runs.saved import load
from transformer.tokenizer import prompt_ids


def random_model(layers: int, width: int, heads: int) -> tuple[Decoder, Any]:
    """A decoder with initial parameters."""
    block = BlockConfig(AttentionConfig(num_heads=heads))
    config = ModelConfig(vocab_size=65, max_length=512, num_layers=layers, embed_dim=width, pattern=(block,))
    model = Decoder(config)
    return model, init_params(model, jax.random.key(0))[0]


def main() -> None:
    """Measure both ways of drawing and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="a run and a smaller one")
    parser.add_argument("--rounds", type=int, default=6, help="timed calls of each")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens generated")
    parser.add_argument("--draft-tokens", type=int, default=4, help="drafted tokens of each round")
    parser.add_argument("--prompt", default="def ", help="of runs")
    options = parser.parse_args()
    if options.runs:
        run, draft = (load(name) for name in options.runs)
        prompt = prompt_ids(run.tokenizer, options.prompt)
        models: Any = (run.model, run.params, draft.model, draft.params)
    else:
        prompt = [1] * 8
        models = (*random_model(6, 384, 6), *random_model(2, 96, 2))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(params)) for params in models[1::2]]
    result: dict[str, Any] = {
        "benchmark": "speculative",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    result |= {"parameters": sizes[0], "draft_parameters": sizes[1], "draft_tokens": options.draft_tokens}
    for name, temperature in (("sampled", 0.8), ("greedy", 0.0)):
        plain = Generator(*models[:2])
        pair = SpeculativeGenerator(*models, draft_tokens=options.draft_tokens)
        how: Any = {"max_new_tokens": options.new_tokens, "sampling": SamplingConfig(temperature=temperature)}
        for generator in (plain, pair):
            generator.generate([prompt], **how)
        pair.offered = pair.accepted = 0
        times = [
            [seconds(lambda g=g, seed=seed, how=how: g.generate([prompt], seed=seed, **how)) for g in (plain, pair)]
            for seed in range(options.rounds)
        ]
        alone, together = (min(column) for column in zip(*times, strict=True))
        result[name] = {
            "tokens_per_second": round(options.new_tokens / alone, 1),
            "with_draft": round(options.new_tokens / together, 1),
            "speed_up": round(alone / together, 2),
            "speed_up_median": round(statistics.median(one / two for one, two in times), 2),
            "accepted": round(pair.accepted / pair.offered, 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
