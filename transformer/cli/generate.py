"""`transformer generate DIR --prompt TEXT`: continue or translate prompts with a run's model."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from etils import epath

from transformer.cli.reading import Given, refuse
from transformer.cli.rows import write_rows
from transformer.cli.session import Conversation, hold_session, write
from transformer.cli.using import GenerateOptions
from transformer.data.files import decode_text, decode_utf8, read_file
from transformer.data.forms.examples import text_field
from transformer.data.registry import find_rows, find_source
from transformer.data.sources.files import TextFile
from transformer.data.tokenizers.chat import chat_ids
from transformer.generation.beams import beam_config
from transformer.generation.sampling import SamplingConfig
from transformer.objectives.continuation import ranked_columns
from transformer.runs.saved import Loaded, load
from transformer.storage import expand, explained
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained
from transformer.types import GeneratedTexts
from transformer.validation import require

_NO_TEXT, _ON_INPUT = "A prompt must be text in UTF-8, ", "standard input"
_BETWEEN = "-" * 15  # a line between texts


@out_of_memory_explained(what="Generating")
def main(options: GenerateOptions, given: Given) -> None:
    """Print the prompt as the model read it and its continuation, character by character; or print a translation.

    Control characters are escaped on a terminal. A file or a pipe gets the text unchanged.
    """
    use_compilation_cache()
    sampling = SamplingConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingConfig)}
    )
    beams = beam_config(options.beams, options.length_penalty, options.num_best)
    _check(options, beams is not None)
    prompts, rows_file = _prompts(options)
    require(not (options.chat and rows_file), "--chat is for one conversation, a file of rows has many; leave one out.")
    run = load(options.workdir, step=options.step, base=options.base, weights=options.weights)
    _check_drawn(run, given, beams is not None, sampling)
    how = (options.max_new_tokens, sampling)
    extra: dict[str, Any] = {"beams": beams} if beams else {}
    if not beams:
        draft = load(options.draft, weights=options.weights) if options.draft else None
        generator = run.config.objective.make_generator(run, draft, options.draft_tokens)
        extra = {} if generator is None else {"generator": generator}
        extra |= {"stop": options.stop} if options.stop else {}
    if rows_file:
        _answer_rows(run, rows_file, options, how, extra)
    elif prompts is None:
        _talk(run, options, how, extra)
    elif len(prompts) == options.num_samples == 1:
        (prompt,) = prompts
        if options.chat:
            messages = [*_system(options), _message(prompt)]
            pieces = run.config.objective.reply(run, messages, *how, options.seed, _note, **extra)
        else:
            pieces = run.config.objective.generate(run, prompt, *how, options.seed, _note, **extra)
        write(itertools.chain(pieces, "\n"))
    else:
        for number, said in enumerate(_all(run, prompts, options, how, extra)):
            for sample, text in enumerate(said.texts):
                write([f"{_BETWEEN}\n" * (number + sample > 0), said.prompt, text, "\n"])


# ---- Prompts -----------------------------------------------------------------------------------------------------------


def _prompts(options: GenerateOptions) -> tuple[Sequence[str] | None, str]:
    """The given or piped prompts, or None for prompts from the keyboard; and the name of a file of rows, or an empty text."""
    if options.prompt:
        return [_text(prompt, "--prompt") for prompt in options.prompt], ""
    if options.prompt_file:
        name, path = options.prompt_file, epath.Path(expand(options.prompt_file))
        require(path.is_file(), f"--prompt-file must be a file, {name!r} is none.")
        if not isinstance(find_source(name), TextFile):
            return (), name
        with explained(name):
            return [decode_text(read_file(path), name).removesuffix("\n")], ""
    return (None if sys.stdin is not None and sys.stdin.isatty() else [_piped()]), ""


def _piped() -> str:
    """Standard input without its last newline."""
    if sys.stdin is None:
        return ""
    try:
        return _text(sys.stdin.read(), _ON_INPUT).removesuffix("\n")
    except UnicodeDecodeError as error:
        return decode_utf8(error.object, _NO_TEXT + _ON_INPUT)


def _text(prompt: str, name: str) -> str:
    """The prompt, or UserError if it has surrogates, which Python puts for bytes that are not UTF-8."""
    return decode_utf8(prompt.encode("utf-8", "surrogateescape"), _NO_TEXT + name)


def _system(options: GenerateOptions) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": _text(options.system, "--system")}]


def _message(prompt: str) -> dict[str, str]:
    require(prompt.strip() != "", "A message to reply to must not be blank; give --prompt, or pipe it in.")
    return {"role": "user", "content": prompt}


# ---- Answers -----------------------------------------------------------------------------------------------------------

How = tuple[int, SamplingConfig]


def _all(
    run: Loaded, prompts: Sequence[str], options: GenerateOptions, how: How, extra: dict[str, Any]
) -> Iterator[GeneratedTexts]:
    """The continuations of several prompts."""
    extra = extra | ({"num_samples": options.num_samples} if options.num_samples > 1 else {})
    size = run.config.data.batch_size
    return run.config.objective.generate_all(run, prompts, size, *how, options.seed, _note, **extra)


def _answer_rows(run: Loaded, name: str, options: GenerateOptions, how: How, extra: dict[str, Any]) -> None:
    """Print each row of a file, with a column for each continuation."""
    key = getattr(run.config.data, run.config.objective.predicts_from)
    rows = list(find_rows(name, (key,), "prompts"))
    require(len(rows) > 0, f"There must be something to generate from, {name} has no rows.")
    prompts = [text_field(row, key, location) for location, row in rows]
    found = (ranked_columns("continuation", said.texts, [], None) for said in _all(run, prompts, options, how, extra))
    write_rows(rows, found, "", "generating")


def _talk(run: Loaded, options: GenerateOptions, how: How, extra: dict[str, Any]) -> None:
    """Hold a session of typed prompts, or a conversation."""
    require(options.num_samples == 1, "--num-samples is for given prompts; add --prompt, or leave it out.")
    note = functools.cache(_note)  # prints each note once
    if options.chat:
        # A refusal comes before the first message.
        chat_ids(run.tokenizer, [*_system(options), _message("Hello")], reply=True)
        hold_session(Conversation(run, _system(options), how, options.seed, extra, note).answer, "message", _note)
        return

    def answer(text: str, turn: int) -> Generator[str]:
        yield from run.config.objective.generate(run, text, *how, options.seed + turn, note, **extra)

    hold_session(answer, "prompt", _note)


# ---- Flags that contradict each other ----------------------------------------------------------------------------------


def _check(options: GenerateOptions, beams: bool) -> None:
    require(
        options.system is None or options.chat,
        "--system is for a conversation; give --chat too, or leave it out.",
    )
    require(not (beams and options.chat), "--beams is for a text, not for a conversation; leave it or --chat out.")
    require(options.num_samples >= 1, f"--num-samples must be at least 1, got {options.num_samples}.")
    require(
        not options.chat or (options.num_samples == 1 and len(options.prompt) <= 1),
        "--chat is a conversation of one prompt after the other; leave it, or --num-samples and further prompts, out.",
    )
    require(
        not (options.prompt and options.prompt_file), "Prompts are given or read from a file; leave one of them out."
    )
    require(options.draft_tokens >= 1, f"--draft-tokens must be at least 1, got {options.draft_tokens}.")
    require(all(options.stop), "--stop must be a text, got an empty one; leave it out.")


def _check_drawn(run: Loaded, given: Given, beams: bool, sampling: SamplingConfig) -> None:
    """Refuse flags without a meaning for this run."""
    objective = run.config.objective
    sampled = {name: given[name] for name in ("stop", "draft", "draft_tokens") if name in given}
    if beams:
        _refuse_unused(given, "beam search draws nothing")
        penalty = {name: given[name] for name in ("repetition_penalty",) if given.get(name, 1.0) != 1}
        refuse(penalty | sampled, lambda name: "is not for beam search; leave it or --beams out.")
    elif why := objective.draws_nothing or ("the most likely token is taken each time" if sampling.greedy else ""):
        _refuse_unused(given, why)
    if objective.draws_nothing:
        refuse(sampled, lambda name: "is for language models; leave it out.")


def _refuse_unused(given: Given, because: str) -> None:
    """Refuse sampling flags of a run that does not sample, unless their values mean no sampling."""
    fine = {"temperature": (0.0,), "top_k": (0, 1), "top_p": (1.0,), "min_p": (0.0,), "num_samples": (1,), "seed": ()}
    if given.get("top_k") == 1:
        fine["temperature"] = (given.get("temperature"),)
    unused = {name: given[name] for name in fine if name in given and given[name] not in fine[name]}
    refuse(unused, lambda name: f"{given[name]} means nothing here: {because}; leave it out.")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
