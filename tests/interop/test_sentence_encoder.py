"""What the files of a sentence encoder say of its texts and vectors."""

import json

import pytest

from transformer.interop.family import Pretrained
from transformer.interop.folder import sentence_encoder
from transformer.model_config import ModelConfig
from transformer.ops.positions.learned import LearnedPositions
from transformer.types import UserError

FOUND = Pretrained(ModelConfig(max_length=512, positions=LearnedPositions()), "embedding")


def write(path, **files):
    parts = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    modules = [{"idx": n, "name": str(n), "path": p, "type": f"models.{t}"} for n, (t, p) in enumerate(parts)]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", ["sentence_bert_config", "sentence_xlm-roberta_config"])
@pytest.mark.parametrize(("said", "longest"), [(128, 128), (512, 512), (None, 0)])
def test_a_text_is_cut_where_the_folder_says(tmp_path, name, said, longest):
    files = {name: {"max_seq_length": said, "do_lower_case": False}, "config_sentence_transformers": {"prompts": {}}}
    found = sentence_encoder(write(tmp_path, **files), FOUND)
    assert found.longest_text == longest
    assert found.settings == {"normalize": True} and found.model.pooling.kind == "first"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sentence_bert_config", {"max_seq_length": 513}, "must be a number of at most 512 tokens, got 513"),
        ("sentence_bert_config", {"max_seq_length": "long"}, "must be a number of at most 512 tokens"),
        ("sentence_bert_config", {"do_lower_case": True}, "it has do_lower_case=True"),
        ("sentence_bert_config", [], "must be an object of keys"),
        ("config_sentence_transformers", {"default_prompt_name": "query"}, "it has default_prompt_name='query'"),
    ],
)
def test_what_changes_texts_is_refused(tmp_path, name, values, message):
    with pytest.raises(UserError, match=message):
        sentence_encoder(write(tmp_path, **{name: values}), FOUND)
