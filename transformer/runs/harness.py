"""A run's language model as EleutherAI's lm-eval takes it (the extra `lm-eval`), and its scores on tasks."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.generation.generate import Generator
from transformer.generation.likelihood import Query, TokenScores, next_token_scores
from transformer.generation.sampling import SamplingConfig
from transformer.generation.text import generate_texts
from transformer.objectives.continuation import generated_ids
from transformer.runs.saved import Loaded
from transformer.tokenizer import document_start, prompt_ids, stop_ids
from transformer.validation import require, require_installed

try:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
except ImportError as missing:
    if (missing.name or "").partition(".")[0] == "lm_eval":
        require_installed(None, "lm-eval", "lm-eval")
    raise

_NEW_TOKENS = 256  # of a task that says nothing, as lm-eval's other models have it
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLED = ("top_k", "top_p", "min_p")


class HarnessModel(TemplateLM):
    """A run's language model, for `lm_eval.simple_evaluate` and the tasks of lm-eval.

    A context and its continuation are tokenized as lm-eval does it for models of Hugging Face (`TemplateLM`), and a context that
    is too long is cut on the left.

    Args:
        run: of an objective whose model continues a text; trained here or pretrained.
        batch_size: rows that are computed together; rows of similar length share a batch, and 0 means as in training.

    Raises:
        UserError: the run's model does not continue a text.

    Example:
        `lm_eval.simple_evaluate(HarnessModel(load("runs/mine")), tasks=["lambada_openai"])`
    """

    def __init__(self, run: Loaded, *, batch_size: int = 0) -> None:
        super().__init__()
        objective = run.config.objective
        require(
            objective.continues_text and not run.own_model,
            f"lm-eval's tasks are for the package's language models, this run's model is {type(run.model).__name__}, its "
            f"objective {objective.kind}; use `transformer evaluate` without --tasks, or score.",
        )
        require(batch_size >= 0, f"batch_size must be at least 0, got {batch_size}.")
        self._run = dataclasses.replace(run, params=jax.tree.map(jnp.asarray, run.params))
        self.batch_size = batch_size or run.config.data.batch_size
        self.max_length = run.config.model.max_length
        self._generator = Generator(self._run.model, self._run.params, self._run.place)

    # ---- Tokens --------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return stop_ids(self._run.tokenizer)[0]

    @property
    def prefix_token_id(self) -> int:
        """The id before each document, which also replaces an empty context."""
        return document_start(self._run.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: object) -> list[int]:
        """Ids of a text, after the ids that begin a prompt unless `add_special_tokens` is False."""
        del others
        tokenizer = self._run.tokenizer
        return tokenizer.encode(string).tolist() if add_special_tokens is False else prompt_ids(tokenizer, string)

    # ---- Likelihoods ---------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation in nats, and whether each of its tokens was the most likely one."""
        del disable_tqdm, others
        found = []
        queries = [Query(np.array(context), np.array(continuation)) for _, context, continuation in requests]
        for (texts, _, continuation), query in zip(requests, queries, strict=True):
            require(
                len(continuation) > 0 and len(query.context) > 0,
                f"A continuation of a task must have a token of its own, got {texts!r:.200}.",
            )
        for (texts, _, _), scores in zip(requests, self._scores(queries), strict=True):
            answer = float(scores.log_probabilities.sum(dtype=np.float64)), bool(scores.most_likely.all())
            self.cache_hook.add_partial("loglikelihood", texts, answer)
            found.append(answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text in nats.

        A text longer than the model's length is scored in windows that do not overlap. Each window begins with the last token of
        the previous one, and the last window is full (`lm_eval.utils.get_rolling_token_windows` with one token of context).
        """
        del disable_tqdm
        found = []
        texts = [request.args[0] for request in requests]
        start = np.array([self.prefix_token_id])
        queries = [Query(start, np.array(self.tok_encode(text, False), np.int32)) for text in texts]
        scores = self._scores([query for query in queries if len(query.tokens)])
        for text, query in zip(texts, queries, strict=True):
            answer = float(next(scores).log_probabilities.sum(dtype=np.float64)) if len(query.tokens) else 0.0
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
            found.append(answer)
        return found

    def _scores(self, queries: Sequence[Query]) -> Iterator[TokenScores]:
        """Scores with a stride of the model's length: a continuation that fits has one window, filled with context."""
        return next_token_scores(self._run, queries, batch_size=self.batch_size, stride=self.max_length)

    # ---- Generation ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first text in `until`, the end of the text, or `max_gen_toks` tokens.

        If a context is too long for that many tokens, it is cut on the left, down to half of the model's length. If it is still
        too long, the answer is shorter. Sampling is used only if a task requests it; the seed is 0.
        """
        del disable_tqdm
        found = [""] * len(requests)
        groups: dict[_How, dict[int, list[int]]] = {}
        for index, (context, kwargs) in enumerate(request.args for request in requests):
            how, tokens = _how(kwargs), self.tok_encode(context)
            tokens = tokens[-max(self.max_length - how.tokens, self.max_length // 2, 1) :]
            how = how._replace(tokens=min(how.tokens, self.max_length - len(tokens)))
            groups.setdefault(how, {})[index] = tokens
        for how, prompts in groups.items():
            order = sorted(prompts, key=lambda index, prompts=prompts: len(prompts[index]))
            for first in range(0, len(order), self.batch_size):
                batch = {index: prompts[index] for index in order[first : first + self.batch_size]}
                texts = generate_texts(
                    self._generator,
                    self._run.tokenizer.decode,
                    list(batch.values()),
                    limits=[how.tokens] * len(batch),
                    stop=how.until,
                    sampling=how.sampling,
                    row_numbers=list(batch),
                    **generated_ids(self._run),
                )
                for index, text in zip(batch, texts, strict=True):
                    found[index] = text
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


class _How(NamedTuple):
    """Settings of a continuation."""

    tokens: int
    """Most new tokens."""
    until: tuple[str, ...]
    sampling: SamplingConfig


def _how(kwargs: Mapping[str, Any]) -> _How:
    """A task's settings of generation, from lm-eval's names.

    Raises:
        UserError: an unknown name or an invalid value.
    """
    until = kwargs.get("until") or ()
    limits = [kwargs[name] for name in _LIMITS if kwargs.get(name) is not None]
    sampled = {name: kwargs[name] for name in _SAMPLED if kwargs.get(name) is not None}
    penalty = {name: kwargs[name] for name in ("repetition_penalty",) if kwargs.get(name) is not None}
    unknown = set(kwargs) - {"until", *_LIMITS, *penalty, "do_sample", "temperature", *_SAMPLED}
    require(not unknown, f"A task's generation_kwargs must be of those known here, got {', '.join(sorted(unknown))}.")
    temperature = float(kwargs.get("temperature") or 0.0)
    if kwargs.get("do_sample") is False:
        temperature = 0.0
    elif kwargs.get("do_sample") and "temperature" not in kwargs:
        temperature = 1.0
    tokens = int(limits[0]) if limits else _NEW_TOKENS
    require(tokens >= 1, f"A task must ask for at least one new token, got {tokens}.")
    sampling = SamplingConfig(temperature=temperature, **penalty, **(sampled if temperature else {}))
    stops = (until,) if isinstance(until, str) else tuple(until)
    return _How(tokens, tuple(stop for stop in stops if stop), sampling)


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def evaluate_tasks(
    run: Loaded,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] = "",
    num_fewshot: int | None = None,
    limit: int = 0,
    batch_size: int = 0,
) -> dict[str, dict[str, Any]]:
    """Scores of a run's language model on tasks of lm-eval: for each task or group, its metrics by name.

    Args:
        run: as for `HarnessModel`.
        tasks: names of tasks, groups or tags.
        include_path: a folder of your own tasks. A task's YAML may name Python functions, which then run.
        num_fewshot: examples before each question; None means as the task has it.
        limit: score no more than so many examples of each task; 0 means all.
        batch_size: as for `HarnessModel`.

    Raises:
        UserError: there is no such task, or the run's model does not continue a text.
    """
    model = HarnessModel(run, batch_size=batch_size)
    require(not include_path or os.path.isdir(include_path), f"A folder of tasks must be there, {include_path} is not.")
    manager = TaskManager(include_path=os.fspath(include_path) or None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    require(
        not unknown,
        f"A task must be one of lm-eval's or of --include-path's, got {', '.join(unknown)}; `lm-eval ls tasks` lists them.",
    )
    evaluate: Any = simple_evaluate  # its decorator hides its arguments from type checkers
    found = evaluate(
        model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit or None,
        log_samples=False,
    )
    counts = found["n-samples"]
    return {
        task: {
            **({"examples": counts[task]["effective"]} if task in counts else {}),
            **{_metric_name(key): value for key, value in metrics.items() if "," in key and value != "N/A"},
        }
        for task, metrics in {**found["results"], **found.get("groups", {})}.items()
    }


def _metric_name(key: str) -> str:
    """`acc` for lm-eval's `acc,none`; `exact_match (strict)` where answers pass a filter.

    >>> _metric_name("acc_norm,none"), _metric_name("exact_match_stderr,strict")
    ('acc_norm', 'exact_match_stderr (strict)')
    """
    name, _, filtered = key.partition(",")
    return name if filtered == "none" else f"{name} ({filtered})"
