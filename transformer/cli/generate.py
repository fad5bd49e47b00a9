"""`transformer generate DIR --prompt TEXT`: continue a prompt with a run's model as it comes, or translate it."""

import dataclasses
import itertools
import sys

from transformer.cli.reading import Given, refuse
from transformer.cli.using import GenerateOptions
from transformer.data.files import decode_utf8
from transformer.generation.beams import beam_config
from transformer.generation.sampling import SamplingConfig
from transformer.runs.saved import load
from transformer.terminal import printable
from transformer.training.out_of_memory import explained
from transformer.validation import require

_NO_TEXT, _ON_INPUT = "A prompt must be text in UTF-8, ", "that on standard input"


@explained(what="Generating")
def main(options: GenerateOptions, given: Given) -> None:
    """Print the prompt as the model read it and its continuation, a character as soon as it is whole; or a translation.

    A terminal is shown nothing that it would obey; a file or a pipe gets the text as it is.
    """
    sampling = SamplingConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingConfig)}
    )
    prompt = _text(options.prompt, "--prompt") if options.prompt is not None else _piped()
    require(
        options.system is None or options.chat,
        "--system is a message of a conversation; give --chat too, or leave it out.",
    )
    beams = beam_config(options.beams, options.length_penalty, options.num_best)
    require(not (beams and options.chat), "--beams is for a text, not for a conversation; leave it or --chat out.")
    run = load(options.workdir, step=options.step, base=options.base, weights=options.weights)
    objective = run.config.objective
    if beams:
        _refuse_unused(given, "beam search draws nothing")
        penalty = {name: given[name] for name in ("repetition_penalty",) if given.get(name, 1.0) != 1}
        refuse(penalty, lambda name: "is not for beam search; leave it or --beams out.")
    elif why := objective.draws_nothing or ("the most likely token is taken each time" if sampling.greedy else ""):
        _refuse_unused(given, why)
    how = (options.max_new_tokens, sampling, options.seed, _note)
    if options.chat:
        pieces = objective.reply(run, _messages(prompt, options.system), *how)
    else:
        pieces = objective.generate(run, prompt, *how, **({"beams": beams} if beams else {}))
    for piece in itertools.chain(pieces, "\n"):
        sys.stdout.write(printable(piece, lines=True) if sys.stdout.isatty() else piece)
        sys.stdout.flush()


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    """A conversation of a user's message, and perhaps one of the system before it."""
    require(prompt.strip() != "", "A message to reply to must not be blank; give --prompt, or pipe it in.")
    before = [] if system is None else [{"role": "system", "content": _text(system, "--system")}]
    return [*before, {"role": "user", "content": prompt}]


def _piped() -> str:
    """What is piped in, without its last newline; nothing where a person sits at the keyboard."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return _text(sys.stdin.read(), _ON_INPUT).removesuffix("\n")
    except UnicodeDecodeError as error:
        return decode_utf8(error.object, _NO_TEXT + _ON_INPUT)


def _text(prompt: str, name: str) -> str:
    """A prompt; one with bytes that are no UTF-8, for which Python puts surrogates, is refused."""
    return decode_utf8(prompt.encode("utf-8", "surrogateescape"), _NO_TEXT + name)


def _refuse_unused(given: Given, because: str) -> None:
    """Where nothing is drawn: refuse flags that say how to draw, and take those that say that nothing is drawn."""
    fine = {"temperature": (0.0,), "top_k": (0, 1), "top_p": (1.0,), "min_p": (0.0,), "seed": ()}
    if given.get("top_k") == 1:
        fine["temperature"] = (given.get("temperature"),)
    unused = {name: given[name] for name in fine if name in given and given[name] not in fine[name]}
    refuse(unused, lambda name: f"{given[name]} means nothing here: {because}; leave it out.")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
