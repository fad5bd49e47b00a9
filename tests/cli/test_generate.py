"""`generate` on models that know nothing: what is printed, where to, and what is refused."""

import io
import json
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from trained_objectives import TRAINED

from transformer.cli import generate as command
from transformer.cli.fields import parse
from transformer.cli.main import COMMANDS, main
from transformer.cli.options import OPTIONS
from transformer.cli.train import next_lines
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.generation.generate import Generator
from transformer.generation.sampling import SamplingConfig
from transformer.generation.text import stream_text
from transformer.kinds import kinds_with
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.objectives import seq2seq
from transformer.parts import initialize, resolve
from transformer.runs.saved import Loaded
from transformer.tokenizer import TOKENIZERS
from transformer.types import UserError

CORPUS = ["The house, the cat: don't touch it! Ünïcødé 漢字 " * 3]
SAID = [9, 7, 8, 5]
KINDS = [kind for kind in TOKENIZERS.names if kind not in ("auto", "pretrained", "sentencepiece")]


def trained(kind):
    settings = TOKENIZERS.find(kind)
    return (settings(size=300) if kind in kinds_with(TOKENIZERS, "size") else settings()).train(CORPUS)


@pytest.fixture(scope="module")
def runs():
    """A run by objective and tokenizer, as `load` gives it."""
    made = {}

    def get(kind, tokenizer_kind):
        if (kind, tokenizer_kind) not in made:
            tokenizer = trained(tokenizer_kind)
            block = BlockConfig(AttentionConfig(num_heads=2))
            config = Config(
                model=ModelConfig(num_layers=1, embed_dim=8, pattern=(block,)),
                data=DataConfig(sequence_length=24),
                objective=OBJECTIVES.find(kind)(),
            )
            config = resolve(config, tokenizer)
            model = config.objective.make_model(config.model)
            shapes, _ = initialize(config.objective, model, None)
            params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            made[kind, tokenizer_kind] = Loaded(model, params, tokenizer, config, 1)
        return made[kind, tokenizer_kind]

    return get


@pytest.fixture
def generate(runs, monkeypatch, capsys):
    """Run the command on a model that always says the same, or really; what it printed, and its notes."""
    real = Generator.stream

    def said(tokens, given):
        """`run.given` has the arguments that the model received."""
        run.given = given
        return tokens

    def run(*arguments, kind="next_token", tokenizer="bytes", code=None, really=False):
        monkeypatch.setattr(Generator, "stream", real if really else lambda *_, **given: said(iter(SAID), given))
        monkeypatch.setattr(seq2seq, "translate", lambda *_, **given: said([np.array(SAID)], given))
        monkeypatch.setattr(command, "load", lambda *_, **__: runs(kind, tokenizer))
        capsys.readouterr()
        if code is None:
            main(["generate", "run", *arguments])
        else:
            with pytest.raises(SystemExit) as exit_info:
                main(["generate", "run", *arguments])
            assert exit_info.value.code == code
        captured = capsys.readouterr()
        return captured.err if code else captured

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_text_make_the_text_of_all_tokens(kind):
    tokenizer = trained(kind)
    draws = np.random.default_rng(0)
    for _ in range(20):
        ids = draws.integers(0, tokenizer.vocab_size, 30).tolist()
        for split in (0, 1, 13, 30):
            pieces = list(stream_text(tokenizer.decode, ids[:split], ids[split:]))
            assert "".join(pieces) == tokenizer.decode(ids)
    whole = tokenizer.encode(CORPUS[0]).tolist()
    assert len(list(stream_text(tokenizer.decode, [], whole))) > len(whole) / 4  # as they come


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_continuation_are_decoded_together(generate, runs, kind):
    tokenizer = runs("next_token", kind).tokenizer
    ids = [tokenizer.end_of_text, *tokenizer.encode("the cat").tolist()]
    assert generate("--prompt", "the cat", tokenizer=kind).out == tokenizer.decode(ids + SAID) + "\n"


def test_a_model_continues_with_a_space(generate):
    printed = generate("--prompt", "The cat", "--max-new-tokens", "5", tokenizer="words", really=True).out
    assert printed.split()[:2] == ["the", "cat"] and printed.endswith("\n")


