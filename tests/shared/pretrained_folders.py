"""Tiny folders of pretrained models, written byte by byte: no library of theirs is needed."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    jnp.dtype(jnp.bfloat16): "BF16",
    np.dtype(np.int8): "I8",
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def llama_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Of the model that `LLAMA` describes, each element another number."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 8)}
    for layer in range(2):
        below = f"model.layers.{layer}."
        shapes |= {
            f"{below}input_layernorm.weight": (8,),
            f"{below}self_attn.q_proj.weight": (8, 8),
            f"{below}self_attn.k_proj.weight": (4, 8),
            f"{below}self_attn.v_proj.weight": (4, 8),
            f"{below}self_attn.o_proj.weight": (8, 8),
            f"{below}post_attention_layernorm.weight": (8,),
            f"{below}mlp.gate_proj.weight": (12, 8),
            f"{below}mlp.up_proj.weight": (12, 8),
            f"{below}mlp.down_proj.weight": (8, 12),
        }
    shapes |= {"model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def described(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and the bytes that follow it."""
    header, body = {}, b""
    for name, values in tensors.items():
        content = np.ascontiguousarray(values).tobytes()
        header[name] = {
            "dtype": NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    return header, body


def packed(header: Any, body: bytes) -> bytes:
    """A file of a header, which may be bytes of any kind, and what follows it."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + body


def write_folder(
    path: pathlib.Path, values: Any = LLAMA, tensors: Mapping[str, np.ndarray] | None = None
) -> pathlib.Path:
    """A folder with a config and one file of weights."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    (path / "model.safetensors").write_bytes(packed(*described(llama_tensors() if tensors is None else tensors)))
    return path


def write_pieces(path: pathlib.Path, values: Any = LLAMA) -> dict[str, str]:
    """A folder with its weights in two pieces; gives the map of its index."""
    write_folder(path, values)
    (path / "model.safetensors").unlink()
    tensors = llama_tensors()
    names = list(tensors)
    where = {}
    for number, part in enumerate((names[:7], names[7:])):
        piece = f"model-{number + 1:05}-of-00002.safetensors"
        (path / piece).write_bytes(packed(*described({name: tensors[name] for name in part})))
        where |= dict.fromkeys(part, piece)
    write_index(path, where)
    return where


def write_index(path: pathlib.Path, where: Any) -> None:
    """The index of a folder in pieces."""
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
