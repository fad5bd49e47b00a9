"""What language models say: how a text goes on."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from transformer.data.tokenizers import note_unknown
from transformer.data.tokenizers.chat import Messages, chat_ids
from transformer.generation.beams import BeamConfig, beam_config, beam_search
from transformer.generation.generate import Generator, stream
from transformer.generation.sampling import GREEDY, SamplingConfig
from transformer.generation.text import stream_text
from transformer.objective import Trained
from transformer.objectives.bases import TokenObjective, read_whole, refuse_target
from transformer.tokenizer import drawable, prompt_ids, stop_ids
from transformer.types import Reading
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
        beams: BeamConfig | None = None,
    ) -> Iterator[str]:
        """The prompt as the model reads it, and how it goes on; with beams, of each continuation."""
        tokens = prompt_ids(run.tokenizer, prompt)
        if beams:
            length, ids = self._room(run, tokens, max_new_tokens, note), _ids(run)
            how = {"max_new_tokens": length, **ids, **dataclasses.asdict(beams)}
            found = beam_search(run.model, run.params, [tokens], **how).best(0)
            return iter(["\n".join(run.tokenizer.decode([*tokens, *best]) for best, _ in found)])
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
        length = self._room(run, tokens, max_new_tokens, note)
        options: Any = {"max_new_tokens": length, "sampling": sampling, "seed": seed, **_ids(run)}
        return stream(run.model, run.params, tokens, **options)

    def _room(self, run: Trained, tokens: list[int], max_new_tokens: int, note: Callable[[str], None]) -> int:
        """How many tokens to add at most; a note says what of those read is unknown."""
        tokenizer = run.tokenizer
        room = run.config.model.max_length - len(tokens)
        require(
            0 <= max_new_tokens <= room and room > 0,
            f"A prompt of {len(tokens)} tokens (with the one that starts a document) leaves room for {max(room, 0)} of the "
            f"model's {run.config.model.max_length}, max_new_tokens is {max_new_tokens}; shorten the prompt or ask for fewer.",
        )
        note_unknown(tokenizer, tokens, note)
        return max_new_tokens or room

    def predict(
        self,
        run: Trained,
        texts: Sequence[str],
        names: Sequence[str],
        batch_size: int,
        max_new_tokens: int = 64,
        beams: int = 0,
        length_penalty: float = 1.0,
        num_best: int = 1,
    ) -> Iterator[dict[str, Any]]:
        """The most likely `continuation`; with beams its `score` too, and `continuation_2`, `score_2` and so on."""
        search = beam_config(beams, length_penalty, num_best)
        return continuations(run, texts, names, batch_size, max_new_tokens, search)

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """The text as a prompt."""
        refuse_target(self, target)
        ids_T = read_whole(np.array(prompt_ids(run.tokenizer, text)), run.config.model.max_length)
        return Reading({"decoder": ids_T}, (ids_T[None],), predicts="next token", of="decoder")

    def next_command(self, prompt: str) -> tuple[str, ...]:
        """Continue a text."""
        return ("generate", "--prompt", prompt or "Once upon a time")


def continuations(
    run: Trained,
    texts: Sequence[str],
    names: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    beams: BeamConfig | None = None,
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
        said: list[dict[str, Any]] = [{}] * len(part)
        budgets = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
        shortest_first = sorted(range(len(part)), key=lambda index, prompts=prompts: len(prompts[index]))
        for count, of_budget in itertools.groupby(shortest_first, budgets.__getitem__):
            group = list(of_budget)
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                chosen = [prompts[index] for index in batch]
                for index, found in zip(batch, _most_likely(run, generator, chosen, count, beams), strict=True):
                    texts_R = [_behind(run.tokenizer, prompts[index], tokens) for tokens, _ in found]
                    said[index] = beam_columns("continuation", texts_R, [score for _, score in found], beams)
        yield from said


def _ids(run: Trained) -> dict[str, Any]:
    """Where a text ends, and what may be drawn."""
    allowed = drawable(run.tokenizer, run.config.model.vocab_size)
    return {"end_of_text": stop_ids(run.tokenizer), "drawable": allowed}


def _most_likely(
    run: Trained, generator: Generator, prompts: list[np.ndarray], count: int, beams: BeamConfig | None
) -> list[list[tuple[np.ndarray, float]]]:
    """Tokens and score of the best continuations of each prompt; without beams, those of greedy decoding."""
    options: Any = {"max_new_tokens": count, **_ids(run)}
    if beams:
        found = beam_search(run.model, run.params, prompts, **options, **dataclasses.asdict(beams))
        return [found.best(row) for row in range(len(prompts))]
    generated = generator.generate(prompts, sampling=GREEDY, **options)
    return [[(row[:length], 0.0)] for row, length in zip(generated.tokens, generated.lengths, strict=True)]


def beam_columns(name: str, texts: Sequence[str], scores: Sequence[float], beams: BeamConfig | None) -> dict[str, Any]:
    """Columns of the best texts, with scores where there are beams; None where there are fewer than were asked for.

    >>> beam_columns("translation", ["a"], [-0.5], BeamConfig(num_beams=2, num_return=2))
    {'translation': 'a', 'score': -0.5, 'translation_2': None, 'score_2': None}
    """
    if beams is None:
        return {name: texts[0]}
    missing = [None] * (beams.num_return - len(texts))
    return {
        f"{column}_{rank}".removesuffix("_1"): value
        for rank, pair in enumerate(zip([*texts, *missing], [*scores, *missing], strict=True), 1)
        for column, value in zip((name, "score"), pair, strict=True)
    }


def _behind(tokenizer: Any, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """The text of tokens as it stands behind their prompt: a word, or the rest of one."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens)
