"""What language models say: how a text goes on."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from transformer.data.tokenizers import note_unknown
from transformer.data.tokenizers.chat import Messages, chat_ids
from transformer.generation.generate import Generator, stream
from transformer.generation.sampling import SamplingConfig
from transformer.generation.text import stream_text
from transformer.objective import Trained
from transformer.objectives.bases import TokenObjective
from transformer.tokenizer import drawable, prompt_ids, stop_ids
from transformer.validation import require

_BATCHES_AT_ONCE = 8  # that texts are sorted within, by length


@dataclasses.dataclass(frozen=True)
class ContinuesText(TokenObjective):
    """An objective whose model continues a text."""

    continues_text = True
    settings = ("training.sample_every", "training.sample_prompt", "training.sample_length")

    def generate(
        self,
        run: Trained,
        prompt: str,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        note: Callable[[str], None],
    ) -> Iterator[str]:
        """The prompt as the model reads it, and how it goes on."""
        tokens = prompt_ids(run.tokenizer, prompt)
        generated = self._follow(run, tokens, max_new_tokens, sampling, seed, note)
        return stream_text(run.tokenizer.decode, tokens, generated)

    def reply(
        self,
        run: Trained,
        messages: Messages,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        note: Callable[[str], None],
    ) -> Iterator[str]:
        """The next message of a conversation, as the chat template of the model's tokenizer writes it."""
        tokens = chat_ids(run.tokenizer, messages, reply=True).tolist()
        generated = self._follow(run, tokens, max_new_tokens, sampling, seed, note)
        return stream_text(run.tokenizer.decode, (), generated)

    def _follow(
        self,
        run: Trained,
        tokens: list[int],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        note: Callable[[str], None],
    ) -> Iterator[int]:
        """The tokens behind others, as they come."""
        tokenizer = run.tokenizer
        room = run.config.model.max_length - len(tokens)
        require(
            0 <= max_new_tokens <= room and room > 0,
            f"A prompt of {len(tokens)} tokens (with the one that starts a document) leaves room for {max(room, 0)} of the "
            f"model's {run.config.model.max_length}, max_new_tokens is {max_new_tokens}; shorten the prompt or ask for fewer.",
        )
        note_unknown(tokenizer, tokens, note)
        return stream(
            run.model,
            run.params,
            tokens,
            max_new_tokens=max_new_tokens or room,
            sampling=sampling,
            seed=seed,
            end_of_text=stop_ids(tokenizer),
            drawable=drawable(tokenizer, run.config.model.vocab_size),
        )

    def predict(
        self, run: Trained, texts: Sequence[str], names: Sequence[str], batch_size: int, max_new_tokens: int = 64
    ) -> Iterator[dict[str, Any]]:
        """The most likely `continuation`."""
        return continuations(run, texts, names, batch_size, max_new_tokens)

    def next_command(self, prompt: str) -> tuple[str, ...]:
        """Continue a text."""
        return ("generate", "--prompt", prompt or "Once upon a time")


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
                    end_of_text=stop_ids(run.tokenizer),
                    drawable=drawable(run.tokenizer, run.config.model.vocab_size),
                )
                for index, tokens, length in zip(batch, generated.tokens, generated.lengths, strict=True):
                    said[index] = _behind(run.tokenizer, prompts[index], tokens[:length])
        yield from ({"continuation": text} for text in said)


def _behind(tokenizer: Any, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """The text of tokens as it stands behind their prompt: a word, or the rest of one."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens)
