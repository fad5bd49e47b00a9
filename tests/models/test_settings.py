"""Every number of a model's config reaches the model: changing it changes the output, a shape, or is refused."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import NORMS, PATTERNS, POOLINGS, POSITIONS
from transformer.models.classifier import Classifier
from transformer.models.decoder import Decoder
from transformer.models.encoder import Encoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.patterns.strided import StridedPattern
from transformer.types import UserError

MODELS = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder, "classifier": Classifier}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 11, (2, 8)), jnp.int32)
SPARSE = [{"attention": {"pattern": p}} for p in (StridedPattern(1, 3), FixedPattern(1, 3))]

YARN = {
    **{"scaling": "yarn", "scaling_factor": 4.0, "original_length": 64, "theta": 100.0},
    **{"beta_slow": 0.5, "truncate": False},
}

# By the path of a number: another value, and the settings with which it counts, in the form of `make_config`'s arguments.
NUMBERS = {
    "vocab_size": (17, {}),
    "max_length": (16, {"positions": {"kind": "learned"}}),
    "num_layers": (2, {}),
    "decoder_layers": (2, {}),
    "embed_dim": (16, {}),
    "memory_length": (4, {}),
    "logits_soft_cap": (0.1, {}),
    "logits_scale": (0.5, {}),
    "token_types": (2, {}),
    "dropout": (0.5, {}),
    "init_std": (0.5, {}),
    "positions.theta": (10.0, *({"positions": {"kind": k}} for k in ("rotary", "sinusoidal", "transformer_xl"))),
    "positions.fraction": (0.5, {"positions": {"kind": "rotary"}}),
    "positions.scaling_factor": (
        4.0,
        *({"positions": {"scaling": scaling, "original_length": 4}} for scaling in ("linear", "llama3")),
    ),
    "positions.original_length": (4, {"positions": {"scaling": "llama3", "scaling_factor": 4.0}}),
    "positions.low_factor": (3.0, {"positions": {"scaling": "llama3", "scaling_factor": 4.0, "original_length": 16}}),
    "positions.high_factor": (1.5, {"positions": {"scaling": "llama3", "scaling_factor": 4.0, "original_length": 16}}),
    "positions.beta_fast": (1.5, {"positions": YARN}),
    "positions.beta_slow": (0.2, {"positions": YARN}),
    "positions.attention_factor": (3.0, {"positions": YARN}),
    "positions.offset": (2, {"positions": {"kind": "learned"}}),
    "positions.num_buckets": (16, {"positions": {"kind": "t5"}}),
    "positions.max_distance": (5, {"positions": {"kind": "t5", "num_buckets": 8}}),
    "pattern.attention.num_heads": (4, {}),
    "pattern.attention.num_kv_heads": (1, {}),
    "pattern.attention.head_dim": (2, {}),
    "pattern.attention.query_scale": (0.1, {}),
    "pattern.attention.window": (2, {}),
    "pattern.attention.pattern.block_size": (2, *SPARSE),
    "pattern.attention.pattern.stride": (2, *SPARSE),
    "pattern.attention.pattern.summary": (2, SPARSE[1]),
    "pattern.attention.logits_soft_cap": (0.1, {}),
    "pattern.attention.dropout": (0.5, {}),
    "pattern.feed_forward.hidden_dim": (12, {}, {"feed_forward": {"num_experts": 4}}),
    "pattern.feed_forward.num_experts": (4, {}),
    "pattern.feed_forward.experts_per_token": (1, {"feed_forward": {"num_experts": 4}}),
    "pattern.norm.epsilon": (
        0.5,
        *({"norm": {"kind": k, "placement": p}} for k in ("layer_norm", "rms_norm") for p in ("pre", "post")),
        {"norm": {"placement": "sandwich"}, "attention": {"qk_norm": True}},
    ),
}
# Of the others, these say nothing to some models.
ONLY = {
    "decoder_layers": ("encoder_decoder",),
    "memory_length": ("decoder",),
    "token_types": ("encoder", "classifier"),
    "logits_scale": tuple(MODELS)[:3],
}


def numbers(config, path=""):
    """The paths of all int and float fields of a config, and of the dataclasses in it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        value = value[0] if isinstance(value, tuple) and value else value
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{path}{field.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path + field.name


def replaced(config, path, value):
    name, _, inner = path.partition(".")
    if inner:
        old = getattr(config, name)
        value = (replaced(old[0], inner, value),) if isinstance(old, tuple) else replaced(old, inner, value)
    return dataclasses.replace(config, **{name: value})


def of_kind(family, settings):
    settings = dict(settings)
    return family.find(settings.pop("kind", family.names[0]))(**settings)


def make_config(name, *, attention=(), feed_forward=(), norm=(), positions=(), **changes):
    block = BlockConfig(
        AttentionConfig(**{"num_heads": 2, **dict(attention)}),
        FeedForwardConfig(**{"hidden_dim": 8, **dict(feed_forward)}),
        of_kind(NORMS, norm),
    )
    return ModelConfig(
        pattern=(block,),
        positions=of_kind(POSITIONS, positions),
        **{"vocab_size": 11, "max_length": 8, "num_layers": 1, "embed_dim": 8, **changes},
    )


def build(name, config):
    """The model, the tokens it reads, and arguments with which it uses all its parameters."""
    arguments = {"method": "logits"} if name == "encoder" else {}
    if config.memory_length:
        # Positions behind a memory of ones, all of which they continue.
        memory = jnp.ones((len(TOKENS), config.num_layers, config.memory_length, config.embed_dim))
        arguments = {"memory_BLPD": memory, "positions_BT": config.memory_length + jnp.arange(8)[None]}
    own = {"num_classes": 3} if name == "classifier" else {}
    return MODELS[name](config, **own), (TOKENS,) * (2 if name == "encoder_decoder" else 1), arguments


@functools.cache
def shapes(name, config):
    model, tokens, arguments = build(name, config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *tokens, **arguments))["params"]


