"""`transformer inspect HF_DIR`: what a pretrained folder is, without its weights and without the libraries that made it."""

import json
import re

import numpy as np
import pytest
from tiny_tokenizers import byte_level, folder

from transformer.cli.inspect import _ranges
from transformer.cli.main import main

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
BLOCK = {
    "input_layernorm": (8,),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "post_attention_layernorm": (8,),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}
SHAPES = {
    "model.embed_tokens.weight": (384, 8),
    **{f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in BLOCK.items()},
    "model.norm.weight": (8,),
    "lm_head.weight": (384, 8),
}
PARAMETERS = sum(int(np.prod(shape)) for shape in SHAPES.values())


def write(path, shapes, dtypes=None, **changes):
    """A folder whose tensors are zeros, of float16 but for some."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({k: v for k, v in (CONFIG | changes).items() if v is not None}))
    header, end = {}, 0
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, "F16")
        start, end = end, end + int(np.prod(shape)) * int(dtype[1:]) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(end))
    return path


@pytest.fixture
def model(tmp_path):
    path = write(tmp_path / "tiny", SHAPES | {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)})
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    return folder(path, byte_level(), named, generation_config={"eos_token_id": [309, 310]})


@pytest.fixture
def inspected(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def inspect(path, *flags, code=0):
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as ended:
                main(["inspect", str(path), *flags])
            assert ended.value.code == code
            return capsys.readouterr().err
        main(["inspect", str(path), *flags])
        return capsys.readouterr().out

    return inspect


def line(text, name):
    (found,) = re.findall(rf"^ *{name}  +(\S.*?) *$", text, re.MULTILINE)
    return found


def test_a_folder_is_described_and_no_weight_is_read(model, inspected, monkeypatch):
    monkeypatch.setattr("transformer.interop.folder.Folder.view", None)
    text = inspected(model)
    assert max(map(len, text.splitlines())) <= 80
    assert {
        name: line(text, name)
        for name in ("family", "objective", "parameters", "layers", "heads", "vocabulary", "longest sequence")
    } == {
        "family": "llama, LlamaForCausalLM",
        "objective": "next_token",
        "parameters": f"{PARAMETERS:,} in float16",
        "layers": "2, of width 8",
        "heads": "2 of queries, 1 of keys and values, width 4",
        "vocabulary": "384",
        "longest sequence": "2,048 tokens",
    }
    assert line(text, "stored") == f"{2 * PARAMETERS + 4:,} bytes; tensors: {len(SHAPES) + 1} of float16"
    assert line(text, "tokenizer") == "pretrained, 312 ids"
    assert line(text, "end_of_text") == "309 </s>" and line(text, "stop") == "309 </s>, 310 <|turn|>"
    assert line(text, "chat template") == "yes"
    assert line(text, "ignored keys") == "architectures, use_cache"
    assert line(text, "ignored tensors") == "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert f"{PARAMETERS:,} parameters, vocabulary 384" in text and "384×8" in text and "float16" in text


def test_a_folder_without_a_tokenizer_in_another_type(tmp_path, inspected):
    path = write(tmp_path / "bare", SHAPES, {"model.norm.weight": "F32"}, architectures=None)
    assert "must have one type of float32, float16 or bfloat16" in inspected(path, code=2)
    text = inspected(path, "--dtype", "bfloat16")
    assert line(text, "family") == "llama, LlamaForCausalLM"
    assert line(text, "parameters") == f"{PARAMETERS:,} in bfloat16"
    assert line(text, "stored").endswith(f"tensors: {len(SHAPES) - 1} of float16, 1 of float32")
    assert line(text, "tokenizer").startswith("none") and "chat template" not in text
    assert line(text, "ignored tensors") == "none"


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        (SHAPES, {"novel": 3}, "must have keys that are known for this model_type, it has novel=3"),
        (SHAPES, {"model_type": "lama"}, "model_type must be one of"),
        (SHAPES | {"model.extra.weight": (2,)}, {}, "must hold no tensor that has no place in the model"),
        (SHAPES | {"model.norm.weight": (9,)}, {}, "must have the shapes that its config.json says"),
    ],
)
def test_what_import_refuses_is_refused_in_its_words(tmp_path, inspected, capsys, shapes, changes, message):
    path = write(tmp_path / "other", shapes, **changes)
    error = inspected(path, code=2)
    assert message in error
    with pytest.raises(SystemExit):
        main(["import", str(path), "--workdir", str(tmp_path / "run")])
    assert capsys.readouterr().err == error


def test_a_model_larger_than_memory_is_described(model, inspected, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("transformer.memory.device_memory", lambda: 1000)
    with pytest.raises(SystemExit):
        main(["import", str(model), "--workdir", str(tmp_path / "run")])
    assert "Memory must hold" in capsys.readouterr().err
    assert line(inspected(model), "parameters") == f"{PARAMETERS:,} in float16"


def test_other_directories_are_refused(tmp_path, inspected):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert "or the directory of a run" in inspected(tmp_path / "run", code=2)
    assert "must have a file config.json" in inspected(tmp_path / "empty", code=2)
    assert "takes no 'more' there" in inspected(tmp_path / "empty", "more", code=2)
    assert "which does not exist" in inspected(tmp_path / "none", code=2)


def test_names_of_a_folder_are_no_commands_of_a_terminal(model, inspected):
    path = model.parent / "a\x1b[31mb[bold]"
    model.rename(path)
    text = inspected(path)
    assert "\x1b" not in text and "a\\x1b[31mb[bold]" in text


@pytest.mark.parametrize(
    ("numbers", "expected"), [(["0"], "0"), (["0", "1", "2"], "0..2"), (["3", "0", "1", "7", "10"], "0..1,3,7,10")]
)
def test_blocks_that_differ_in_their_number_are_one_row(numbers, expected):
    assert _ranges(numbers) == expected


def test_the_parameters_of_both_layers_are_a_row(model, inspected, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = inspected(model)
    assert "decoder/blocks/block_0..1/attention/query/kernel" in text and "block_0/" not in text
