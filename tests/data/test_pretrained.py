"""Tokenizers of pretrained folders: kept byte for byte, special ids where they belong, bytes that add up."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from tiny_tokenizers import FOLDERS, TEXTS, bert, byte_level, folder, llama, make_folder, t5

from transformer.config import Config, DataConfig
from transformer.data.forms.labelled import LabelledText, LabelledTexts
from transformer.data.forms.pairs import Pairs, TextPair
from transformer.data.rows import empty_batch, make_pairs, write_pairs
from transformer.data.source import Record
from transformer.data.tokenizers import load_tokenizer
from transformer.data.tokenizers.folder import from_folder
from transformer.data.tokenizers.pretrained import Pretrained
from transformer.model_config import ModelConfig
from transformer.objectives.masked_lm import MaskedLM
from transformer.objectives.next_token import NextToken
from transformer.parts import resolve
from transformer.tokenizer import document_start, drawable, mask_id, prompt_ids, sentinel_ids, stop_ids, target_start
from transformer.types import UserError

every_folder = pytest.mark.parametrize("name", FOLDERS)


def opened(directory):
    kind, files = from_folder(directory)
    return kind.load(files["tokenizer.json"].decode())


@every_folder
def test_the_file_is_kept_byte_for_byte(name, tmp_path):
    directory = make_folder(tmp_path, name)
    kind, files = from_folder(directory)
    content = (directory / "tokenizer.json").read_bytes()
    assert b"\r\n" in content
    assert files["tokenizer.json"] == content
    opened(directory).save(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == content
    loaded = load_tokenizer(tmp_path / "run", kind)
    for text in TEXTS:
        np.testing.assert_array_equal(loaded.encode(text), opened(directory).encode(text))


def test_special_ids_are_found(tmp_path):
    assert opened(make_folder(tmp_path, "llama")).settings == Pretrained(begin=(1,), end_of_text=2, stop=(2,))
    found = opened(make_folder(tmp_path, "bert")).settings
    assert found == Pretrained(begin=(2,), end=(3,), end_of_text=3, stop=(3,), pad=0, mask=4)
    config = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    found = opened(folder(tmp_path / "t5", t5(), {"eos_token": "</s>"}, config=config)).settings
    assert found == Pretrained(end=(1,), end_of_text=1, stop=(1,), pad=0, decoder_start=0)
    gpt2 = opened(make_folder(tmp_path, "gpt2"))
    assert (gpt2.begin, gpt2.end, gpt2.end_of_text) == ((), (), gpt2._model.token_to_id("</s>"))


def test_padding_and_truncation_of_the_file_are_not_done(tmp_path):
    tokenizer = opened(make_folder(tmp_path, "bert"))
    assert len(tokenizer.encode("the")) < 4
    assert len(tokenizer.encode("the end " * 20)) >= 40


def test_the_end_of_a_text_is_the_separator_where_nothing_else_is(tmp_path):
    fields = json.loads(bert().to_str()) | {"post_processor": None}
    found = opened(folder(tmp_path, bert().from_str(json.dumps(fields)), {"sep_token": "[SEP]"}))
    assert (found.begin, found.end, found.end_of_text) == ((), (), 3)


def test_generation_may_end_at_several_ids(tmp_path):
    tokenizer = byte_level()
    end, turn = map(tokenizer.token_to_id, ("</s>", "<|turn|>"))
    generation = {"eos_token_id": [turn, end, 10**6, True, "x"]}
    found = opened(folder(tmp_path, tokenizer, {"eos_token": "</s>"}, generation_config=generation))
    assert stop_ids(found) == (turn, end)
    found = opened(folder(tmp_path / "config", tokenizer, None, config={"eos_token_id": turn}))
    assert (found.end_of_text, stop_ids(found)) == (turn, (turn,))
    found = opened(folder(tmp_path / "map", tokenizer, None, special_tokens_map={"eos_token": "</s>"}))
    assert found.end_of_text == end


@pytest.mark.parametrize("name", ["gpt2", "prefixed", "llama", "metaspace", "gemma"])
def test_the_bytes_of_a_text_add_up(name, tmp_path):
    tokenizer = opened(make_folder(tmp_path, name))
    for text in TEXTS:
        if name == "prefixed" and "<tool>" in text:  # a space is put before what follows an added token too
            continue
        ids = [*tokenizer.encode(text), tokenizer.end_of_text]
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()), text
        assert tokenizer.decode(ids).removeprefix(" " * (name == "prefixed")) == text
    special = sorted(tokenizer.special - {tokenizer.end_of_text})
    assert not tokenizer.token_bytes[special].any()
    assert tokenizer.token_bytes[tokenizer.end_of_text] == (-1 if name in ("prefixed", "llama", "metaspace") else 0)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_there_are_no_bytes_where_text_is_lost(name, tmp_path):
    assert not opened(make_folder(tmp_path, name)).token_bytes.any()


@every_folder
def test_the_name_of_a_special_token_is_text_unless_requested(name, tmp_path):
    tokenizer = opened(make_folder(tmp_path, name))
    names = [tokenizer._model.id_to_token(index) for index in sorted(tokenizer.special)]
    for word in names:
        index = tokenizer._model.token_to_id(word)
        if index != tokenizer.unknown:
            assert not set(tokenizer.encode(f"a{word} {word}").tolist()) & tokenizer.special - {tokenizer.unknown}, word
        assert index in tokenizer.encode(f"a{word} the", special=True), word
        if name not in ("bert", "t5"):
            assert tokenizer.decode(tokenizer.encode(f"a{word} {word}")).strip() == f"a{word} {word}"
    assert tokenizer.decode([*tokenizer.special]) == ""


def test_an_added_token_that_ends_a_text_is_no_text_either(tmp_path):
    tokenizer = opened(folder(tmp_path, byte_level(), {"eos_token": "<tool>"}))
    assert tokenizer.end_of_text not in tokenizer.encode("a<tool>b")
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool>b"


# ---- Rows ------------------------------------------------------------------------------------------------------------


def test_rows_and_prompts_have_the_ids_that_the_model_knows(tmp_path):
    config = DataConfig(sequence_length=6)
    llama_, gpt2, bert_ = (opened(make_folder(tmp_path, name)) for name in ("llama", "gpt2", "bert"))
    text = llama_.encode("the").tolist()
    pairs = make_pairs(llama_, Record("the", "", continues=False, last=True))
    assert (pairs.inputs.tolist(), pairs.targets.tolist()) == ([1, *text], [*text, 2])
    assert prompt_ids(llama_, "the") == [1, *text]
    assert prompt_ids(gpt2, "the") == gpt2.encode("the").tolist()
    assert prompt_ids(gpt2, "") == [gpt2.end_of_text] == [document_start(gpt2)]
    tokens, label = LabelledTexts().encode(LabelledText("the café is open the end", 1), bert_, config)
    assert (tokens[0], tokens[-1], len(tokens), label) == (2, 3, 6, 1)
    for count, cut in ((5, 1), (4, 0)):
        ids = LabelledTexts().tokens(LabelledText("the " * count, 1), bert_)
        assert LabelledTexts().count_cut([ids], bert_, config) == {"texts": cut}
    kind = dataclasses.replace(opened(make_folder(tmp_path, "t5")).settings, decoder_start=0)
    t5_ = kind.load((tmp_path / "t5" / "tokenizer.json").read_text())
    source, target = Pairs().encode(TextPair("the", "the"), t5_, config)
    text = t5_.encode("the").tolist()
    assert (source.tolist(), target.tolist()) == ([*text, 1], [0, *text, 1])
    assert target_start(t5_) == 0
    with pytest.raises(UserError, match="room for a text and the 2 ids around it"):
        LabelledTexts().encode(LabelledText("the", 1), bert_, DataConfig(sequence_length=2))


def test_an_encoder_reads_what_closes_a_document(tmp_path):
    bert_ = opened(make_folder(tmp_path, "bert"))
    text = bert_.encode("the end").tolist()
    pairs = make_pairs(bert_, Record("the end", "", continues=False, last=True))
    assert (pairs.inputs.tolist(), pairs.targets.tolist()) == ([2, *text, 3], [*text, 3, 3])
    assert pairs.weights.tolist() == [*(1 for _ in text), 1, 0]
    assert len(make_pairs(bert_, Record("the end", "", continues=False, last=False)).inputs) == len(text)
    batch = empty_batch(1, 8)
    write_pairs(batch, 0, 0, pairs, 0, 1)
    for seed in range(9):
        hidden = batch._replace(inputs=batch.inputs.copy(), weights=batch.weights.copy(), targets=batch.targets.copy())
        MaskedLM(mask_rate=0.9).changes(bert_, 8, seed)["noise"](hidden, 0, (seed,))
        assert hidden.inputs[0, 0] == 2 and hidden.inputs[0, len(text) + 1] == 3
        assert hidden.weights[0].sum() == max(1, round(0.9 * len(text)))
        assert hidden.inputs.max() < bert_.vocab_size


def test_masks_and_sentinels_of_a_tokenizer_are_used(tmp_path):
    bert_, t5_ = (opened(make_folder(tmp_path, name)) for name in ("bert", "t5"))
    assert (mask_id(bert_), MaskedLM().extra_tokens(bert_, 8)) == (4, 0)
    assert mask_id(t5_) == t5_.vocab_size
    assert sentinel_ids(t5_, 3).tolist() == [3, 4, t5_.vocab_size]


# ---- The table of a model --------------------------------------------------------------------------------------------


def test_rows_of_a_table_without_a_token_are_not_drawable(tmp_path):
    # The library numbers added tokens itself: a hole is one of the model's vocabulary.
    fields = json.loads(byte_level().to_str())
    vocabulary = fields["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    hole, vocabulary[last] = vocabulary[last], vocabulary[last] + 40
    tokenizer = byte_level().from_str(json.dumps(fields))
    found = opened(folder(tmp_path, tokenizer, {"eos_token": "</s>"}))
    assert found.vocab_size == vocabulary[last] + 1 > tokenizer.get_vocab_size()
    assert len(found.token_bytes) == found.vocab_size
    allowed = drawable(found, found.vocab_size + 7)
    assert allowed.sum() == tokenizer.get_vocab_size()
    assert not allowed[hole] and not allowed[-7:].any() and allowed[vocabulary[last]]
    assert found.decode([hole, *found.encode("the")]) == "the"


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    tokenizer = opened(make_folder(tmp_path, "gpt2"))
    size = tokenizer.vocab_size
    config = Config(objective=NextToken(), model=ModelConfig(vocab_size=size - 1, num_layers=1, embed_dim=8))
    with pytest.raises(UserError, match=f"tokenizer's {size}, got {size - 1}"):
        resolve(config, tokenizer)


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"model": 1}', b'{"model": {"type": "BPE"}}', b"[" * 100_000, b'{"a": NaN}'],
)
def test_a_malformed_file_is_a_short_error(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as error:
        from_folder(tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("change", ["huge id", "no end", "types", "config"])
def test_a_strange_folder_is_a_short_error(change, tmp_path):
    fields = json.loads(llama().to_str())
    config = {"eos_token": "</s>"}
    if change == "huge id":
        fields["model"]["vocab"]["."] = 2**31
    if change == "types":
        fields["added_tokens"][0]["id"] = "seven"
    if change == "no end":
        fields = json.loads(json.dumps(fields).replace('"</s>"', '"<end>"'))
        config = {"eos_token": "<none>"}
    folder(tmp_path, byte_level(), config)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    if change == "config":
        (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError) as error:
        from_folder(tmp_path)
    assert len(str(error.value)) < 500


def paths(value, path=()):
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts)[:12]:
        yield from paths(part, (*path, key))


@every_folder
def test_whatever_a_field_holds_it_is_read_or_a_short_error(name, tmp_path):
    directory, random = make_folder(tmp_path, name), np.random.default_rng(0)
    files = ("tokenizer.json", "tokenizer_config.json")
    whole = [(directory / file).read_text() for file in files]
    strange = [None, -1, 2**40, "x", [], {}, True, 1.5, [[]], {"type": "Sequence"}]
    outcomes = set()
    for _ in range(40):
        fields = [json.loads(content) for content in whole]
        chosen = fields[int(random.random() < 0.2)]
        places = [path for path in paths(chosen) if path]
        *way, last = places[random.integers(len(places))]
        functools.reduce(lambda part, key: part[key], way, chosen)[last] = strange[random.integers(len(strange))]
        for file, content in zip(files, fields, strict=True):
            (directory / file).write_text(json.dumps(content))
        try:
            outcomes.add(bool(opened(directory).encode("the").size))
        except UserError as error:
            outcomes.add(len(str(error)) < 700)
    assert outcomes == {True}


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must be a tokenizer\.json or a SentencePiece"):
        from_folder(tmp_path)
    with pytest.raises(UserError, match="must be a folder"):
        from_folder(tmp_path / "none")


def test_ids_of_no_token_are_refused(tmp_path):
    content = (make_folder(tmp_path, "llama") / "tokenizer.json").read_text()
    with pytest.raises(UserError, match="Special ids must belong to the tokenizer"):
        Pretrained(end_of_text=5000).load(content)


def test_it_is_not_trained():
    with pytest.raises(UserError, match="comes with a pretrained model"):
        Pretrained().train(["a"])


def test_a_template_that_is_not_around_the_text_is_refused(tmp_path):
    tokenizer = bert()
    fields = json.loads(tokenizer.to_str())
    part = {"Sequence": {"id": "A", "type_id": 0}}
    between = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    ids = {"[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}
    fields["post_processor"] = {"type": "TemplateProcessing", "single": [part, between, part], "pair": [part]}
    fields["post_processor"]["special_tokens"] = ids
    (folder(tmp_path, tokenizer, {"sep_token": "[SEP]"}) / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="before and after a text"):
        from_folder(tmp_path)
