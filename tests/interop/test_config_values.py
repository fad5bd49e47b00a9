"""Whatever a key of a config.json holds, it is read or refused in a sentence, at once: every family, every key."""

import json
import time

import pytest

from transformer.interop.family import FAMILIES, repeated, typed_number
from transformer.model_config import AttentionConfig, BlockConfig
from transformer.types import UserError

HUGE = 10**400
VALUES = (
    *(None, True, False, 0, 1, -1, 3, 2**20, 10**9, 2**31, 2**63, HUGE, -HUGE),
    *(0.0, -0.5, 1.5, 1e-300, 1e300, float("nan"), float("inf")),
    *("", "x", "relu", "gelu_new", "x" * 10**4),
    *([], [None], [[1]], [{}], [1, 0], ["full_attention"], ["full_attention"] * 10**4, [0.5] * 4, [HUGE]),
    *(
        {},
        {"a": 1},
        {"rope_type": []},
        {"rope_type": "yarn"},
        {"rope_type": "yarn", "factor": HUGE, "rope_theta": HUGE},
    ),
    {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [[1]], "long_factor": [None]},
    {"rope_type": "linear", "factor": 0, "rope_theta": 1},
    {"full_attention": {"rope_type": {}}, "sliding_attention": []},
)
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "intermediate_size", "d_ff"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "num_attention_heads", "num_heads", "n_head"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "num_key_value_heads": 1,
    "pad_token_id": 1,
}
EXTRA = (
    *("architectures", "rope_parameters", "rope_scaling", "layer_types", "no_rope_layers", "partial_rotary_factor"),
    *("sliding_window_pattern", "dense_act_fn", "is_gated_act", "scale_decoder_outputs", "num_local_experts"),
    *("problem_type", "id2label", "quantization_config", "num_decoder_layers", "use_bidirectional_attention"),
)


def small(family):
    return {
        "model_type": family.kind,
        **{k: v for k, v in SMALL.items() if k in family.defaults or k == "pad_token_id"},
    }


@pytest.mark.parametrize("kind", FAMILIES.names)
def test_any_value_is_read_or_refused(kind):
    family, read, messages = FAMILIES.find(kind)(), 0, []
    base = small(family)
    family.pretrained(base, "config.json", ())
    first = list(FAMILIES.names).index(kind)
    for number, name in enumerate(dict.fromkeys((*family.defaults, *EXTRA))):
        for value in VALUES[(number + first) % 3 :: 3]:  # families that share code have the others
            start = time.process_time()
            try:
                found, _ = family.pretrained({**base, name: value}, "config.json", ())
                assert found.model.num_layers <= 1024
                read += 1
            except UserError as error:
                messages.append(f"{error}")
            assert time.process_time() - start < 2, f"{name} = {value!r:.80}"
    assert read > 10 and len(messages) > 80
    assert max(map(len, messages)) < 350 and all("config.json" in message for message in messages)


@pytest.mark.parametrize("kind", FAMILIES.names)
def test_what_is_read_can_be_written(kind):
    """The config.json of each family survives being read and written, JSON included."""
    family = FAMILIES.find(kind)()
    found, _ = family.pretrained(small(family), "config.json", ())
    values = json.loads(json.dumps({"model_type": kind, **family.write(found.model)}))
    again, _ = family.pretrained(values, "config.json", ())
    assert again.model == found.model


def test_an_inner_width_that_is_not_given_is_four_times_the_models():
    family = FAMILIES.find("gpt2")()
    found, _ = family.pretrained({**small(family), "n_inner": None}, "config.json", ())
    assert found.model.blocks[0].feed_forward.resolved_hidden_dim(found.model.embed_dim) == 4 * SMALL["n_embd"]


ROTARIES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "beta_fast": 20.0, "attention_factor": 1.25, "original_max_position_embeddings": 512},
    "longrope": {
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("scaling", ROTARIES)
def test_scaled_positions_and_rotated_fractions_are_read_and_written(scaling):
    family = FAMILIES.find("phi3")()
    rotary = {"rope_type": scaling, "rope_theta": 500.0, "partial_rotary_factor": 0.5, **ROTARIES[scaling]}
    found, _ = family.pretrained({**small(family), "rope_parameters": rotary}, "config.json", ())
    positions = found.model.positions
    assert (positions.scaling, positions.fraction, positions.theta) == (scaling, 0.5, 500.0)
    assert scaling == "longrope" or positions.scaling_factor == rotary["factor"]
    values = json.loads(json.dumps({"model_type": "phi3", **family.write(found.model)}))
    again, _ = family.pretrained(values, "config.json", ())
    assert again.model == found.model


@pytest.mark.parametrize("value", [0.0, -1e-300, float("inf"), 0, True, "1"])
def test_a_number_that_must_be_positive_is(value):
    with pytest.raises(UserError, match=r"rms_norm_eps must be a positive number, got"):
        typed_number(value, float, "rms_norm_eps")
    assert typed_number(1e-300, float, "rms_norm_eps") == 1e-300


def test_a_pattern_is_the_shortest_that_repeats():
    a, b = BlockConfig(), BlockConfig(AttentionConfig(window=4))
    for names, first, pattern in (
        ("ababa", "", "ab"),
        ("aab", "", "aab"),
        ("abbb", "a", "b"),
        ("abab", "a", "ba"),
        ("aaaa", "", "a"),
    ):
        blocks = [{"a": a, "b": b}[name] for name in names]
        found = repeated(blocks, len(first))
        assert found["first"] == tuple(blocks[: len(first)]) and found["num_layers"] == len(blocks)
        assert found["pattern"] == tuple({"a": a, "b": b}[name] for name in pattern), names
