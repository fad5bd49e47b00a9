"""What language models predict: how each text goes on, by the most likely token each time."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from transformer.generation.generate import Generator
from transformer.generation.sampling import SamplingConfig
from transformer.objective import Trained
from transformer.validation import require

_BATCHES_AT_ONCE = 8  # that texts are sorted within, by length


def continuations(
    run: Trained, texts: Sequence[str], names: Sequence[str], batch_size: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """The `continuation` of each text, of at most `max_new_tokens` and as many as the model has room for.

    Texts that leave less room are continued apart: what follows a text does not depend on the texts beside it.
    """
    require(max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    generator, limit = Generator(run.model, run.params), run.config.model.max_length
    for start in range(0, len(texts), _BATCHES_AT_ONCE * batch_size):
        part = texts[start : start + _BATCHES_AT_ONCE * batch_size]
        prompts = [run.config.objective.encode(text, run.tokenizer, run.config.data) for text in part]
        for name, prompt in zip(names[start:], prompts, strict=False):
            require(
                len(prompt) < limit,
                f"A text to continue must leave room in the model's {limit} tokens, {name} has {len(prompt)} (with the one that "
                "starts a document); shorten it.",
            )
        said = [""] * len(part)
        budgets = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
        shortest_first = sorted(range(len(part)), key=lambda index, prompts=prompts: len(prompts[index]))
        for count, of_budget in itertools.groupby(shortest_first, budgets.__getitem__):
            group = list(of_budget)
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                generated = generator.generate(
                    [prompts[index] for index in batch],
                    max_new_tokens=count,
                    sampling=SamplingConfig(temperature=0),
                    end_of_text=run.tokenizer.end_of_text,
                )
                for index, tokens, length in zip(batch, generated.tokens, generated.lengths, strict=True):
                    said[index] = _behind(run.tokenizer, prompts[index], tokens[:length])
        yield from ({"continuation": text} for text in said)


def _behind(tokenizer: Any, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """The text of tokens as it stands behind their prompt: a word, or the rest of one."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens)
