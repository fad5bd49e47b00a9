"""A user-defined attention backend: one file outside the package, chosen by a config file, from training to generation."""

import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.cli.main import main
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.model_kinds import BACKENDS, AttentionCall
from transformer.models.decoder import Decoder
from transformer.ops.attention import dot_product_attention
from transformer.ops.backends.auto import AutoBackend
from transformer.ops.bias import BiasDescription
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.strided import StridedPattern
from transformer.ops.positions.alibi import AlibiBias
from transformer.parts import Parts, StandIn
from transformer.runs.saved import load
from transformer.types import UserError

OWN = '''
"""Attention without weights."""

import dataclasses

import jax.numpy as jnp

from transformer import BACKENDS, AttentionBackend


@BACKENDS.register
@dataclasses.dataclass(frozen=True)
class MeanBackend(AttentionBackend):
    """The mean of the values that a query sees, whatever the keys are."""

    kind = "mean"
    takes = frozenset({"causal", "query_segment_ids", "key_segment_ids"})
    dtypes = ("float32",)

    def compute(self, call):
        (B, T, H, _), (_, S, G, _) = call.query_BTHK.shape, call.key_BSGK.shape
        seen_BHTS = jnp.broadcast_to(call.mask.to_bool(T, S), (B, H, T, S)).astype(jnp.float32)
        weights_BHTS = seen_BHTS / jnp.maximum(seen_BHTS.sum(axis=-1, keepdims=True), 1)
        return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, jnp.repeat(call.value_BSGK, H // G, axis=2))
'''
CONFIG = """
import mean_backend

from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig

def get_config():
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, implementation="mean")
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(attention),)),
        data=DataConfig(sequence_length=16, batch_size=2),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=2, log_every=1, eval_every=0, checkpoint_every=0, sample_length=0),
    )
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Its class, from a module that a config file finds."""
    (tmp_path / "mean_backend.py").write_text(OWN)
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mean_backend").MeanBackend
    BACKENDS._kinds.pop("mean", None)
    del sys.modules["mean_backend"]


def decoder(**attention):
    block = BlockConfig(AttentionConfig(num_heads=2, **attention))
    return Decoder(ModelConfig(vocab_size=7, max_length=8, num_layers=1, embed_dim=8, pattern=(block,)))


def test_a_config_file_trains_with_it(own, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("a tale of two rows\n" * 60)
    run = tmp_path / "run"
    command = ["train", str(tmp_path / "config.py"), "--data.source", str(tmp_path / "text.txt"), "--workdir", str(run)]
    command += ["--optimizer.weight-decay", "0"]
    main(command)
    assert "attention mean" in capsys.readouterr().err
    before = load(run)
    main([*command, "--training.steps", "4"])
    after = load(run)
    assert json.loads((run / "config.json").read_text())["model"]["pattern"][0]["attention"]["implementation"] == "mean"
    assert Parts(after.config, StandIn(after.config.model.vocab_size)).describe_attention("tpu") == "mean"
    # Means have no use for queries: training leaves the projection where it was, and moves the others.
    old, new = (x.params["decoder"]["blocks"]["block_0"]["attention"] for x in (before, after))
    moved = {role: bool((new[role]["kernel"] != old[role]["kernel"]).any()) for role in new}
    assert moved == {"query": False, "key": False, "value": True, "out": True}
    main(["evaluate", str(run)])
    main(["generate", str(run), "--prompt", "a", "--max-new-tokens", "3"])  # the cache is read by auto
    with pytest.raises(SystemExit):
        main([*command, "--model.attention.window", "4", "--workdir", str(tmp_path / "other")])
    assert "'mean' cannot honour mask.window; use 'auto'" in " ".join(capsys.readouterr().err.split())
    monkeypatch.delitem(BACKENDS._kinds, "mean")
    with pytest.raises(UserError, match=r"attention\.implementation must be one of auto, .*, got 'mean'"):
        load(run)


def test_a_misspelt_name_is_corrected(own, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "config.py"), "--model.attention.implementation", "meen"])
    message = " ".join(capsys.readouterr().err.split())
    assert "model.attention.implementation must be one of auto, xla, blockwise, splash, cudnn" in message
    assert "mean, got 'meen'; did you mean mean?" in message
    with pytest.raises(UserError, match="got 'meen'; did you mean mean"):
        AttentionConfig(implementation="meen")


