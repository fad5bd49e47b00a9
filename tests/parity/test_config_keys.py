"""Every key of every family's config, changed: our logits follow transformers', or the folder is refused."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import ALL, TOKENS, TOLERANCE, VOCABULARY, difference, ours, perturbed, theirs  # noqa: E402

from transformer import load  # noqa: E402
from transformer.types import UserError  # noqa: E402

CASES = [name for name in ALL if "," not in name or name.endswith((", masked", ", classes"))] + ["llama, llama3"]
_NOT_OF_THE_MODEL = {"architectures", "model_type", "dtype", "transformers_version", "id2label", "label2id"}
OTHERS = {
    "hidden_act": ["relu", "silu", "gelu_new"],
    "hidden_activation": ["gelu", "silu"],
    "activation_function": ["relu", "gelu"],
    "feed_forward_proj": ["gated-gelu", "gated-silu", "relu", "gelu", "silu"],
    "classifier_activation": ["relu"],
    "position_embedding_type": ["relative_key"],
    "sliding_window": [3, 11, None],
    "layer_types": [["full_attention"] * 4, ["sliding_attention", "full_attention"] * 2],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 77.0},
        {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
        {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    ],
    "no_rope_layers": [[1, 0, 1, 0], [1, 1, 1, 1]],
    "mlp_only_layers": [[], [0, 3]],
    "problem_type": ["regression"],
}


def alternatives(key, value):
    """Other values of a key, of its own type."""
    if key in OTHERS:
        return [other for other in OTHERS[key] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value, max(1, value // 2)]
    if isinstance(value, float):
        return [2 * value + 0.25, 0.0]
    if value is None:
        return [1, True, 0.5, "eager"]
    return []


def changed(case, values, key, value, path):
    """transformers' own model with the changed config, saved; None where it refuses the config itself."""
    kind = getattr(transformers, case.config)
    try:
        config = kind.from_dict({**values, key: value, "_attn_implementation": "eager"})
        torch.manual_seed(0)
        model = perturbed(getattr(transformers, case.model)(config))
        expected = theirs(model, TOKENS % min(VOCABULARY, config.vocab_size))
        model.save_pretrained(path)
    except Exception:
        return None
    written = json.loads((path / "config.json").read_text())
    # The class may write another value than it was given; the file of a user has the given one.
    (path / "config.json").write_text(json.dumps({**written, key: value}))
    return expected


@pytest.mark.parametrize("name", CASES)
def test_a_changed_key_is_followed_or_refused(name, tmp_path):
    case = ALL[name]
    case.build().save_pretrained(tmp_path / "base")
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    wrong, followed, refused = [], 0, 0
    for key in sorted(set(values) - _NOT_OF_THE_MODEL):
        for number, value in enumerate(alternatives(key, values[key])):
            path = tmp_path / f"{key}-{number}"
            expected = changed(case, values, key, value, path)
            if expected is None or not np.isfinite(expected).all():
                continue
            try:
                run = load(path)
            except UserError:
                refused += 1
                continue
            found = ours(run, TOKENS % min(VOCABULARY, run.config.model.vocab_size))
            followed += 1
            if found.shape != expected.shape or difference(found, expected) > 5 * TOLERANCE:
                wrong.append(f"{key}={value!r}")
    assert not wrong, f"read as another model than transformers': {', '.join(wrong)}"
    assert followed >= 10 and refused >= 1


def test_an_unknown_key_is_refused(tmp_path):
    ALL["llama"].build().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "residual_multiplier": 0.5}))
    with pytest.raises(UserError, match=r"residual_multiplier=0\.5"):
        load(tmp_path)
