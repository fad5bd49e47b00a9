"""Adapters of PEFT: its logits are ours, in both directions, and merged."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from families import ALL, TOKENS, TOLERANCE, difference, ours, theirs  # noqa: E402

from transformer import load  # noqa: E402
from transformer.cli.main import main  # noqa: E402
from transformer.types import UserError  # noqa: E402

# Of PEFT with this version of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def adapted(path, targets):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


def test_logits_in_both_directions(tmp_path):
    ALL["llama"].build().save_pretrained(tmp_path / "hf")
    model = adapted(tmp_path / "hf", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    model.save_pretrained(tmp_path / "peft")
    main(["import", str(tmp_path / "hf"), "--workdir", str(tmp_path / "base")])
    main(["import", str(tmp_path / "peft"), "--base", str(tmp_path / "base"), "--workdir", str(tmp_path / "run")])
    run, expected = load(tmp_path / "run"), theirs(model, TOKENS)
    assert run.config.adapter.rank == 3
    assert difference(ours(run, TOKENS), expected) <= TOLERANCE
    assert difference(ours(load(tmp_path / "base"), TOKENS), expected) > 100 * TOLERANCE

    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    assert difference(ours(run, TOKENS), theirs(again, TOKENS)) <= TOLERANCE
    assert sorted(again.peft_config["default"].target_modules) == ["down_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

    main(["export", str(tmp_path / "run"), str(tmp_path / "merged")])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert difference(theirs(merged, TOKENS), np.asarray(expected)) <= TOLERANCE


def test_a_part_of_a_fused_tensor_is_refused_by_name(tmp_path):
    ALL["gpt2"].build().save_pretrained(tmp_path / "hf")
    model = adapted(tmp_path / "hf", ["c_attn"])
    model.save_pretrained(tmp_path / "peft")
    main(["import", str(tmp_path / "hf"), "--workdir", str(tmp_path / "base")])
    with pytest.raises((UserError, SystemExit)):
        main(["import", str(tmp_path / "peft"), "--base", str(tmp_path / "base"), "--workdir", str(tmp_path / "run")])