def test_it_computes_and_refuses_what_it_does_not_take(own):
    query, key, value = (jax.random.normal(jax.random.key(i), (2, 4, 2, 3)) for i in range(3))
    out = dot_product_attention(query, key, value, mask=AttentionMask(causal=True), implementation="mean")
    np.testing.assert_allclose(out[:, 3], value.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(out[:, 0], value[:, 0], atol=1e-6)
    for settings, words in (
        ({"bias": AlibiBias.for_heads(2)}, "a bias"),
        ({"bias": jnp.zeros((1, 1, 4, 4))}, "a bias"),
        ({"logits_soft_cap": 2.0}, r"logits_soft_cap=2\.0"),
        ({"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}, r"dropout_rate=0\.5"),
        ({"mask": AttentionMask(window=2)}, r"mask\.window"),
        ({"mask": AttentionMask(key_lengths=jnp.ones(2, jnp.int32))}, r"mask\.key_lengths"),
        ({"mask": jnp.ones((2, 1, 4, 4), bool)}, "an array as mask"),
    ):
        with pytest.raises(ValueError, match=f"'mean' cannot honour {words}"):
            dot_product_attention(query, key, value, implementation="mean", **settings)
    with pytest.raises(ValueError, match=r"'mean' cannot honour inputs of bfloat16 \(float32 only\)"):
        dot_product_attention(*(x.astype(jnp.bfloat16) for x in (query, key, value)), implementation="mean")


def test_auto_takes_it_where_it_says_so(own, monkeypatch):
    x = jnp.ones((1, 4, 2, 3))
    call = AttentionCall(x, x, x, AttentionMask(causal=True))
    assert AutoBackend().on("cpu", call).kind == "xla"
    monkeypatch.setattr(own, "preferred", lambda self, call, platform: platform == "tpu")
    assert AutoBackend().on("cpu", call).kind == "xla"
    assert AutoBackend().on("tpu", call) == own()
    assert AutoBackend().on("tpu", call._replace(logits_soft_cap=1.0)).kind == "xla"
    assert "platform_index" in str(jax.make_jaxpr(dot_product_attention)(x, x, x))


@pytest.mark.parametrize("name", BACKENDS.names)
def test_a_cache_is_read_by_what_takes_it(name):
    tokens = jnp.array([[1, 2, 3]])
    model = decoder(implementation=name)
    variables = decoder().init(jax.random.key(0), tokens)
    expected, _ = decoder().apply(variables, tokens, cache=decoder().init_cache(1, 4))
    found, _ = model.apply(variables, tokens, cache=model.init_cache(1, 4))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_backend_may_take_is_what_calls_have():
    """A name that is misspelt in `takes` would be refused for ever."""
    x = jnp.ones((1, 4, 2, 3))
    ids = jnp.ones((1, 4), jnp.int32)
    mask = AttentionMask(
        True, 1, StridedPattern(), ids, ids, ids, ids, ids > 0, ids[0], ids[0], jnp.ones((1, 1, 4, 4), bool)
    )
    bias: BiasDescription = AlibiBias.for_heads(2)
    names = {name for name, _ in AttentionCall(x, x, x, mask, bias, 1.0, 1.0, 0.1).demands()}
    for name in BACKENDS.names:
        assert BACKENDS.find(name).takes <= names
    assert BACKENDS.find("xla").takes == BACKENDS.find("auto").takes == names
