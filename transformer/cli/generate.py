"""`transformer generate DIR --prompt TEXT`: continue a prompt with a run's model as it comes, or translate it."""

import dataclasses
import sys

import tyro

from transformer.data.example_batches import source_tokens
from transformer.data.tokenizers import source_tokenizer
from transformer.generation.generate import stream
from transformer.generation.sampling import SamplingConfig
from transformer.generation.translate import translate
from transformer.models.decoder import Decoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.runs.saved import load
from transformer.validation import require


@dataclasses.dataclass(frozen=True)
class GenerateArguments:
    """Continue a prompt with a run's language model, or translate it with a run's translator."""

    workdir: tyro.conf.Positional[str]
    """Directory of the run."""
    prompt: str = ""
    """The text to continue; empty starts a new document."""
    max_new_tokens: int = 0
    """Tokens to add at most; 0 means as many as the model's length has room for."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    seed: int = 0
    """The same seed gives the same text."""


def main(arguments: list[str]) -> None:
    """Print the prompt and its continuation, a character as soon as it is whole."""
    options = tyro.cli(GenerateArguments, prog="transformer generate", args=arguments)
    sampling = SamplingConfig(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    model, params, tokenizer, config, _ = load(options.workdir)
    if isinstance(model, EncoderDecoder):
        require(
            sampling == SamplingConfig(),
            "A translator takes the most likely token each time; leave out --temperature, --top-k and --top-p.",
        )
        source = source_tokens(source_tokenizer(tokenizer), options.prompt, config.data)
        room = config.data.sequence_length
        length = options.max_new_tokens or room
        require(0 < length <= room, f"--max-new-tokens must be at most the model's {room}, got {length}.")
        (target,) = translate(model, params, [source], end_of_text=tokenizer.end_of_text, max_new_tokens=length)
        print(tokenizer.decode(target))
        return
    require(
        isinstance(model, Decoder),
        f"A run that generates must be a language model or a translator, {options.workdir} is one of "
        f"{config.objective.kind}; `transformer evaluate` scores it.",
    )
    prompt = [tokenizer.end_of_text, *tokenizer.encode(options.prompt).tolist()]
    room = config.model.max_length - len(prompt)
    require(
        0 <= options.max_new_tokens <= room and room > 0,
        f"A prompt of {len(prompt)} tokens (with the one that starts a document) leaves room for {max(room, 0)} of the "
        f"model's {config.model.max_length}, --max-new-tokens is {options.max_new_tokens}; shorten the prompt or ask for fewer.",
    )
    sys.stdout.write(options.prompt)
    ids: list[int] = []
    written = ""
    for token in stream(
        model,
        params,
        prompt,
        max_new_tokens=options.max_new_tokens or room,
        sampling=sampling,
        seed=options.seed,
        end_of_text=tokenizer.end_of_text,
    ):
        if token == tokenizer.end_of_text:
            break
        ids.append(token)
        # The last character may still lack bytes: it is shown as U+FFFD until they come.
        text = tokenizer.decode(ids)
        whole = text.rstrip("�")
        sys.stdout.write(whole[len(written) :])
        sys.stdout.flush()
        written = whole
    sys.stdout.write(tokenizer.decode(ids)[len(written) :] + "\n")
