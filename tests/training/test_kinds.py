"""Optimizers and schedules are kinds: one file brings one, a config holds one, settings of others are refused by name."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from transformer import load
from transformer.cli.arguments import parse_config
from transformer.cli.fields import as_flags, flags
from transformer.cli.main import main
from transformer.config import Config
from transformer.config_io import from_dict, to_dict
from transformer.kinds import switch
from transformer.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, Schedule
from transformer.optimizers.adafactor import Adafactor
from transformer.optimizers.adamw import AdamW
from transformer.optimizers.lion import Lion
from transformer.optimizers.muon import Muon
from transformer.overrides import override
from transformer.runs.train import train
from transformer.schedules.constant import ConstantSchedule
from transformer.schedules.linear import LinearSchedule
from transformer.schedules.wsd import WSDSchedule
from transformer.training.optimizer import make_optimizer
from transformer.types import UserError

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "python_stdlib.py") + ":debug"
OWN = '''
"""A user-defined optimizer and schedule, and a run of both."""

import dataclasses

import jax.numpy as jnp
import optax

from transformer import (
    OPTIMIZERS, SCHEDULES, AttentionConfig, BlockConfig, Config, DataConfig, ModelConfig, Optimizer, Schedule, TrainingConfig,
)


@OPTIMIZERS.register
@dataclasses.dataclass(frozen=True)
class Heavy(Optimizer):
    """Momentum."""

    kind = "heavy_ball"
    fixed = ("model.remat",)

    momentum: float = 0.5
    """Decay of the velocity."""

    def rule(self):
        return optax.trace(self.momentum)


@SCHEDULES.register
@dataclasses.dataclass(frozen=True)
class Stairs(Schedule):
    """Falls by half after so many steps."""

    kind = "stairs"

    width: int = 2
    """Steps of a stair."""

    def decay(self, count, steps):
        return 0.5 ** jnp.floor(count / self.width)


def get_config():
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(sequence_length=16, batch_size=8, record_bytes=256),
        optimizer=Heavy(learning_rate=0.01, schedule=Stairs(width=1), clip_norm=0.0, weight_decay=0.0),
        training=TrainingConfig(steps=2, log_every=1, sample_length=0),
    )
'''


def settings_of(family, kind):
    return {field.name for field in dataclasses.fields(family.find(kind))}


SETTINGS = [
    (family, kind, setting, owner)
    for family in (OPTIMIZERS, SCHEDULES)
    for kind in family.names
    for owner in family.names
    for setting in sorted(settings_of(family, owner) - settings_of(family, kind))
]


def config_of(family, name):
    kind = family.find(name)()
    return Config(optimizer=kind if family is OPTIMIZERS else AdamW(schedule=kind))


@pytest.mark.parametrize("family", [OPTIMIZERS, SCHEDULES])
def test_a_config_of_each_kind_comes_back_from_json(family):
    for name in family.names:
        config = config_of(family, name)
        values = json.loads(json.dumps(to_dict(config)))
        assert from_dict(Config, values) == config
        part = values["optimizer"] if family is OPTIMIZERS else values["optimizer"]["schedule"]
        assert part["kind"] == name


@pytest.mark.parametrize(("family", "kind", "setting", "owner"), SETTINGS)
def test_a_setting_of_another_kind_is_refused_with_its_name(family, kind, setting, owner, capsys):
    config, path = config_of(family, kind), f"{family.section}.{setting}"
    with pytest.raises(UserError, match=f"{path} is a setting of .*{owner}.*, {family.section}.kind is {kind}; leave"):
        override(config, {path: 1})
    flag = f"--{path.replace('_', '-')}"
    assert flag not in flags(config)
    with pytest.raises(SystemExit):
        main(["train", CONFIG, f"--{family.section}.kind", kind, flag, "1"])
    assert f"error: {flag} is a setting of" in capsys.readouterr().err


def test_each_has_its_own_settings_only():
    assert not {"b1", "b2", "eps", "moment_dtype"} & settings_of(OPTIMIZERS, "adafactor")
    assert "eps" not in settings_of(OPTIMIZERS, "lion")
    assert not {"final_fraction", "decay_fraction"} & (
        settings_of(SCHEDULES, "constant") | settings_of(SCHEDULES, "inverse_sqrt")
    )
    assert [name for name in SCHEDULES.names if "decay_fraction" in settings_of(SCHEDULES, name)] == ["wsd"]


def test_both_kinds_are_chosen_on_one_command_line():
    line = "--optimizer.kind lion --optimizer.schedule.kind wsd --optimizer.schedule.decay-fraction 0.1"
    config = parse_config([CONFIG, *line.split()], command="train")
    of_file = parse_config([CONFIG], command="train").optimizer
    assert isinstance(of_file, Muon)
    assert config.optimizer == Lion(
        learning_rate=of_file.learning_rate,
        schedule=WSDSchedule(warmup_steps=of_file.schedule.warmup_steps, final_fraction=0.0, decay_fraction=0.1),
        weight_decay=0.0,
        b2=0.99,
    )


def test_what_two_kinds_have_is_kept():
    schedule = LinearSchedule(warmup_steps=7, final_fraction=0.3)
    assert switch(AdamW(b1=0.5, eps=1e-4, schedule=schedule), "adafactor") == Adafactor(schedule=schedule)
    assert switch(schedule, "constant") == ConstantSchedule(warmup_steps=7)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--optimizer.name", "lion"], "--optimizer.kind"),
        (["--optimizer.warmup-steps", "3"], "--optimizer.schedule.warmup-steps"),
        (["--optimizer.restarts", "3"], "--optimizer.schedule.restarts"),
        (["--schedule", "linear"], "--optimizer.schedule.kind"),
        (["--warmup-steps", "3"], "--optimizer.schedule.warmup-steps"),
    ],
)
def test_a_flag_that_is_none_leads_to_the_one_meant(given, meant, capsys):
    with pytest.raises(SystemExit):
        main(["train", CONFIG, *given])
    assert f"{given[0]} is no option of transformer train; did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lion(learning_rate=0.0), "--optimizer.learning-rate must be positive"),
        (lambda: Muon(momentum=1.0), "--optimizer.momentum must be at least 0 and below 1, got 1.0"),
        (lambda: AdamW(eps=-1.0), "--optimizer.eps must be at least 0, got -1.0"),
        (lambda: WSDSchedule(decay_fraction=2.0), "--optimizer.schedule.decay-fraction must be at least 0"),
        (lambda: ConstantSchedule(warmup_steps=-1), "--optimizer.schedule.warmup-steps must be at least 0"),
    ],
)
def test_messages_name_the_flags_of_the_kind(make, message):
    with pytest.raises(UserError) as refused:
        make()
    config = parse_config([CONFIG, "--optimizer.kind", "muon"], command="train")
    assert as_flags(str(refused.value), flags(config)).startswith(message)


def test_momentum_is_of_muons_matrices_alone():
    params = {"up": {"kernel": jnp.eye(4)}, "norm": {"scale": jnp.ones(4)}}

    def moved(momentum):
        optimizer, _ = make_optimizer(Muon(momentum=momentum, weight_decay=0.0), 10, params)
        state, after = optimizer.init(params), params
        for seed in range(2):
            grads = jax.tree.map(lambda x, seed=seed: jax.random.normal(jax.random.key(seed), x.shape), params)
            updates, state = optimizer.update(grads, state, after)
            after = optax.apply_updates(after, updates)
        return after

    low, high = moved(0.1), moved(0.95)
    assert float(jnp.abs(low["up"]["kernel"] - high["up"]["kernel"]).max()) > 1e-4
    assert bool((low["norm"]["scale"] == high["norm"]["scale"]).all())


def test_a_kind_must_bring_what_it_is_for():
    with pytest.raises(NotImplementedError, match=r"Optimizer must define rule\(\)"):
        Optimizer().rule()
    with pytest.raises(NotImplementedError, match=r"Schedule must define decay\(\)"):
        Schedule().decay(0, 1)


# ---- From outside the package ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A config file with an optimizer and a schedule of its own, and the flags of its run."""
    place = tmp_path_factory.mktemp("own")
    (place / "heavy.py").write_text(OWN)
    (place / "text.txt").write_text("to be or not to be, that is the question. " * 100)
    given = ["--data.source", str(place / "text.txt"), "--data.data-dir", str(place / "data")]
    yield place, [str(place / "heavy.py"), *given, "--workdir", str(place / "run")]
    OPTIMIZERS._kinds.pop("heavy_ball", None)
    SCHEDULES._kinds.pop("stairs", None)