@functools.cache
def logits(name, config):
    """In training, of fixed parameters; small ones, for an epsilon to count beside their squares."""
    model, tokens, arguments = build(name, config)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * random.standard_normal(x.shape), x.dtype), shapes(name, config))
    # Not compiled: operations are shared among configs, whole programs are not.
    out = model.apply({"params": params}, *tokens, train=True, rngs={"dropout": jax.random.key(0)}, **arguments)
    return np.asarray(out[0] if isinstance(out, tuple) else out)


def test_the_table_has_every_number():
    configs = [make_config("decoder", positions={"kind": kind}) for kind in POSITIONS.names if kind != "inherit"]
    configs += [make_config("decoder", attention={"pattern": PATTERNS.find(kind)()}) for kind in PATTERNS.names]
    configs += [make_config("decoder", norm={"kind": kind}) for kind in NORMS.names]
    assert set(NUMBERS) == {path for config in configs for path in numbers(config)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("path", [path for path in NUMBERS if path != "init_std"])
def test_a_number_changes_the_output_a_shape_or_is_refused(path, name):
    value, *situations = NUMBERS[path]
    # All kinds in a decoder, the first of them in the others, whose layers are the same.
    situations = situations[: None if name == "decoder" else 1]
    for settings in situations if name in ONLY.get(path, MODELS) else ():
        config = make_config(name, **settings)
        try:
            changed = replaced(config, path, value)
        except UserError:
            continue
        if shapes(name, config) == shapes(name, changed):
            assert np.abs(logits(name, config) - logits(name, changed)).max() > 1e-4, settings


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["learned", "t5", "transformer_xl"])
def test_a_number_reaches_every_sub_layer(name, kind):
    """What modules hold under these names; an output can change though one of several sub-layers kept its default."""
    config = make_config(
        name,
        norm={"kind": "rms_norm", "placement": "sandwich", "epsilon": 0.123},
        attention={"qk_norm": True},
        feed_forward={"num_experts": 2},
        positions={"kind": kind, **({"theta": 77.0} if kind == "transformer_xl" else {})},
        tie_embeddings=False,
        pooling=POOLINGS.find("attention")(),
        init_std=0.456,
        dropout=0.789,
    )
    expected = {"epsilon": 0.123, "init_std": 0.456, "rate": 0.789, "theta": 77.0}
    seen = set()

    def look(call, args, kwargs, context):
        module = context.module
        for attribute, value in expected.items():
            config, runtime = getattr(module, "config", None), getattr(module, "runtime", None)
            if isinstance(config, ModelConfig):
                runtime = runtime.of(config)
            for part in (module, runtime, config):
                if hasattr(part, attribute):
                    seen.add(attribute)
                    assert getattr(part, attribute) == value, f"{'/'.join(module.path)}.{attribute}"
        return call(*args, **kwargs)

    model, tokens, arguments = build(name, config)
    with nn.intercept_methods(look):
        jax.eval_shape(lambda: model.init(jax.random.key(0), *tokens, **arguments))
    assert seen == set(expected) - ({"theta"} if kind != "transformer_xl" else set())