def test_what_the_model_does_not_know_is_said(generate):
    captured = generate("--prompt", "the zebra", "--max-new-tokens", "2", tokenizer="words")
    assert captured.err == (
        "note: 1 of the prompt's 3 tokens is not in the model's vocabulary, and is read as unknown.\n"
    )
    assert captured.out.startswith("the")


def test_a_prompt_is_piped_in(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO:\n\n"))
    assert generate("--max-new-tokens", "1").out == f"ROMEO:\n{bytes(SAID).decode()}\n"  # without its last newline
    monkeypatch.setattr("sys.stdin", io.StringIO("not read"))
    assert generate("--prompt", "JULIET:", "--max-new-tokens", "1").out.startswith("JULIET:")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert generate("--max-new-tokens", "1").out.endswith("\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_prompt_that_is_no_text_is_refused(generate, monkeypatch, errors):
    """As a text to train on is; Python puts surrogates for such bytes in arguments, and in input where the locale is C."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb"), encoding="utf-8", errors=errors))
    error = generate(code=2)
    assert "A prompt must be text in UTF-8, standard input is not (byte 1: 0xff): convert it" in error
    assert "UTF-8, --prompt is not (byte 2: 0xe9): convert it" in generate("--prompt", "Ca\udce9", code=2)
    # In a locale without an encoding, UTF-8 comes as surrogates too.
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO("é".encode()), encoding="ascii", errors="surrogateescape")
    )
    assert generate("--max-new-tokens", "1").out.startswith("é")


def test_a_terminal_is_shown_no_codes_and_a_pipe_gets_them(generate, monkeypatch):
    code = "\x1b]0;x\x07"
    assert generate("--prompt", code).out.startswith(code)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert generate("--prompt", code).out.startswith("\\x1b]0;x\\x07")


@pytest.mark.parametrize("value", ["-foo", "--foo", "-", "-1", "--", "--foo=bar"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_may_begin_with_a_dash(name, value):
    """Every text of every command."""
    from_python = OPTIONS[name]
    texts = [(flag, found) for flag, found in from_python.flags().items() if found.hint in (str, str | None)]
    for flag, found in texts:
        for arguments in ([flag, value], [f"{flag}={value}"]):
            given, words = parse_of(name)(arguments)
            assert given == dict.fromkeys(found.paths, (value,) if found.repeated else value) and words == []


def parse_of(name):
    table = OPTIONS[name].flags()
    return lambda arguments: parse(table, arguments, command=name, usage="", about="")


# ---- Flags that mean nothing, and those that mean what happens --------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (["--temperature", "0"], ""),
        (["--top-k", "1"], ""),
        (["--temperature", "0", "--top-k", "0", "--top-p", "1"], ""),
        (["--temperature", "0", "--seed", "0"], "--seed 0 means nothing here"),
        (["--temperature", "0", "--top-k", "5"], "--top-k 5 means nothing here"),
        (["--temperature", "0", "--top-p", "0.5"], "--top-p 0.5 means nothing here"),
        (["--temperature", "0", "--min-p", "0.5"], "--min-p 0.5 means nothing here"),
        (["--temperature", "0", "--min-p", "0", "--repetition-penalty", "1.5"], ""),
    ],
)
@pytest.mark.parametrize("kind", ["next_token", "seq2seq"])
def test_where_nothing_is_drawn(generate, kind, flags, refused):
    printed = generate("--prompt", "the cat", "--max-new-tokens", "2", *flags, kind=kind, code=2 if refused else None)
    assert refused in (printed if refused else printed.out)


@pytest.mark.parametrize("flags", [["--seed", "0"], ["--top-k", "3"], ["--temperature", "1"], ["--top-p", "0.9"]])
def test_a_translator_draws_nothing(generate, flags):
    assert "a translator takes the most likely token" in generate("--prompt", "a", *flags, kind="seq2seq", code=2)
    assert generate("--prompt", "a", "--max-new-tokens", "2", *flags)  # a language model draws


@pytest.mark.parametrize("kind", ["next_token", "seq2seq"])
def test_sampling_reaches_the_model(generate, kind):
    """Every field of a language model, of a translator the penalty."""
    flags = ["--top-k", "5", "--top-p", "0.9", "--min-p", "0.25", "--temperature", "0.5"] * (kind == "next_token")
    generate("--prompt", "the cat", "--max-new-tokens", "2", "--repetition-penalty", "1.5", *flags, kind=kind)
    drawn = (
        {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.25} if kind == "next_token" else {"temperature": 0}
    )
    assert generate.given["sampling"] == SamplingConfig(repetition_penalty=1.5, **drawn)


@pytest.mark.parametrize("kind", ["next_token", "prefix_lm", "seq2seq"])
def test_beams_print_the_best_texts(generate, kind):
    flags = ["--prompt", "the cat", "--max-new-tokens", "2", "--beams", "3"]
    best = generate(*flags, kind=kind).out
    texts = generate(*flags, "--num-best", "3", "--length-penalty", "0.5", kind=kind).out
    # A model of zeros: all continuations are as likely, and its bytes print nothing.
    assert best.startswith("the cat" if kind != "seq2seq" else "\0") and texts.startswith(best.removesuffix("\n"))
    assert texts.count("the cat") == (0 if kind == "seq2seq" else 3) and len(texts.split("\n")) == 4


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (["--beams", "2", "--temperature", "0.5"], "--temperature 0.5 means nothing here: beam search draws nothing"),
        (["--beams", "2", "--top-p", "0.5"], "--top-p 0.5 means nothing here"),
        (["--beams", "2", "--seed", "1"], "--seed 1 means nothing here"),
        (["--beams", "2", "--repetition-penalty", "1.5"], "--repetition-penalty is not for beam search"),
        (["--beams", "2", "--num-best", "3"], "num_return must be at most num_beams=2, got 3"),
        (["--beams", "-1"], "BeamConfig.num_beams must be at least 1, got -1"),
        (["--beams", "2", "--chat"], "--beams is for a text, not for a conversation"),
        (["--num-best", "2"], "are for beam search, got 1.0 and 2 without; give beams (--beams)"),
        (["--length-penalty", "2"], "are for beam search, got 2.0 and 1 without"),
    ],
)
@pytest.mark.parametrize("kind", ["next_token", "seq2seq"])
def test_beams_and_what_means_nothing_with_them(generate, kind, flags, refused):
    assert refused in generate("--prompt", "the cat", "--max-new-tokens", "2", *flags, kind=kind, code=2)


@pytest.mark.parametrize("kind", ["next_token", "seq2seq"])
def test_predictions_of_beams_have_scores(runs, kind):
    run, name = runs(kind, "bytes"), "translation" if kind == "seq2seq" else "continuation"
    plain, best = (
        run.predict(["the cat", "a"], max_new_tokens=2),
        run.predict(["the cat", "a"], max_new_tokens=2, beams=3, num_best=2, length_penalty=0.0),
    )
    assert [list(row) for row in plain] == [[name]] * 2
    for row in best:
        assert list(row) == [name, "score", f"{name}_2", "score_2"]
        assert 0 > row["score"] >= row["score_2"] > -20
    with pytest.raises(UserError, match=r"are for beam search, got 1.0 and 2 without"):
        run.predict(["a"], num_best=2)


@pytest.mark.parametrize("kind", ["next_token", "seq2seq"])
def test_predict_takes_beams(runs, kind, tmp_path, monkeypatch, capsys):
    run, texts = runs(kind, "bytes"), ["the cat", "a"]
    monkeypatch.setattr("transformer.cli.rows.load", lambda *args, **kwargs: run)
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    arguments = ["predict", "runs/x", str(tmp_path / "texts.txt"), "--max-new-tokens", "2"]
    main([*arguments, "--beams", "3", "--num-best", "2", "--length-penalty", "0.5"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    best = run.predict(texts, max_new_tokens=2, beams=3, num_best=2, length_penalty=0.5)
    key = run.config.data.text_key if kind == "next_token" else run.config.data.source_key
    assert rows == [{key: text} | found for text, found in zip(texts, best, strict=True)]
    assert best != run.predict(texts, max_new_tokens=2, beams=3, num_best=2)
    for flags, message in {("--num-best", "2"): "are for beam search", ("--beams", "-1"): "must be at least 1"}.items():
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *flags])
        assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", "  ", None])
def test_a_translator_needs_a_text(generate, monkeypatch, prompt):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    arguments = [] if prompt is None else ["--prompt", prompt]
    assert "A translator needs a text to translate" in generate(*arguments, kind="seq2seq", code=2)


def test_a_translator_says_what_it_does_not_read(generate):
    cut = generate("--prompt", "x" * 1500, "--max-new-tokens", "2", kind="seq2seq")
    assert cut.err == "note: the model reads 23 of the text's 1500 tokens, the first ones; the others were cut.\n"
    assert generate("--prompt", "x" * 23, "--max-new-tokens", "2", kind="seq2seq").err == ""


# ---- Pipes ------------------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_of_spans_says_its_target(generate):
    assert generate("--prompt", "a word", "--max-new-tokens", "2", kind="span_corruption").err == ""


@pytest.mark.parametrize("kind", ["masked_lm"])
def test_what_generates_nothing_says_so(generate, kind):
    assert generate("--prompt", "a", kind=kind, code=2) == (
        f"error: A run that generates must be a language model or a translator, got a run of {kind}; `transformer evaluate` "
        "scores it.\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_has_gone_is_no_error(name, monkeypatch, capfd):
    """As a shell reports a tool that SIGPIPE ended, for every command."""

    def write():
        raise BrokenPipeError

    monkeypatch.setitem(OPTIONS, name, OPTIONS[name]._replace(parse=lambda _: ()))
    monkeypatch.setattr(f"transformer.cli.{name}.main", write)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    monkeypatch.setattr("sys.stdout", sys.__stdout__)
    with pytest.raises(SystemExit) as exit_info:
        main([name])
    assert exit_info.value.code == 141
    assert capfd.readouterr() == ("", "")


def test_help_into_head():
    shell = f"{sys.executable} -m transformer train --help | head -c 5; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert (result.stdout.splitlines()[0][:5], result.stderr) == ("usage", "")


def test_results_on_standard_output_are_json(monkeypatch, capsys, tmp_path):
    """Labels are safe there because JSON writes what is not ASCII as escapes; progress is elsewhere."""

    def score(workdir, *, report, **_):
        report(f"scoring {workdir}")
        return {"classes": ["[/bold]", "\x1b]0;x\x07"]}

    monkeypatch.setattr("transformer.cli.evaluate.evaluate", score)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\x1b[31m").mkdir()
    main(["evaluate", "a\x1b[31m"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"classes": ["[/bold]", "\x1b]0;x\x07"]}
    assert "\x1b" not in captured.out + captured.err
    assert captured.err == "scoring a\\x1b[31m\n"


# ---- What train ends with ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("kind", TRAINED)
def test_train_ends_with_what_to_type_next(kind, active, tmp_path, monkeypatch):
    """For every kind of run; the environment's activation comes first where it is not active."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / ".venv") if active else "")
    objective = OBJECTIVES.find(kind)()
    training = TrainingConfig(sample_prompt="it's" if objective.continues_text else "")
    config = Config(workdir="runs/a b", objective=objective, training=training)
    *activation, line = next_lines(config)
    assert activation == ([] if active else ["  source .venv/bin/activate"])
    name, *arguments = shlex.split(line)[1:]
    options, _ = OPTIONS[name].parse(arguments)
    assert options.workdir == "runs/a b"
    assert name == ("evaluate" if kind in ("masked_lm", "classification", "span_corruption") else "generate")


def test_a_run_without_a_chat_template_holds_no_conversation(generate, monkeypatch):
    message = generate("--chat", "--prompt", "hello", code=2)
    assert "Conversations need a chat template" in message and "'bytes'" in message
    with monkeypatch.context() as terminal:  # before a message is typed
        terminal.setattr("sys.stdin", io.StringIO(""))
        terminal.setattr("sys.stdin.isatty", lambda: True, raising=False)
        assert "Conversations need a chat template" in generate("--chat", code=2)
    assert "replies must be a language model" in generate("--chat", "--prompt", "hello", kind="seq2seq", code=2)
    assert "give --chat too" in generate("--system", "be kind", "--prompt", "hello", code=2)
