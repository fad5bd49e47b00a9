"""Every key of every family's config, changed: our logits follow transformers', or the folder is refused."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import ALL, TOKENS, TOLERANCE, VOCABULARY, difference, ours, perturbed, theirs  # noqa: E402

from transformer import load  # noqa: E402
from transformer.interop.folder import Folder  # noqa: E402
from transformer.interop.writing import differences  # noqa: E402
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


DAILY = ("gpt2", "llama", "qwen2", "gemma3", "mixtral", "bert, masked", "t5")
"""One of each kind of table; the others with `-m exhaustive`."""


@pytest.fixture(
    scope="module",
    params=[name if name in DAILY else pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES],
)
def base(request, tmp_path_factory):
    """A family: its model, the folder that it is saved in, and the values of its config."""
    case, path = ALL[request.param], tmp_path_factory.mktemp("hf") / "base"
    model = case.build()
    model.save_pretrained(path)
    return case, model, path, json.loads((path / "config.json").read_text())


def with_config(folder, path, values):
    """A folder with the same weights and another config."""
    path.mkdir()
    (path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (path / "config.json").write_text(json.dumps(values))
    return path


def read(path):
    """What we take a folder for; None where it is refused."""
    try:
        return Folder(path).pretrained
    except UserError:
        return None


def same(one, other):
    """Whether two readings are of one model: a width that is said may follow from others where it is not."""
    return (
        other is not None
        and one._replace(model=None) == other._replace(model=None)
        and not differences(one.model, other.model)
    )


def built(case, values, weights=None):
    """transformers' own model of a config, with the weights of another or random ones; None where it refuses."""
    try:
        config = getattr(transformers, case.config).from_dict({**values, "_attn_implementation": "eager"})
        torch.manual_seed(0)
        model = perturbed(getattr(transformers, case.model)(config))
        if weights is not None:
            model.load_state_dict(weights)
        return model, theirs(model, TOKENS % min(VOCABULARY, config.vocab_size))
    except Exception:
        return None


def test_a_changed_key_is_followed_or_refused(base, tmp_path):
    case, model, folder, values = base
    before, expected = read(folder), theirs(model, TOKENS)
    wrong, counts = [], {"refused": 0, "same": 0, "followed": 0}
    for key in sorted(set(values) - _NOT_OF_THE_MODEL):
        for number, value in enumerate(alternatives(key, values[key])):
            path = with_config(folder, tmp_path / f"{key}-{number}", {**values, key: value})
            found = read(path)
            if found is None:
                counts["refused"] += 1
                continue
            equal = same(found, before)
            other = built(case, {**values, key: value}, model.state_dict() if equal else None)
            if other is None or not np.isfinite(other[1]).all():
                continue
            counts["same" if equal else "followed"] += 1
            if equal:  # we say that it changes nothing
                fits = difference(other[1], expected) <= TOLERANCE
            else:
                fits = followed(*other, path, value=value, key=key)
            if not fits:
                wrong.append(f"{key}={value!r}")
    print(f"\n{case.model}: {counts}")
    assert not wrong, f"read as another model than transformers': {', '.join(wrong)}"
    assert counts["refused"] >= 1 and counts["followed"] >= 4 and counts["same"] >= 1


def followed(model, expected, path, *, key, value):
    """Whether our logits are transformers' where both read the changed config."""
    path = path.with_name(f"{path.name}-own")
    model.save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    # The class may write another value than it was given; the file of a user has the given one.
    (path / "config.json").write_text(json.dumps({**written, key: value}))
    try:
        run = load(path)
    except UserError:
        return True
    logits = ours(run, TOKENS % min(VOCABULARY, run.config.model.vocab_size))
    return logits.shape == expected.shape and difference(logits, expected) <= 5 * TOLERANCE


def test_a_key_that_is_left_out_or_null_is_as_transformers_has_it(base, tmp_path):
    """Compared by the model that we read: transformers' class fills in what is missing, and writes it down."""
    case, _, folder, values = base
    wrong = []
    changes = [{**values, key: None} for key in sorted(set(values) - _NOT_OF_THE_MODEL)]
    changes += [{k: v for k, v in values.items() if k != key} for key in sorted(set(values) - _NOT_OF_THE_MODEL)]
    kept = {key: values[key] for key in ("architectures", "model_type", "id2label", "label2id") if key in values}
    for number, less in enumerate([*changes, kept]):
        found = read(with_config(folder, tmp_path / f"less-{number}", less))
        try:
            whole = getattr(transformers, case.config).from_dict(dict(less)).to_dict()
        except Exception:
            continue
        # Of all keys, those that the class writes to a file; others are of generation.
        whole = {**kept, **{key: whole[key] for key in values if key in whole}}
        if found is not None and not same(found, read(with_config(folder, tmp_path / f"whole-{number}", whole))):
            wrong.append(str({k for k in values if less.get(k) != values[k]}))
    assert not wrong, f"a missing key is read as another value than transformers': {', '.join(wrong)}"


def test_an_unknown_key_is_refused(tmp_path):
    ALL["llama"].build().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "residual_multiplier": 0.5}))
    with pytest.raises(UserError, match=r"residual_multiplier=0\.5"):
        load(tmp_path)
