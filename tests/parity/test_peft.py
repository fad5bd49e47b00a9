"""Adapters of PEFT: its logits are ours, in both directions, and merged."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from families import ALL, TOKENS, TOLERANCE, difference, ours, theirs  # noqa: E402

from transformer import load  # noqa: E402
from transformer.cli.main import main  # noqa: E402
from transformer.interop.writing import expressing_family  # noqa: E402
from transformer.ops.poolings.mean import MeanPooling  # noqa: E402
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


@pytest.mark.parametrize("name", ["bert, classes", "roberta, classes"])
def test_a_classifier_with_a_head_of_its_own(tmp_path, name):
    ALL[name].build().save_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], "init_lora_weights": False}
    others = ["pooler"] if name.startswith("bert") else None  # PEFT adds `classifier`
    model = peft.get_peft_model(model, peft.LoraConfig(**lora, modules_to_save=others, task_type="SEQ_CLS")).eval()
    torch.manual_seed(1)
    for path, parameter in model.named_parameters():
        if "modules_to_save" in path:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "peft")
    main(["import", str(tmp_path / "hf"), "--workdir", str(tmp_path / "base")])
    main(["import", str(tmp_path / "peft"), "--base", str(tmp_path / "base"), "--workdir", str(tmp_path / "run")])
    run, expected = load(tmp_path / "run"), theirs(model, TOKENS)
    assert difference(ours(run, TOKENS), expected) <= TOLERANCE

    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"])
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    assert difference(theirs(again, TOKENS), expected) <= TOLERANCE
    saved = {"classifier", "bert.pooler.dense"} if others else {"classifier"}
    assert saved <= set(again.peft_config["default"].modules_to_save)

    main(["export", str(tmp_path / "run"), str(tmp_path / "merged")])
    merged = type(plain).from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert difference(theirs(merged, TOKENS), expected) <= TOLERANCE


def test_a_head_beside_an_encoder_without_one(tmp_path):
    ALL["bert, bare"].build().save_pretrained(tmp_path / "hf")
    own = {"num_labels": 3, "attn_implementation": "eager"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", **own)
    lora = {"r": 3, "target_modules": ["query", "value"], "init_lora_weights": False, "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(model, peft.LoraConfig(**lora)).eval()
    model.save_pretrained(tmp_path / "peft")
    main(["import", str(tmp_path / "hf"), "--workdir", str(tmp_path / "base")])
    main(["import", str(tmp_path / "peft"), "--base", str(tmp_path / "base"), "--workdir", str(tmp_path / "run")])
    run, expected = load(tmp_path / "run"), theirs(model, TOKENS)
    assert difference(ours(run, TOKENS), expected) <= TOLERANCE
    assert run.class_names == ("LABEL_0", "LABEL_1", "LABEL_2")

    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"])
    (tmp_path / "out" / "classes.json").write_text('["a", "b", "c"]')
    main(["import", str(tmp_path / "out"), "--base", str(tmp_path / "base"), "--workdir", str(tmp_path / "again")])
    again = load(tmp_path / "again")
    assert difference(ours(again, TOKENS), expected) <= TOLERANCE
    assert again.class_names == ("a", "b", "c")

    otherwise = dataclasses.replace(run.config.model, pooling=MeanPooling())
    with pytest.raises(
        UserError, match=r"bert, the nearest, cannot express\n  pooling: MeanPooling\(\) -> FirstPooling\(\)"
    ):
        expressing_family(otherwise, "classification", "bert")


FUSED = {"gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value", "dense"], "phi3": ["qkv_proj", "gate_up_proj"]}


@pytest.mark.parametrize(("name", "targets"), FUSED.items())
def test_kernels_that_are_one_tensor_of_theirs(tmp_path, name, targets):
    """They share A on the way in, and have columns of their own on the way out."""
    ALL[name].build().save_pretrained(tmp_path / "hf")
    model = adapted(tmp_path / "hf", targets)
    model.save_pretrained(tmp_path / "peft")
    main(["import", str(tmp_path / "hf"), "--workdir", str(tmp_path / "base")])
    main(["import", str(tmp_path / "peft"), "--base", str(tmp_path / "base"), "--workdir", str(tmp_path / "run")])
    expected = theirs(model, TOKENS)
    assert difference(ours(load(tmp_path / "run"), TOKENS), expected) <= TOLERANCE
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    assert difference(theirs(again, TOKENS), expected) <= TOLERANCE
    main(["import", str(tmp_path / "out"), "--base", str(tmp_path / "base"), "--workdir", str(tmp_path / "twice")])
    assert difference(ours(load(tmp_path / "twice"), TOKENS), expected) <= TOLERANCE
