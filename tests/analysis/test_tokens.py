"""Tokens for people: spaces where they stand, special ids by name, nothing that a page would obey."""

from tiny_tokenizers import make_folder

from transformer.analysis.tokens import token_text, token_texts
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokenizers.characters import CharacterTokenizer
from transformer.data.tokenizers.folder import from_folder


def opened(path, name):
    kind, files = from_folder(make_folder(path, name))
    for file, content in files.items():
        (path / file).write_bytes(content)
    return kind.open(path)


def test_bytes():
    tokenizer = ByteTokenizer()
    assert token_texts(tokenizer, [256, *"a é\t\n\x1b".encode()]) == [
        "⟨end of text⟩",
        "a",
        " ",
        "⟨195⟩",
        "é",
        "⇥",
        "↵",
        "\\x1b",
    ]
    assert token_text(tokenizer, 257) == "⟨mask⟩" and token_text(tokenizer, 300) == "⟨300⟩"


def test_what_is_not_in_the_vocabulary_is_called_unknown():
    tokenizer = CharacterTokenizer("ab")
    assert token_texts(tokenizer, tokenizer.encode("aZ")) == ["a", "⟨unknown⟩"]


def test_a_direction_is_not_turned():
    tokenizer = CharacterTokenizer("a\u202e")
    assert token_texts(tokenizer, tokenizer.encode("a\u202e")) == ["a", "\\u202e"]


def test_pretrained_tokenizers_keep_their_spaces(tmp_path):
    for name, expected in (
        ("gpt2", "the café is"),
        ("llama", "the café"),
        ("bert", "the cafe is"),
        ("t5", "the café is"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        tokenizer = opened(tmp_path / name, name)
        texts = token_texts(tokenizer, tokenizer.encode("the café is" if name != "llama" else "the café"))
        assert "".join(texts).strip() == expected, name


def test_special_tokens_have_their_names(tmp_path):
    tokenizer = opened(tmp_path, "bert")
    assert token_texts(tokenizer, [2, 4, 3]) == ["⟨CLS⟩", "⟨MASK⟩", "⟨SEP⟩"]
