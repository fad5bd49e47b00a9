"""Folders of pretrained models that are damaged, incomplete or harmful: each is refused in one short sentence, at once."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pretrained_folders import LLAMA, described, llama_tensors, packed, write_folder, write_index, write_pieces

from transformer import load
from transformer.interop.folder import Folder
from transformer.runs.pretrained import import_model
from transformer.types import UserError

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
SECONDS, BYTES = 5, 10**9
CASES = {}


def case(function=None, *, match="."):
    """A function that spoils a good folder."""

    def register(function):
        CASES[function.__name__.replace("_", " ")] = function, match
        return function

    return register if function is None else register(function)


def config(path, **changes):
    values = {**LLAMA, **changes}
    (path / "config.json").write_text(json.dumps(values))


def change_header(path, name, **changes):
    header, body = described(llama_tensors())
    header[name] = {key: value for key, value in {**header[name], **changes}.items() if value is not None}
    (path / WEIGHTS).write_bytes(packed(header, body))


# ---- Files ---------------------------------------------------------------------------------------------------------------


@case(match=r"config\.json")
def no_config(path):
    (path / "config.json").unlink()


@case(match="object")
def config_is_a_list(path):
    (path / "config.json").write_text("[1, 2]")


@case(match="JSON")
def config_is_cut(path):
    (path / "config.json").write_text('{"model_type": "llama", ')


@case(match="JSON")
def config_is_no_text(path):
    (path / "config.json").write_bytes(b"\xff\xfe\x00\x01" * 100)


@case(match="model_type")
def unknown_model_type(path):
    config(path, model_type="lama")


@case(match="model_type")
def model_type_is_a_list(path):
    config(path, model_type=["llama"])


@case(match="architectures")
def unknown_architecture(path):
    config(path, architectures=["LlamaForTokenClassification"])


@case(match="architectures")
def architecture_is_a_list(path):
    config(path, architectures=[["LlamaForCausalLM"]])


@case(match="quantization_config")
def quantised(path):
    config(path, quantization_config={"quant_method": "gptq"})


@case(match=r"model\.safetensors")
def no_weights(path):
    (path / WEIGHTS).unlink()


@case(match="save_pretrained")
def a_pickle_only(path):
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


@case(match="both")
def index_and_single_file(path):
    write_folder(path)
    single = (path / WEIGHTS).read_bytes()
    write_pieces(path)
    (path / WEIGHTS).write_bytes(single)


@case(match="00002-of-00002")
def missing_piece(path):
    write_pieces(path)
    (path / "model-00002-of-00002.safetensors").unlink()


@case(match="piece")
def index_names_another_piece(path):
    where = write_pieces(path)
    write_index(path, {**where, "lm_head.weight": "model-00001-of-00002.safetensors"})


@case(match="piece")
def index_names_a_tensor_that_is_not_there(path):
    where = write_pieces(path)
    write_index(path, {**where, "model.other": "model-00001-of-00002.safetensors"})


@case(match="piece")
def index_lacks_a_tensor(path):
    where = write_pieces(path)
    del where["lm_head.weight"]
    write_index(path, where)


def _strange_piece(name):
    def spoil(path):
        where = write_pieces(path)
        write_index(path, {**where, "lm_head.weight": name})

    return spoil


for _number, _name in enumerate(
    ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x" * 10**6, "a\0.safetensors", 3, None, ["a"])
):
    CASES[f"piece called {_name!r:.20}"] = _strange_piece(_name), "index"


@case(match="weight_map")
def index_is_a_list(path):
    write_pieces(path)
    (path / INDEX).write_text("[]")


@case(match="weight_map")
def index_is_empty(path):
    write_pieces(path)
    write_index(path, {})


@case(match="JSON")
def index_is_cut(path):
    write_pieces(path)
    (path / INDEX).write_text('{"weight_map": {')


@case(match="once")
def a_tensor_in_two_pieces(path):
    write_pieces(path)
    (path / "model-00001-of-00002.safetensors").write_bytes(packed(*described(llama_tensors())))


@case(match="regular file")
def weights_are_a_directory(path):
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()


@case(match="regular file")
def weights_are_a_link_to_a_directory(path):
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(path)


@case(match=r"model\.safetensors")
def weights_are_a_dangling_link(path):
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(path / "nowhere")


@case(match=r"model\.safetensors")
def weights_are_a_link_to_themselves(path):
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(path / WEIGHTS)


@case(match=r"config\.json")
def config_is_a_link_to_itself(path):
    (path / "config.json").unlink()
    (path / "config.json").symlink_to(path / "config.json")


def _pipe(name):
    def spoil(path):
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return spoil


UNREAD = {"a small file is no text", "a small file is large"}
"""Cases of files that `load` does not look at."""
_SMALL = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
for _name in ("config.json", WEIGHTS, INDEX, "tokenizer.json", "tokenizer.model", *_SMALL):
    CASES[f"{_name} is a pipe"] = _pipe(_name), re.escape(_name)
    UNREAD |= {f"{_name} is a pipe"} if _name in _SMALL else set()


@case(match=r"generation_config\.json")
def a_small_file_is_no_text(path):
    (path / "generation_config.json").write_bytes(b"\xff\xfe\xfd")


@case(match="bytes")
def a_small_file_is_large(path):
    with (path / "chat_template.jinja").open("wb") as file:
        file.truncate(3 * 10**9)


# ---- Headers -------------------------------------------------------------------------------------------------------------


@case(match="truncated")
def weights_are_empty(path):
    (path / WEIGHTS).write_bytes(b"")


@case(match="truncated")
def weights_are_seven_bytes(path):
    (path / WEIGHTS).write_bytes(b"1234567")


@case(match="truncated")
def weights_lack_a_byte(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[:-1])


@case(match="truncated")
def weights_have_a_byte_more(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content + b"\0")


@case(match="truncated")
def header_is_longer_than_the_file(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes((len(content) + 1).to_bytes(8, "little") + content[8:])


@case(match="200000000")
def header_of_200_megabytes(path):
    with (path / WEIGHTS).open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)


@case
def header_of_2_to_the_63(path):
    (path / WEIGHTS).write_bytes(b"\xff" * 1000)


@case(match="JSON")
def header_is_no_json(path):
    (path / WEIGHTS).write_bytes(packed(b"\x00" * 100, b""))


@case(match="JSON")
def header_is_a_list(path):
    (path / WEIGHTS).write_bytes(packed([1], b""))


@case(match="once")
def header_names_a_tensor_twice(path):
    entry = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    (path / WEIGHTS).write_bytes(packed(b"{" + entry + b", " + entry + b"}", b"1234"))


@case(match="JSON")
def header_is_nested_deeply(path):
    (path / WEIGHTS).write_bytes(packed(b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", b""))


@case
def header_is_nested(path):
    (path / WEIGHTS).write_bytes(packed(b'{"a": ' + b"[" * 800 + b"]" * 800 + b"}", b""))


@case(match="metadata")
def metadata_of_numbers(path):
    header, body = described(llama_tensors())
    (path / WEIGHTS).write_bytes(packed({"__metadata__": {"format": 3}, **header}, body))


@case(match="once|gap")
def tensors_overlap(path):
    change_header(path, "model.norm.weight", data_offsets=[0, 32])


@case(match="gap")
def a_gap(path):
    header, body = described(llama_tensors())
    for entry in header.values():
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    (path / WEIGHTS).write_bytes(packed(header, b"\0\0\0\0" + body))


_ENTRIES = {
    "offsets beyond the end": {"data_offsets": [10**7, 10**7 + 32]},
    "offsets of 2 to the 62": {"data_offsets": [2**62, 2**62 + 32]},
    "offsets of 2 to the 70": {"data_offsets": [2**70, 2**70 + 32]},
    "offsets in turn": {"data_offsets": [32, 0]},
    "negative offsets": {"data_offsets": [-32, 0]},
    "offsets of floats": {"data_offsets": [0.0, 32.0]},
    "one offset": {"data_offsets": [0]},
    "no offsets": {"data_offsets": None},
    "a negative size": {"shape": [-8]},
    "two negative sizes": {"shape": [-8, -1]},
    "a size of a float": {"shape": [8.0]},
    "a size of true": {"shape": [True] * 3},
    "a size of a text": {"shape": ["8"]},
    "a huge size": {"shape": [2**70]},
    "huge sizes": {"shape": [2**62, 2**62, 0]},
    "very many sizes": {"shape": [2**62] * 200_000},
    "very many sizes of one": {"shape": [8] + [1] * 200_000},
    "a shape of a number": {"shape": 8},
    "no shape": {"shape": None},
    "an unknown dtype": {"dtype": "F8_E4M3"},
    "a dtype of no kind": {"dtype": "x" * 10**6},
    "a dtype of a list": {"dtype": ["F32"]},
    "no dtype": {"dtype": None},
    "integers": {"dtype": "I32"},
}
for _name, _entry in _ENTRIES.items():
    CASES[_name] = (lambda path, entry=_entry: change_header(path, "model.norm.weight", **entry)), "."


# ---- Tensors -------------------------------------------------------------------------------------------------------------


def _tensors(path, **changes):
    tensors = {**llama_tensors(), **changes}
    write_folder(path, LLAMA, {name: values for name, values in tensors.items() if values is not None})


@case(match="no place")
def an_extra_tensor(path):
    _tensors(path, **{"model.layers.0.self_attn.q_proj.bias": np.zeros(8, np.float32)})


@case(match="no place")
def a_layer_too_many(path):
    config(path, num_hidden_layers=1)


@case(match="lacks")
def a_layer_too_few(path):
    config(path, num_hidden_layers=3)


@case(match=r"lacks model\.norm\.weight")
def a_missing_tensor(path):
    _tensors(path, **{"model.norm.weight": None})


@case(match=r"model\.norm\.weight has \[4, 2\]")
def a_wrong_shape(path):
    _tensors(path, **{"model.norm.weight": np.zeros((4, 2), np.float32)})


@case(match="no place")
def a_long_name(path):
    _tensors(path, **{"n" * 10**6: np.zeros(1, np.float32)})


@case(match="differ")
def a_tied_output_differs_by_a_bit(path):
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"].view(np.uint32)[10, 7] ^= 1
    write_folder(path, {**LLAMA, "tie_word_embeddings": True}, tensors)


@case(match="one type")
def several_types(path):
    _tensors(path, **{"model.norm.weight": np.zeros(8, np.float16)})


@case(match="one type|floating")
def all_integers(path):
    write_folder(path, LLAMA, {name: values.astype(np.int8) for name, values in llama_tensors().items()})


# ---- Configs -------------------------------------------------------------------------------------------------------------

_WRONG = {
    "num_hidden_layers": (10**9, 2**31, 2**70, 0, -1, 2.0, "2", True, None, [2], 10**400),
    "hidden_size": (10**9, 2**31, 0, -8, 8.0, "8", True, float("nan")),
    "vocab_size": (2**31, 10**9, 2**70, 0, -11, 11.0, "11", True),
    "intermediate_size": (10**9, 2**31, 0, -12, 12.0),
    "num_attention_heads": (10**9, 2**31, 0, -2, 3, True, 2.0),
    "num_key_value_heads": (10**9, 0, -1, 3, 1.0, True),
    "head_dim": (10**9, 0, -4, 4.0, "4"),
    "max_position_embeddings": (2**31, 0, -1, 16.0, "16"),
    "rms_norm_eps": (float("nan"), float("inf"), -1.0, "1e-6", True, 10**400),
    "rope_theta": (float("nan"), float("inf"), 0.0, -1.0, "1e4", True, None, 10**400),
    "rope_scaling": ([], "linear", {"rope_type": []}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": "x"}),
    "rope_parameters": (3, {"rope_theta": [1.0]}, {"rope_type": "default", "x" * 10**5: 1}, {"rope_type": "other"}),
    "hidden_act": ("mish", 3, ["silu"], "s" * 10**6),
    "tie_word_embeddings": (1, "false", 0.0, [True]),
    "attention_bias": (1, "no"),
    "x" * 10**6: (1,),
    "an_unknown_key": ([[[]]] * 10**5,),
}
for _key, _values in _WRONG.items():
    for _value in _values:
        CASES[f"{_key:.30} = {str(_value)[:30] if _value != 10**400 else '10**400'}"] = (
            (lambda path, changes={_key: _value}: config(path, **changes)),
            ".",
        )


@case(match="bytes")
def config_of_50_megabytes(path):
    config(path, pad=["x"] * 10**7)


def _nested(depth):
    def spoil(path):
        text = json.dumps(LLAMA)[:-1] + ', "rope_scaling": ' + '{"a":' * depth + "1" + "}" * depth + "}"
        (path / "config.json").write_text(text)

    return spoil


for _depth in (100, 900, 990, 5_000, 10**6):
    CASES[f"config nested {_depth} times"] = _nested(_depth), "."


# ---- The tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def ready():
    """What the first load of a process costs is no part of a case."""
    with pytest.raises(UserError):
        load("/nowhere")


@contextlib.contextmanager
def at_most(seconds):
    """Fail where a block waits, for the writer of a pipe as an example."""

    def stop(number, frame):
        raise TimeoutError(f"not ended after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_good_folders_are_read(tmp_path):
    write_folder(tmp_path / "one")
    write_pieces(tmp_path / "two")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    np.testing.assert_array_equal(
        np.asarray(one.params["output"]["kernel"]), llama_tensors()["lm_head.weight"].T, strict=True
    )
    np.testing.assert_array_equal(one.params["output"]["kernel"], two.params["output"]["kernel"])


def test_links_are_followed(tmp_path):
    """The caches of Hugging Face are made of links."""
    write_folder(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", WEIGHTS):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    load(tmp_path / "snapshot")


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_folder_is_refused(name, tmp_path):
    spoil, match = CASES[name]
    path = write_folder(tmp_path / "hf")
    spoil(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.process_time()
    with at_most(6 * SECONDS), pytest.raises(UserError, match=match) as refused:
        import_model(path, tmp_path / "run")
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < BYTES
    message = str(refused.value).replace(str(tmp_path), "")
    assert len(message) < 400 and "\n" not in message.strip()
    assert not (tmp_path / "run").exists()
    with at_most(6 * SECONDS), contextlib.nullcontext() if name in UNREAD else pytest.raises(UserError) as again:
        load(path)
    assert again is None or len(str(again.value).replace(str(tmp_path), "")) < 400


def test_types_that_are_chosen_are_checked_before_anything_is_written(tmp_path):
    """With --dtype no common type is needed, but integers, or floats of 8 bits, are no parameters by themselves."""
    path = write_folder(tmp_path / "hf")
    for spoil in (CASES["all integers"][0], CASES["an unknown dtype"][0]):
        spoil(path)
        with pytest.raises(UserError, match="type"):
            import_model(path, tmp_path / "run", dtype="float32")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["a pickle only", "missing piece", "num_hidden_layers = 1000000000", "an extra tensor", "config is cut"]
)
def test_the_command_line_says_so_in_a_line(name, tmp_path):
    path = write_folder(tmp_path / "hf")
    CASES[name][0](path)
    command = [sys.executable, "-m", "transformer", "import", path, "--workdir", tmp_path / "run"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_header_alone_is_read_to_open_a_folder(tmp_path):
    """Opening costs no memory for the weights."""
    path = write_folder(tmp_path / "hf")
    folder = Folder(path)
    assert not folder._maps
