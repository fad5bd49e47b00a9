"""Every field of every config and kind has its type and its choices once it is made, however it is made."""

import dataclasses
import math
import os
import pathlib
import types
import typing

import numpy as np
import pytest

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.config_io import from_dict, to_dict
from transformer.generation.sampling import SamplingConfig
from transformer.kinds import Kind
from transformer.model_config import AttentionConfig, ModelConfig
from transformer.objective import Objective
from transformer.optimizers.adamw import AdamW
from transformer.types import UserError
from transformer.validation import Settings

WRONG = (
    *(
        None,
        True,
        0,
        1,
        -1,
        2**31,
        10**400,
        10**5000,
        1.5,
        2.0,
        math.nan,
        math.inf,
        -math.inf,
        1e-8,
        "",
        "?",
        "0.5",
        b"x",
    ),
    *(
        [],
        ["?"],
        [1],
        [[1]],
        (1, 2),
        (None,),
        (math.nan, 1.0),
        {},
        {"?": 1},
        {1},
        object(),
        DataConfig(),
        (DataConfig(),),
    ),
    *(
        np.int64(3),
        np.float32(0.5),
        np.float64("nan"),
        np.True_,
        np.str_("?"),
        np.zeros(2),
        np.arange(0),
        lambda: 3,
        int,
    ),
)


def classes_from(kind, found):
    """A config class, and all that its fields can hold: other configs, and every kind of a family."""
    if kind in found:
        return
    found.add(kind)
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                kinds = map(part.family.find, part.family.names) if issubclass(part, Kind) else ()
                for inner in (part, *kinds):
                    classes_from(inner, found)


FOUND: set[type] = {SamplingConfig}
classes_from(Config, FOUND)
FIELDS = [
    pytest.param(kind, field.name, id=f"{kind.__name__}.{field.name}")
    for kind in sorted(FOUND, key=lambda kind: kind.__name__)
    for field in dataclasses.fields(kind)
]


def test_the_walk_finds_configs_and_kinds():
    names = {kind.__name__ for kind in FOUND}
    assert {"Config", "AttentionConfig", "BlockConfig", "Objective", "NextToken", "SpanCorruption"} <= names
    assert all(issubclass(kind, Settings) for kind in FOUND), "a config that does not check its fields"
    assert len(FIELDS) > 120


def fits(hint, value):
    """Whether a value is exactly of a type; written apart from the code that is tested."""
    if typing.get_origin(hint) is typing.Annotated:
        bits = [extra for extra in hint.__metadata__ if isinstance(extra, int)]
        return fits(hint.__origin__, value) or (bits != [] and type(value) is int and abs(value) < 2 ** bits[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(part, value) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis and type(value) is tuple else parts
        return type(value) is tuple and len(kinds) == len(value) and all(map(fits, kinds, value))
    if typing.get_origin(hint) is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(hint))
    if hint is float:
        return type(value) is float and abs(value) < 3.4029e38
    if hint is int:
        return type(value) is int and -(2**31) <= value < 2**31
    return isinstance(value, hint) if dataclasses.is_dataclass(hint) else type(value) is hint


def wanted(value):
    """What a value is kept as: a scalar of NumPy is Python's, and a list a tuple."""
    value = value.item() if type(value).__module__ == "numpy" and np.shape(value) == () else value
    return tuple(map(wanted, value)) if isinstance(value, (list, tuple)) else value


def attempt(kind, name, value):
    """What a config keeps of a value, and why it refuses it."""
    try:
        return getattr(kind(**{name: value}), name), ""
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_field_has_its_type_or_is_refused(kind, name):
    hint = typing.get_type_hints(kind, include_extras=True)[name]
    refused = 0
    for value in WRONG:
        kept, message = attempt(kind, name, value)
        of_type = fits(hint, wanted(value)) or (type(value) is int and fits(hint, 1.0))
        if not message:
            assert fits(hint, kept), f"{value!r} was taken and kept as {kept!r}"
            assert kept == wanted(value)
        elif not of_type:
            assert message.startswith((f"{kind.__name__}.{name} must be", "A path must")), value
        assert len(message) < 700
        refused += message != ""
    assert refused >= len(WRONG) // 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(num_layers=True), "ModelConfig.num_layers must be a whole number, got True."),
        (lambda: ModelConfig(num_layers=2.0), "ModelConfig.num_layers must be a whole number, got 2.0."),
        (lambda: DataConfig(source="x"), "DataConfig.source must be texts (a tuple), got 'x'."),
        (lambda: DataConfig(truncate="heda"), "one of head, tail, head_tail, got 'heda'; did you mean head?"),
        (lambda: AdamW(b1=math.nan), "AdamW.b1 must be a finite number of float32 (below 3.4e38), got nan."),
        (lambda: TrainingConfig(profile_steps=(1,)), "must be 2 whole numbers (a tuple), got (1,)."),
        (lambda: AttentionConfig(num_heads=10**5000), "below 2^31 = 2,147,483,648, got a value of type int."),
        (lambda: Config(objective=ModelConfig()), "Config.objective must be of type Objective, got ModelConfig(vocab"),
    ],
)
def test_the_message_names_field_value_and_choices(make, message):
    with pytest.raises(UserError) as refused:
        make()
    assert message in str(refused.value)


def test_what_means_the_same_is_kept_as_pythons_own():
    config = DataConfig(source=["~/a"], batch_size=np.int64(3), pack=np.False_, data_dir=pathlib.Path("b"))
    assert config == DataConfig(source=(os.path.expanduser("~/a"),), batch_size=3, pack=False, data_dir="b")
    assert type(config.batch_size) is int and type(AdamW(learning_rate=1).learning_rate) is float


def test_a_user_defined_kind_cannot_forget_the_check():
    @dataclasses.dataclass(frozen=True)
    class Own(Objective):
        sharpness: float = 1.0
        shape: typing.Literal["round", "square"] = "round"

        def __post_init__(self):  # without super()
            assert self.sharpness > 0  # a TypeError for a text

    for wrong in ({"sharpness": "2"}, {"shape": "squar"}, {"z_loss": None}):
        (name,) = wrong
        with pytest.raises(UserError, match=rf"^Own\.{name} must be"):
            Own(**wrong)


def test_json_is_checked_by_the_same_code():
    values = to_dict(Config())
    for section, name, wrong in (("model", "num_layers", 2.0), ("data", "truncate", "x"), ("objective", "z_loss", [])):
        changed = {**values, section: {**values[section], name: wrong}}
        with pytest.raises(UserError) as refused:
            from_dict(Config, changed)
        with pytest.raises(UserError) as made:
            dataclasses.replace(getattr(Config(), section), **{name: wrong})
        assert str(refused.value) == str(made.value)
