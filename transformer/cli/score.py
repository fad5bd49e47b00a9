"""`transformer score RUN INPUT`: score each text of a file, or each of several choices, by its log-probability."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from transformer.cli.reading import Given
from transformer.cli.row_options import ScoreOptions
from transformer.cli.rows import check_files, load_on_all_devices, read_rows, write_rows
from transformer.data.forms.examples import field, text_field
from transformer.generation.likelihood import Scored
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained
from transformer.types import UserError
from transformer.validation import counted, require, shown


@out_of_memory_explained(what="Scoring")
def main(options: ScoreOptions, given: Given) -> None:
    """Read all rows, then score, and write each as soon as it is ready; a summary follows at the end."""
    use_compilation_cache()
    check_files(options, "score")
    run, batch_size = load_on_all_devices(options)
    objective, data = run.config.objective, run.config.data
    prompt_key, text_key = (
        given_key or getattr(data, key)
        for given_key, key in zip((options.prompt_key, options.text_key), objective.scored_keys, strict=True)
    )
    required = {"prompt_key": prompt_key, "text_key": text_key}
    keys = options.choices_key or (text_key, *(value for name, value in required.items() if name in given))
    name, rows = read_rows(options, tuple(dict.fromkeys(keys)), "score")
    if options.choices_key:
        prompts = [_optional(row, text_key, location, "text_key" in given) for location, row in rows]
        choices = [_choices(row, options.choices_key, location) for location, row in rows]
        answers = [
            _answer(row, options.answer_key, location, of) for (location, row), of in zip(rows, choices, strict=True)
        ]
        pairs = [(prompt, choice) for prompt, of_row in zip(prompts, choices, strict=True) for choice in of_row]
        names = [
            f"choice {number} of {location}"
            for (location, _), of in zip(rows, choices, strict=True)
            for number in range(len(of))
        ]
        totals: Any = _Chosen()
        scores = run.scores(pairs, names=names, batch_size=batch_size, stride=options.stride)
        found = totals.columns(scores, choices, answers)
    else:
        pairs = [
            (_optional(row, prompt_key, location, "prompt_key" in given), text_field(row, text_key, location))
            for location, row in rows
        ]
        totals = _Summed()
        scores = run.scores(
            pairs, names=[location for location, _ in rows], batch_size=batch_size, stride=options.stride
        )
        found = totals.columns(scores, run.tokenizer if options.per_token else None)
    write_rows(rows, found, options.output, "scoring")
    say(make_console(), f"{counted(len(rows), 'text')} of {name} scored with {options.workdir}: {totals.describe()}")
    if options.output:
        print(json.dumps(totals.scores()))


class _Summed:
    """Columns of single texts, and the totals of all texts."""

    def __init__(self) -> None:
        self.log_probability, self.tokens, self.bytes, self.texts = 0.0, 0, 0, 0

    def columns(self, scores: Iterator[Scored], tokenizer: Any) -> Iterator[dict[str, Any]]:
        """The columns of each text."""
        for scored in scores:
            self.log_probability += scored.log_probability
            self.tokens, self.bytes = self.tokens + len(scored.tokens), self.bytes + scored.num_bytes
            self.texts += 1
            found = {
                "log_probability": scored.log_probability,
                "num_tokens": len(scored.tokens),
                "perplexity": scored.perplexity,
                "bits_per_byte": scored.bits_per_byte,
            }
            if tokenizer is not None:
                found["tokens"] = [tokenizer.decode([token]) for token in scored.tokens]
                found["log_probabilities"] = [float(f"{value:.7g}") for value in scored.log_probabilities]
            yield found

    def scores(self) -> dict[str, float]:
        """The scores of all texts together."""
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "log_probability": self.log_probability,
            "perplexity": math.exp(min(-self.log_probability / self.tokens, 700.0)),
            "bits_per_byte": -self.log_probability / math.log(2) / self.bytes,
        }

    def describe(self) -> str:
        """The scores as one line of text."""
        scores = self.scores()
        return f"perplexity {scores['perplexity']:.4g} a token, {scores['bits_per_byte']:.4g} bits per byte"


class _Chosen:
    """Columns of rows with choices, and how often each choice was the most likely."""

    def __init__(self) -> None:
        self.hits, self.hits_per_byte, self.answered, self.rows = 0, 0, 0, 0
        self.counts: dict[int, int] = {}

    def columns(
        self, scores: Iterator[Scored], choices: Sequence[Sequence[str]], answers: Sequence[int | None]
    ) -> Iterator[dict[str, Any]]:
        """The columns of each row: the most likely choice, from 0, by log-probability in total and per byte."""
        for of_row, answer in zip(choices, answers, strict=True):
            found = [next(scores) for _ in of_row]
            whole = [scored.log_probability for scored in found]
            best = int(np.argmax(whole))
            per_byte = int(np.argmin([scored.bits_per_byte for scored in found]))
            self.rows, self.counts[best] = self.rows + 1, self.counts.get(best, 0) + 1
            if answer is not None:
                self.answered += 1
                self.hits, self.hits_per_byte = self.hits + (best == answer), self.hits_per_byte + (per_byte == answer)
            yield {"choice": best, "choice_per_byte": per_byte, "log_probabilities": whole}

    def scores(self) -> dict[str, Any]:
        """The scores of all rows together."""
        if self.answered:
            shares = {"accuracy": self.hits / self.answered, "accuracy_per_byte": self.hits_per_byte / self.answered}
        else:
            shares = {"chosen": {str(choice): self.counts[choice] / self.rows for choice in sorted(self.counts)}}
        return {"rows": self.rows, **shares}

    def describe(self) -> str:
        """The scores as one line of text."""
        scores = self.scores()
        if self.answered:
            return f"accuracy {scores['accuracy']:.4g}, by bytes {scores['accuracy_per_byte']:.4g}"
        return ", ".join(f"choice {choice} in {share:.1%}" for choice, share in scores["chosen"].items())


def _optional(row: dict[str, Any], key: str, location: str, needed: bool) -> str:
    """The text of a field, which a row may lack."""
    return text_field(row, key, location) if needed or row.get(key) is not None else ""


def _choices(row: dict[str, Any], keys: Sequence[str], location: str) -> list[str]:
    choices: list[Any] = []
    for key in keys:
        value = field(row, key, location)
        choices += [value] if isinstance(value, str) else value if isinstance(value, list) else [None]
    require(
        len(choices) >= 2 and all(isinstance(choice, str) and choice for choice in choices),
        f"Each row must have two choices or more, all of them text that is not empty, {location} has {shown(choices)} in "
        f"{' and '.join(map(repr, keys))}.",
    )
    return choices


def _answer(row: dict[str, Any], key: str, location: str, choices: Sequence[str]) -> int | None:
    if not key:
        return None
    value = field(row, key, location)
    if value in choices:
        return choices.index(value)
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if not 0 <= number < len(choices):
        raise UserError(
            f"The right choice must be one of the {len(choices)} choices, by its number from 0 or by its text, {location} has "
            f"{value!r:.80} in {key!r}."
        )
    return number
