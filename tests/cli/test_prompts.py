"""Several prompts and samples, texts at which generation ends, files of prompts, a draft, and what a person types."""

import io
import json

import jax
import numpy as np
import pytest

from transformer.cli import generate as command
from transformer.cli.main import main
from transformer.config import Config, DataConfig
from transformer.generation.generate import Generator
from transformer.generation.sampling import GREEDY
from transformer.generation.speculative import SpeculativeGenerator
from transformer.generation.text import stream_text
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.parts import initialize, resolve
from transformer.runs.saved import Loaded
from transformer.tokenizer import TOKENIZERS
from transformer.types import UserError

LINE = "-" * 15


def made(kind="next_token", tokenizer="bytes", layers=1, seed=1, length=24):
    """A run with random parameters."""
    learned = TOKENIZERS.find(tokenizer)().train(["the cat sat on a mat"])
    block = BlockConfig(AttentionConfig(num_heads=2))
    config = Config(
        model=ModelConfig(num_layers=layers, embed_dim=8, pattern=(block,)),
        data=DataConfig(sequence_length=length, batch_size=4),
        objective=OBJECTIVES.find(kind)(),
    )
    config = resolve(config, learned)
    model = config.objective.make_model(config.model)
    shapes, _ = initialize(config.objective, model, None)
    draws = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: draws.standard_normal(x.shape).astype(x.dtype), shapes)
    return Loaded(model, params, learned, config, 1)


RUN = made()


@pytest.fixture
def generate(monkeypatch, capsys):
    def run(*arguments, of=RUN, code=None):
        monkeypatch.setattr(command, "load", lambda name, **_: of if name == "run" else made(**DRAFTS[name]))
        capsys.readouterr()
        if code is None:
            main(["generate", "run", *arguments])
            return capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["generate", "run", *arguments])
        assert ended.value.code == code
        return capsys.readouterr().err

    return run


DRAFTS = {
    "small": {"seed": 4},
    "words": {"tokenizer": "words"},
    "translator": {"kind": "seq2seq"},
    "short": {"length": 12},
}


# ---- Several prompts and samples ---------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_how_many_there_are_nor_on_the_prompts_beside():
    few, many = (RUN.generate(["ab", "c"], max_new_tokens=9, num_samples=n, seed=3) for n in (2, 5))
    assert [texts[:2] for texts in many] == few and len({*many[0], *many[1]}) == 10
    assert RUN.generate(["ab", "other", "x"], max_new_tokens=9, num_samples=5, seed=3)[0] == many[0]
    assert RUN.generate(["ab", "c"], max_new_tokens=9, num_samples=5, seed=3, batch_size=1) == many
    assert "".join(RUN.stream("ab", max_new_tokens=9, seed=3)) == f"ab{few[0][0]}"
    assert RUN.generate(["ab"], max_new_tokens=9, sampling=GREEDY) != [few[0][:1]]


def test_prompts_have_the_room_that_each_leaves():
    short, long = RUN.generate(["a", "b" * 20], seed=1)
    assert RUN.generate(["a"], max_new_tokens=22, seed=1) == [short]
    assert len(RUN.tokenizer.encode(long[0])) <= 3 * 3  # bytes that are no text are shown as three


def test_several_prompts_and_samples_are_printed_in_order(generate):
    flags = ["--max-new-tokens", "6", "--seed", "3"]
    printed = generate("--prompt", "ab", "--prompt=-c", "--num-samples", "2", *flags).out
    expected = RUN.generate(["ab", "-c"], max_new_tokens=6, num_samples=2, seed=3)
    texts = [prompt + text for prompt, said in zip(["ab", "-c"], expected, strict=True) for text in said]
    assert printed == f"\n{LINE}\n".join(texts) + "\n"
    assert generate("--prompt", "ab", *flags).out == texts[0] + "\n"


def test_translators_take_several_prompts(generate):
    run = made("seq2seq")
    flags = ["--max-new-tokens", "5"]
    both = generate("--prompt", "ab", "--prompt", "c", *flags, of=run).out
    alone = [generate("--prompt", prompt, *flags, of=run).out for prompt in ("ab", "c")]
    assert both == f"{LINE}\n".join(alone)
    assert generate("--prompt", "ab", *flags, "--beams", "2", of=run).out