def rows(place):
    return [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]


def test_own_kinds_train_and_go_on(own):
    place, arguments = own
    main(["train", *arguments])
    recorded = json.loads((place / "run" / "config.json").read_text())["optimizer"]
    assert (recorded["kind"], recorded["momentum"]) == ("heavy_ball", 0.5)
    assert recorded["schedule"] == {"kind": "stairs", "warmup_steps": 0, "restarts": [], "width": 1}
    config = parse_config([*arguments, "--training.steps", "4"], command="train", trains=True)
    assert train(config).step == 4
    learning_rates = [row["learning_rate"] for row in rows(place) if row["split"] == "train"]
    assert learning_rates == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    assert "heavy" not in sys.modules
    assert type(load(place / "run").config.optimizer).__name__ == "Heavy"
    with pytest.raises(SystemExit):  # the kind says what may not change
        main(["train", *arguments, "--training.steps", "6", "--model.remat", "full"])


def test_own_kinds_are_refused_where_nobody_imported_them(own):
    place, arguments = own
    if not (place / "run").exists():
        main(["train", *arguments])
    command = [sys.executable, "-m", "transformer", "evaluate", str(place / "run")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert (
        "optimizer.kind must be one of adamw, lion, adafactor, muon, got 'heavy_ball'. Your own kind is known"
        in result.stderr
    )
