"""SentencePiece models without a tokenizer.json are read as `sentencepiece` and `transformers` read them."""

import base64
import json

import numpy as np
import pytest
from tiny_tokenizers import CORPUS, TEXTS

spm = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

from transformer.data.tokenizers import load_tokenizer, pieces  # noqa: E402
from transformer.data.tokenizers.folder import from_folder  # noqa: E402
from transformer.types import UserError  # noqa: E402

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **NAMES, "add_bos_token": True}
ADDED = {"320": {"__type": "AddedToken", "content": "<|turn|>", "special": True, "lstrip": False, "rstrip": False}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm")
    (path / "corpus.txt").write_text("\n".join(text.replace("\n", " ") for text in CORPUS))
    options = {
        "bpe": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "unigram": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    }
    for kind, more in options.items():
        spm.SentencePieceTrainer.train(
            input=str(path / "corpus.txt"),
            model_prefix=str(path / kind),
            model_type=kind,
            vocab_size=320 if kind == "bpe" else 60,
            hard_vocab_limit=False,
            minloglevel=3,
            **more,
        )
    return {kind: (path / f"{kind}.model").read_bytes() for kind in options}


def folder(path, model, config, name="tokenizer.model"):
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def both(directory):
    kind, files = from_folder(directory)
    return kind.load(files["tokenizer.json"].decode()), transformers.AutoTokenizer.from_pretrained(directory)


CASES = {
    "llama": ("bpe", LLAMA),
    "llama with ends": ("bpe", LLAMA | {"add_eos_token": True}),
    "llama without": ("bpe", LLAMA | {"add_bos_token": False}),
    "no class": ("bpe", NAMES | {"add_bos_token": True}),
    "t5": ("unigram", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>"}),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_agree_with_transformers(case, models, tmp_path):
    kind, config = CASES[case]
    ours, theirs = both(
        folder(tmp_path, models[kind], config, "spiece.model" if kind == "unigram" else "tokenizer.model")
    )
    library = spm.SentencePieceProcessor(model_proto=models[kind])
    for text in TEXTS:
        wanted = theirs(text).input_ids
        assert [*ours.begin, *ours.encode(text).tolist(), *ours.end] == wanted, text
        assert ours.encode(text).tolist() == library.encode(text)
        if kind == "bpe":
            assert ours.decode(wanted) == theirs.decode(wanted, skip_special_tokens=True) == text
    assert ours.encode("  a ").tolist() == library.encode("  a ")
    assert ours.end_of_text == theirs.eos_token_id
    assert ours.decode([ours.end_of_text, *ours.encode("the")]) == "the"


def test_bytes_add_up(models, tmp_path):
    ours, _ = both(folder(tmp_path, models["bpe"], LLAMA))
    for text in (*TEXTS, "  two  spaces ", " the"):
        assert ours.token_bytes[[*ours.encode(text), ours.end_of_text]].sum() == len(text.encode()), text
    lossy, _ = both(folder(tmp_path / "t5", models["unigram"], CASES["t5"][1], "spiece.model"))
    assert not lossy.token_bytes.any()


@pytest.mark.parametrize("legacy", [False, True])
def test_special_tokens_are_text_unless_requested(legacy, models, tmp_path):
    config = LLAMA | {"legacy": legacy, "added_tokens_decoder": ADDED}
    ours, theirs = both(folder(tmp_path, models["bpe"], config))
    assert (ours.vocab_size, len(ours.token_bytes)) == (321, 321)
    for text in ("the</s>café", "<|turn|>the<|turn|>"):
        assert not set(ours.encode(text).tolist()) & ours.special
        assert ours.decode(ours.encode(text)) == text
        np.testing.assert_array_equal(ours.encode(text, special=True), theirs(text, add_special_tokens=False).input_ids)


def test_the_model_is_kept_as_it_is(models, tmp_path):
    directory = folder(tmp_path / "model", models["bpe"], LLAMA | {"chat_template": "x"})
    kind, files = from_folder(directory)
    assert base64.b64decode(json.loads(files["tokenizer.json"])["model"]) == models["bpe"]
    (tmp_path / "run").mkdir()
    for name, content in files.items():
        (tmp_path / "run" / name).write_bytes(content)
    loaded = load_tokenizer(tmp_path / "run", kind)
    loaded.save(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 40, b"\xff" * 999])
def test_a_damaged_model_is_a_short_error(content, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.model") as error:
        from_folder(folder(tmp_path, content, LLAMA))
    assert len(str(error.value)) < 400


def test_ids_of_another_order_are_refused(models, tmp_path):
    with pytest.raises(UserError, match="not so or not known for 'XLMRobertaTokenizer'"):
        from_folder(folder(tmp_path, models["bpe"], LLAMA | {"tokenizer_class": "XLMRobertaTokenizer"}))


def test_a_missing_library_is_named(models, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "sentencepiece", None)
    with pytest.raises(UserError, match=r'needs the package sentencepiece; .*pip install -e "\.\[sentencepiece\]"'):
        from_folder(folder(tmp_path, models["bpe"], LLAMA))