# ---- Files -------------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_prompt_and_rows_are_several(generate, tmp_path):
    (tmp_path / "a.txt").write_text("two\nlines\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate("abc")))
    (tmp_path / "a.csv").write_text("text\nx\ny\n")
    flags = ["--max-new-tokens", "5", "--prompt-file"]
    assert generate(*flags, str(tmp_path / "a.txt")).out.startswith("two\nlines")
    rows = [
        json.loads(row) for row in generate(*flags, str(tmp_path / "a.jsonl"), "--num-samples", "2").out.splitlines()
    ]
    expected = RUN.generate(list("abc"), max_new_tokens=5, num_samples=2)
    assert [list(row) for row in rows] == [["id", "text", "continuation", "continuation_2"]] * 3
    assert [[row["continuation"], row["continuation_2"]] for row in rows] == expected
    assert len(generate(*flags, str(tmp_path / "a.csv")).out.splitlines()) == 2


def test_files_that_are_none(generate, tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"text\0more")
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "none.jsonl").write_text("")
    for name, message in {
        "absent.txt": "absent.txt' is none",
        ".": "--prompt-file must be a file",
        "binary.txt": "must be UTF-8 text without NUL bytes",
        "other.jsonl": "'text'",
        "none.jsonl": "must be something to generate from",
    }.items():
        assert message in generate("--prompt-file", str(tmp_path / name), code=2), name


# ---- Ends --------------------------------------------------------------------------------------------------------------


def bytes_of(text):
    return list(text.encode())


def decode(ids):
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("stops", [["END"], ["zz", "ND"], ["\n\n", "é"], ["a"]])
def test_a_text_ends_before_a_stop_across_tokens(stops):
    text = "one END\n\nof étwo a zz END"
    taken, pieces = [], []

    def tokens():
        for token in bytes_of(text):
            taken.append(token)
            yield token

    for piece in stream_text(decode, bytes_of("END a\n\n"), tokens(), stops):
        pieces.append(piece)
        shown = "".join(pieces)[len("END a\n\n") :]
        assert not any(shown.endswith(stop[:n]) for stop in stops for n in range(1, len(stop))), "it is held back"
    end = min(text.find(stop) for stop in stops if stop in text)
    assert "".join(pieces) == "END a\n\n" + text[:end]
    stop = next(stop for stop in stops if text[end:].startswith(stop))
    assert len(taken) == len((text[:end] + stop).encode()), "no more tokens are taken"


def test_what_was_held_back_is_shown_at_the_end():
    assert "".join(stream_text(decode, [], bytes_of("a E"), ["END"])) == "a E"


def test_stops_of_a_batch_equal_those_in_a_stream(generate, monkeypatch):
    free = RUN.generate(["ab", "c", "ddd"], max_new_tokens=60, seed=5)
    stop = [free[0][0][20:22], free[2][0][33]]
    found = RUN.generate(["ab", "c", "ddd"], max_new_tokens=60, seed=5, stop=stop)
    for (text,), (whole,) in zip(found, free, strict=True):
        ends = [whole.find(s) for s in stop if s in whole]
        assert text == whole[: min(ends, default=len(whole))]
    assert any(len(text[0]) < len(whole[0]) for text, whole in zip(found, free, strict=True))
    streamed = "".join(RUN.stream("ab", max_new_tokens=60, seed=5, stop=stop))
    assert streamed == "ab" + found[0][0]
    flags = ["--max-new-tokens", "60", "--seed", "5", "--stop", stop[0], "--stop", stop[1]]
    assert generate("--prompt", "ab", *flags).out == streamed + "\n"
    counts = []
    real = Generator._extend
    monkeypatch.setattr(
        Generator, "_extend", lambda self, state, n, *rest: (counts.append(n), real(self, state, n, *rest))[1]
    )
    RUN.generate(["ab"], max_new_tokens=60, seed=5, stop=stop)
    assert counts and counts[-1] < 60, "a batch ends when all of its rows have"


# ---- A draft -----------------------------------------------------------------------------------------------------------


def test_a_draft_changes_no_greedy_text(generate):
    flags = ["--prompt", "ab", "--temperature", "0", "--max-new-tokens", "40"]
    assert generate(*flags, "--draft", "small", "--draft-tokens", "3").out == generate(*flags).out
    generator = RUN.config.objective.make_generator(RUN, made(seed=4), 3)
    assert isinstance(generator, SpeculativeGenerator)
    expected = RUN.generate(["ab", "c"], max_new_tokens=40, sampling=GREEDY)
    assert RUN.generate(["ab", "c"], max_new_tokens=40, sampling=GREEDY, generator=generator) == expected
    assert generator.offered > 0


