"""Tokenizers of pretrained folders are what `transformers` makes of the same folders."""

import numpy as np
import pytest
from tiny_tokenizers import FOLDERS, TEXTS, byte_level, folder, make_folder
from tokenizers import processors

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

from transformer.data.tokenizers.folder import from_folder  # noqa: E402


def both(directory):
    kind, files = from_folder(directory)
    ours = kind.load(files["tokenizer.json"].decode())
    return ours, transformers.PreTrainedTokenizerFast.from_pretrained(directory)


def check(ours, theirs, texts=TEXTS):
    for text in texts:
        wanted = theirs(text, truncation=False, padding=False).input_ids
        assert [*ours.begin, *ours.encode(text).tolist(), *ours.end] == wanted, text
        assert ours.decode(wanted) == theirs.decode(wanted, skip_special_tokens=True), text


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_agree_with_transformers(name, tmp_path):
    check(*both(make_folder(tmp_path, name)))


TEMPLATES = {
    "roberta": lambda ids: processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), False, False),
    "llama 3": lambda ids: processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", ids["<s>"])]),
        ]
    ),
    "two": lambda ids: processors.TemplateProcessing(
        "<s> <|turn|> $A </s> </s>", "$A $B", [(name, ids[name]) for name in ("<s>", "</s>", "<|turn|>")]
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_templates_are_found(template, flags, tmp_path):
    """The file's template counts; `add_bos_token` and `add_eos_token` do not, as in transformers 5."""
    tokenizer = byte_level()
    tokenizer.post_processor = TEMPLATES[template](tokenizer.get_vocab(with_added_tokens=True))
    ours, theirs = both(folder(tmp_path, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", **flags}))
    check(ours, theirs)
    assert len(ours.begin) >= 1


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}])
def test_a_file_without_a_template_has_none(flags, tmp_path):
    ours, theirs = both(folder(tmp_path, byte_level(), {"bos_token": "<s>", "eos_token": "</s>", **flags}))
    check(ours, theirs)


def test_special_tokens_in_a_text_agree_with_transformers_if_requested(tmp_path):
    for name in FOLDERS:
        ours, theirs = both(make_folder(tmp_path, name))
        for word in theirs.all_special_tokens:
            text = f"the {word}café{word}"
            wanted = theirs(text, truncation=False, padding=False, add_special_tokens=False).input_ids
            np.testing.assert_array_equal(ours.encode(text, special=True), wanted)
