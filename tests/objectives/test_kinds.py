"""Objectives are kinds: one file brings one, a config holds one, and what is none of its settings is refused by name."""

import dataclasses
import json
import pathlib

import pytest

from transformer.cli.arguments import parse_config
from transformer.cli.fields import as_flags, flags
from transformer.cli.main import main
from transformer.config import Config
from transformer.config_io import from_dict, to_dict
from transformer.kinds import switch
from transformer.objective import OBJECTIVES, Objective
from transformer.objectives.masked_lm import MaskedLM
from transformer.objectives.next_token import NextToken
from transformer.overrides import override
from transformer.types import UserError

EXAMPLE = str(pathlib.Path(__file__).parents[2] / "examples" / "own_objective.py")


def settings_of(kind):
    return {field.name for field in dataclasses.fields(OBJECTIVES.find(kind))}


SETTINGS = [
    (kind, setting, owner)
    for kind in OBJECTIVES.names
    for owner in OBJECTIVES.names
    for setting in sorted(settings_of(owner) - settings_of(kind))
]


@pytest.mark.parametrize("name", OBJECTIVES.names)
def test_a_config_of_each_kind_comes_back_from_json(name):
    objective = OBJECTIVES.find(name)(z_loss=0.25)
    values = json.loads(json.dumps(to_dict(Config(objective=objective))))
    assert values["objective"]["kind"] == name
    assert from_dict(Config, values).objective == objective


@pytest.mark.parametrize(("kind", "setting", "owner"), SETTINGS)
def test_a_setting_of_another_kind_is_refused_with_its_name(kind, setting, owner, capsys):
    config = Config(objective=OBJECTIVES.find(kind)())
    with pytest.raises(
        UserError, match=f"objective.{setting} is a setting of .*{owner}.*, objective.kind is {kind}; leave"
    ):
        override(config, {f"objective.{setting}": 1})
    flag = f"--objective.{setting.replace('_', '-')}"
    assert flag not in flags(config)
    with pytest.raises(SystemExit):
        main(["train", EXAMPLE, "--objective.kind", kind, flag, "1"])
    assert f"error: {flag} is a setting of" in capsys.readouterr().err


def test_the_kind_decides_which_flags_there_are(capsys):
    config = parse_config([EXAMPLE, "--objective.mask-rate", "0.5", "--objective.kind", "masked_lm"], command="train")
    assert config.objective == MaskedLM(mask_rate=0.5)
    assert "note:" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", EXAMPLE, "--objective.kind=masked_lm", "--help"])
    shown = capsys.readouterr().out
    assert "--objective.mask-rate FLOAT" in shown
    assert "--objective.beta" not in shown
    with pytest.raises(UserError, match=r"must be one of next_token, .*got 'maskedlm'; did you mean masked_lm"):
        parse_config([EXAMPLE, "--objective.kind", "maskedlm"], command="train")


def test_settings_that_both_have_are_kept():
    assert switch(MaskedLM(z_loss=0.5, mask_rate=0.3), "next_token") == NextToken(z_loss=0.5)


def test_one_file_brings_an_objective(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    given = ["--data.source", str(text), "--data.data-dir", str(tmp_path / "data"), "--workdir", str(tmp_path / "run")]
    main(["train", EXAMPLE, "--objective.beta", "0.5", "--training.steps", "4", *given])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["entropy"] > 1
    assert rows[-1]["objective"] == pytest.approx(rows[-1]["loss"] - 0.5 * rows[-1]["entropy"], rel=1e-5)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"]["beta"] == 0.5
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run")])  # the file has been imported here
    scores = json.loads(capsys.readouterr().out)
    assert scores["entropy"] == pytest.approx(rows[-1]["entropy"], rel=1e-5)


def test_a_kind_that_nobody_brought_is_named():
    values = to_dict(Config())
    values["objective"] = {"kind": "os.system", "beta": 1.0}
    with pytest.raises(
        UserError, match=r"objective\.kind must be one of next_token, .*got 'os.system'\. Your own kind is known"
    ):
        from_dict(Config, values)


def test_a_name_belongs_to_one_kind():
    with pytest.raises(UserError, match="has a kind 'masked_lm' already"):

        @OBJECTIVES.register
        class Other(Objective):
            kind = "masked_lm"

    assert OBJECTIVES.find("masked_lm") is MaskedLM


def test_messages_name_the_flags_of_the_kind():
    table = flags(Config(objective=MaskedLM()))
    with pytest.raises(UserError) as refused:
        MaskedLM(mask_rate=2.0)
    assert as_flags(str(refused.value), table) == "--objective.mask-rate must be above 0 and below 1, got 2.0."
