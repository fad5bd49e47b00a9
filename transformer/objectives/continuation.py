"""Text continuation and scores, shared by the objectives of language models."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from transformer.data.tokenizers import note_unknown
from transformer.data.tokenizers.chat import Messages, chat_ids
from transformer.generation.beams import BeamConfig, beam_config, beam_search
from transformer.generation.generate import Generator
from transformer.generation.likelihood import Query, next_token_scores
from transformer.generation.sampling import SamplingConfig
from transformer.generation.speculative import SpeculativeGenerator
from transformer.generation.text import continuation_text, generate_texts, stream_text
from transformer.generation.window import num_dropped
from transformer.objectives.bases import TokenObjective, read_whole, refuse_target
from transformer.tokenizer import drawable, prompt_ids, stop_ids
from transformer.trained import Trained
from transformer.types import GeneratedTexts, Reading
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.data.tokenizers import Tokenizer

_BATCHES_AT_ONCE = 8  # texts are sorted by length within this many batches


@dataclasses.dataclass(frozen=True)
class ContinuesText(TokenObjective):
    """An objective whose model can continue a text."""

    continues_text = True
    settings = ("training.sample_every", "training.sample_prompt", "training.sample_length")

    def make_generator(self, run: Trained, draft: Trained | None = None, draft_tokens: int = 4) -> Generator:
        """The generator of the run; with a draft, for speculative decoding."""
        if draft is None:
            return Generator(run.model, run.params, run.place, keep_first=_keep_first(run))
        require(
            draft.config.objective.continues_text and not getattr(draft.model, "bidirectional_prefix", True),
            f"A draft must be a language model of the objective next_token, got a run of {draft.config.objective.kind}.",
        )
        _check_same_vocabulary(run.tokenizer, draft.tokenizer)
        models = (run.model, run.params, draft.model, draft.params)
        return SpeculativeGenerator(*models, draft_tokens=draft_tokens, place=run.place, keep_first=_keep_first(run))

    def generate(
        self,
        run: Trained,
        prompt: str,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        note: Callable[[str], None],
        beams: BeamConfig | None = None,
        stop: Sequence[str] = (),
        generator: Generator | None = None,
    ) -> Iterator[str]:
        """The prompt as encoded, then its continuation; with beams, each continuation."""
        tokens = prompt_ids(run.tokenizer, prompt)
        if beams:
            length, ids = _room(run, tokens, max_new_tokens, note), generated_ids(run)
            how = {"max_new_tokens": length, **ids, **dataclasses.asdict(beams)}
            found = beam_search(run.model, run.params, [tokens], **how).best(0)
            return iter(["\n".join(run.tokenizer.decode([*tokens, *best]) for best, _ in found)])
        generated = self._follow(run, tokens, max_new_tokens, sampling, seed, note, generator)
        return stream_text(run.tokenizer.decode, tokens, generated, stop)

    def generate_all(
        self,
        run: Trained,
        prompts: Sequence[str],
        batch_size: int,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        note: Callable[[str], None],
        *,
        num_samples: int = 1,
        beams: BeamConfig | None = None,
        stop: Sequence[str] = (),
        generator: Generator | None = None,
    ) -> Iterator[GeneratedTexts]:
        """Continuations of each prompt; a note of a prompt follows its number."""
        if beams:
            yield from super().generate_all(run, prompts, batch_size, max_new_tokens, sampling, seed, note, beams=beams)
            return
        ids, limits, decode = [prompt_ids(run.tokenizer, prompt) for prompt in prompts], [], run.tokenizer.decode
        for number, tokens in enumerate(ids, 1):
            name = f"prompt {number}: " if len(prompts) > 1 else ""
            limits.append(_room(run, tokens, max_new_tokens, lambda text, name=name: note(name + text), rolling=True))
        rows = [(number, sample) for number in range(len(ids)) for sample in range(num_samples)]
        generator = generator or self.make_generator(run)
        said: list[str] = []
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            texts = generate_texts(
                generator,
                decode,
                [ids[number] for number, _ in batch],
                limits=[limits[number] for number, _ in batch],
                stop=stop,
                sampling=sampling,
                seed=seed,
                row_numbers=[row_number(number, sample) for number, sample in batch],
                **generated_ids(run),
            )
            for (number, _), text in zip(batch, texts, strict=True):
                said.append(text)
                if len(said) == num_samples:
                    yield GeneratedTexts(decode(ids[number]), tuple(said))
                    said = []

    def reply(
        self,
        run: Trained,
        messages: Messages,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        note: Callable[[str], None],
        stop: Sequence[str] = (),
        generator: Generator | None = None,
    ) -> Iterator[str]:
        """The next message of a conversation, formatted by the chat template of the model's tokenizer."""
        tokens = chat_ids(run.tokenizer, messages, reply=True).tolist()
        generated = self._follow(run, tokens, max_new_tokens, sampling, seed, note, generator)
        return stream_text(run.tokenizer.decode, (), generated, stop)

    def _follow(
        self,
        run: Trained,
        tokens: list[int],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        note: Callable[[str], None],
        generator: Generator | None,
    ) -> Iterator[int]:
        """The generated tokens, one at a time."""
        length = _room(run, tokens, max_new_tokens, note, rolling=True)
        generator = generator or self.make_generator(run)
        return generator.stream(tokens, max_new_tokens=length, sampling=sampling, seed=seed, **generated_ids(run))

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
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_samples: int = 1,
        seed: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """The most likely `continuation`, or a sampled one if the temperature is above 0.

        With `num_samples`, there are also `continuation_2` and so on. With beams, there are `score`, `continuation_2`, `score_2`
        and so on. A sample depends on the seed, the index of the text and its tokens.
        """
        search = beam_config(beams, length_penalty, num_best)
        sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        draws = top_k or top_p < 1 or num_samples > 1 or seed
        require(
            not draws or temperature > 0,
            "top_k, top_p, num_samples and seed are for sampling, got temperature=0, which takes the most likely token each "
            "time; give a temperature, such as 1.",
        )
        require(
            not (search and temperature), "Beam search samples nothing, got a temperature too; leave one of them out."
        )
        require(num_samples >= 1, f"num_samples must be at least 1, got {num_samples}.")
        how = _How(max_new_tokens, search, sampling, num_samples, seed)
        return continuations(run, texts, names, batch_size, how)

    def score(
        self, run: Trained, texts: Sequence[tuple[str, str]], names: Sequence[str], batch_size: int, stride: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-probability of each token, given the previous ones."""
        del names
        queries = [Query(*split_ids(run.tokenizer, prompt, text)) for prompt, text in texts]
        scores = next_token_scores(run, queries, batch_size=batch_size, stride=stride)
        return ((query.tokens, found.log_probabilities) for query, found in zip(queries, scores, strict=True))

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """The text, encoded as a prompt."""
        refuse_target(self, target)
        ids_T = read_whole(np.array(prompt_ids(run.tokenizer, text)), run.config.model.max_length)
        return Reading({"decoder": ids_T}, (ids_T[None],), predicts="next token", of="decoder")

    def next_command(self, prompt: str) -> tuple[str, ...]:
        """Continue a text."""
        return ("generate", "--prompt", prompt or "Once upon a time")


def split_ids(tokenizer: "Tokenizer", prompt: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a prompt, with the special ids before it, and of the text after it, int32.

    They are the ids of prompt and text encoded together. If a token would span both, the two are encoded separately.
    """
    before = prompt_ids(tokenizer, prompt)
    whole = prompt_ids(tokenizer, prompt + text)
    joined = whole[: len(before)] == before
    following = whole[len(before) :] if prompt and joined else tokenizer.encode(text)
    return np.array(before, np.int32), np.asarray(following, np.int32)


class _How(NamedTuple):
    """Settings of the continuation."""

    max_new_tokens: int
    beams: BeamConfig | None
    sampling: SamplingConfig
    num_samples: int
    seed: int


def continuations(
    run: Trained, texts: Sequence[str], names: Sequence[str], batch_size: int, how: _How
) -> Iterator[dict[str, Any]]:
    """The `continuation` of each text: up to `max_new_tokens` tokens, as far as they fit in the model.

    Longer texts, which leave less room, are continued separately: a result does not depend on the other texts.
    """
    require(how.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {how.max_new_tokens}.")
    generator, limit = Generator(run.model, run.params, run.place), run.config.model.max_length
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
        budgets = [min(how.max_new_tokens, limit - len(prompt)) for prompt in prompts]
        shortest_first = sorted(range(len(part)), key=lambda index, prompts=prompts: len(prompts[index]))
        for count, of_budget in itertools.groupby(shortest_first, budgets.__getitem__):
            group = list(of_budget)
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                chosen = {start + index: prompts[index] for index in batch}
                for index, found in zip(batch, _continued(run, generator, chosen, count, how), strict=True):
                    texts_R = [continuation_text(run.tokenizer.decode, prompts[index], tokens) for tokens, _ in found]
                    said[index] = ranked_columns("continuation", texts_R, [score for _, score in found], how.beams)
        yield from said


def _room(
    run: Trained, tokens: list[int], max_new_tokens: int, note: Callable[[str], None], *, rolling: bool = False
) -> int:
    """The number of tokens to add. Notes report unknown tokens, and tokens outside a rolling window."""
    limit = run.config.model.max_length
    room = limit - len(tokens)
    require(max_new_tokens >= 0, f"max_new_tokens must be at least 0 (up to the model's length), got {max_new_tokens}.")
    longer = rolling and max_new_tokens > max(room, 0)
    require(
        longer or (0 <= max_new_tokens <= room and room > 0),
        f"A prompt of {len(tokens)} tokens (with the one that starts a document) leaves room for {max(room, 0)} of the model's "
        f"{limit}, max_new_tokens is {max_new_tokens}; shorten the prompt or "
        f"{'say how many tokens to add (max_new_tokens)' if rolling else 'ask for fewer'}.",
    )
    note_unknown(run.tokenizer, tokens, note)
    if longer:
        note(_what_is_read(len(tokens), limit, _keep_first(run)))
    return max_new_tokens or room


def _what_is_read(prompt: int, limit: int, keep_first: int) -> str:
    """A note on the tokens that a rolling window reads, and its effect on the text."""
    read = prompt - int(num_dropped(np.array([prompt]), limit)[0])
    first = f"the first {keep_first} and " if keep_first else ""
    cut = f"{first}the last {read - keep_first:,} of the prompt's {prompt:,} tokens are read. " if read < prompt else ""
    return (
        f"the model reads {limit:,} tokens at a time, and the text is longer. {cut[:1].upper()}{cut[1:]}Whenever this window is "
        f"full, only {first}the last {limit // 2 - keep_first:,} are kept. The others have no effect any more: names and facts "
        "may change."
    )


def _check_same_vocabulary(tokenizer: Any, other: Any) -> None:
    sizes = tokenizer.vocab_size, other.vocab_size
    first = next((id for id in range(min(sizes)) if tokenizer.decode([id]) != other.decode([id])), None)
    differ = f"{sizes[0]:,} and {sizes[1]:,} tokens" if sizes[0] != sizes[1] else f"others from token {first} on"
    require(
        sizes[0] == sizes[1] and first is None,
        f"A draft must have the model's vocabulary, got {differ}; use a draft that was trained with the model's tokenizer.",
    )


def _keep_first(run: Trained) -> int:
    """Number of tokens that stay in a rolling window: the tokens that an imported tokenizer puts before each text. Rows of
    running text have none, since they begin anywhere."""
    return min(len(getattr(run.tokenizer, "begin", ())), max(0, run.config.model.max_length // 2 - 1))


def generated_ids(run: Trained) -> dict[str, Any]:
    """End-of-text ids, and the ids that may be generated."""
    allowed = drawable(run.tokenizer, run.config.model.vocab_size)
    return {"end_of_text": stop_ids(run.tokenizer), "drawable": allowed}


def _continued(
    run: Trained, generator: Generator, prompts: dict[int, np.ndarray], count: int, how: _How
) -> list[list[tuple[np.ndarray, float]]]:
    """Tokens and score of the continuations of each prompt, by the prompt's index among all texts."""
    options: Any = {"max_new_tokens": count, **generated_ids(run)}
    rows = list(prompts.values())
    if how.beams:
        found = beam_search(run.model, run.params, rows, **options, **dataclasses.asdict(how.beams))
        return [found.best(row) for row in range(len(rows))]
    samples: list[list[tuple[np.ndarray, float]]] = [[] for _ in rows]
    for sample in range(how.num_samples):
        numbers = [row_number(number, sample) for number in prompts]
        generated = generator.generate(rows, sampling=how.sampling, seed=how.seed, row_numbers=numbers, **options)
        for said, row, length in zip(samples, generated.tokens, generated.lengths, strict=True):
            said.append((row[:length], 0.0))
    return samples


def row_number(text: int, sample: int) -> int:
    """The number by which a sample is drawn, whatever the number of samples. The first sample has the number of its text.

    Up to a million texts and two thousand samples, no two have the same.
    """
    return (text + (sample << 20)) % 2**31


def ranked_columns(
    name: str, texts: Sequence[str], scores: Sequence[float], beams: BeamConfig | None
) -> dict[str, Any]:
    """Columns of texts, with scores for beams, and None for missing results.

    >>> ranked_columns("translation", ["a"], [-0.5], BeamConfig(num_beams=2, num_return=2))
    {'translation': 'a', 'score': -0.5, 'translation_2': None, 'score_2': None}
    """
    if beams is None:
        return {f"{name}_{rank}".removesuffix("_1"): text for rank, text in enumerate(texts, 1)}
    missing = [None] * (beams.num_return - len(texts))
    return {
        f"{column}_{rank}".removesuffix("_1"): value
        for rank, pair in enumerate(zip([*texts, *missing], [*scores, *missing], strict=True), 1)
        for column, value in zip((name, "score"), pair, strict=True)
    }