def test_drafts_that_do_not_fit(generate):
    flags = ["--prompt", "ab", "--max-new-tokens", "20", "--draft"]
    assert "A draft must have the model's vocabulary, got 257 and" in generate(*flags, "words", code=2)
    assert "must be a language model of the objective next_token, got a run of seq2seq" in generate(
        *flags, "translator", code=2
    )
    assert "as many tokens as the model, here 23, it reads 12" in generate(*flags, "short", code=2)
    assert "--draft-tokens must be at least 1, got 0" in generate(*flags, "small", "--draft-tokens", "0", code=2)
    characters, other = (TOKENIZERS.find("characters")().train([text]) for text in ("abc", "xyz"))
    one, two = (Loaded(RUN.model, RUN.params, t, RUN.config, 1) for t in (characters, other))
    with pytest.raises(UserError, match=r"others from token \d+ on"):
        RUN.config.objective.make_generator(one, two)


# ---- Flags that mean nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--num-samples", "2", "--temperature", "0"], "--num-samples 2 means nothing here: the most likely token"),
        (["--num-samples", "2", "--beams", "2"], "--num-samples 2 means nothing here: beam search"),
        (["--stop", "x", "--beams", "2"], "--stop is not for beam search"),
        (["--draft", "small", "--beams", "2"], "--draft is not for beam search"),
        (["--stop", ""], "--stop must be a text, got an empty one"),
        (["--stop"], "--stop needs a value"),
        (["--chat", "--prompt", "b"], "leave it, or --num-samples and further prompts, out"),
        (["--prompt-file", "x"], "Prompts are given or read from a file"),
    ],
)
def test_flags_that_contradict(generate, flags, message):
    assert message in generate("--prompt", "a", *flags, code=2)


@pytest.mark.parametrize("flags", [["--stop", "x"], ["--draft", "small"]])
def test_translators_take_no_stops_and_drafts(generate, flags):
    assert f"{flags[0]} is for language models" in generate("--prompt", "a", *flags, of=made("seq2seq"), code=2)
    assert "--num-samples 2 means nothing here" in generate(
        "--prompt", "a", "--num-samples", "2", of=made("seq2seq"), code=2
    )


# ---- What a person types -----------------------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch, generate):
    """Lines that are typed at a terminal; an exception in their place is raised there."""

    def run(*lines, flags=(), **options):
        said = iter(lines)

        def read(mark):
            line = next(said, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", read)
        return generate(*flags, **options)

    return run


def test_each_line_is_a_prompt_and_draws_anew(typed):
    session = typed("ab", "", KeyboardInterrupt(), "ab", "c\\", "d", flags=["--max-new-tokens", "5"])
    texts = ["".join(RUN.stream(p, max_new_tokens=5, seed=n)) for n, p in enumerate(["ab", "ab", "c\nd"])]
    assert session.out == texts[0] + "\n\n" + texts[1] + "\n" + texts[2] + "\n\n"
    assert texts[0] != texts[1]
    assert "Ctrl-C stops a text, Ctrl-D ends" in session.err


def test_a_text_is_stopped_and_an_error_ends_no_session(typed, monkeypatch):
    real = Generator.stream

    def stream(self, tokens, **options):
        for count, token in enumerate(real(self, tokens, **options)):
            if count == 3 and bytes(tokens[1:]) == b"ab":
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Generator, "stream", stream)
    session = typed("ab", "x" * 40, "c", flags=["--temperature", "0"])
    assert "ab" in session.out and " [stopped]\n" in session.out
    assert "error: A prompt of 41 tokens" in session.err and "--max-new-tokens" in session.err
    assert session.out.rstrip().endswith("".join(RUN.stream("c", sampling=GREEDY)).rstrip())


def test_a_note_is_printed_once(typed):
    session = typed("ab", "c", flags=["--max-new-tokens", "40"])
    assert session.err.count("the model reads 24 tokens") == 1 and session.out.count("ab") >= 1


def test_the_model_is_prepared_once(typed, monkeypatch):
    made_generators = []
    real = Generator.__init__
    monkeypatch.setattr(
        Generator, "__init__", lambda self, *a, **k: (made_generators.append(1), real(self, *a, **k))[1]
    )
    typed("ab", "c", "d", flags=["--max-new-tokens", "5"])
    assert len(made_generators) == 1


def test_a_session_has_one_answer_to_each_line(typed):
    assert "--num-samples is for given prompts" in typed("a", flags=["--num-samples", "2"], code=2)
