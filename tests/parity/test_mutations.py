"""Wrong tables are caught: by a shape, by strictness, or because the logits are others.

All sizes of these models are equal, so that shapes betray as little as possible.
"""

import collections
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import Case, difference, ours, theirs  # noqa: E402

from transformer import load  # noqa: E402
from transformer.interop.family import FAMILIES  # noqa: E402
from transformer.interop.table import Rule  # noqa: E402
from transformer.types import UserError  # noqa: E402

SIZE = 16
TOKENS = np.random.default_rng(0).integers(3, SIZE, (2, 12)).astype(np.int32)
_SAME = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": SIZE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CASES = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **{"vocab_size": SIZE, "n_embd": SIZE, "n_inner": SIZE, "n_positions": SIZE, "n_layer": 2, "n_head": 4},
            **{"bos_token_id": 0, "eos_token_id": 1},
        },
    ),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", {**_SAME, "tie_word_embeddings": False, "attention_bias": True}),
    "bert": Case("BertForMaskedLM", "BertConfig", {**_SAME, "type_vocab_size": SIZE}),
}


WITHOUT_EFFECT = "attention.self.key.bias: "
"""A bias of keys adds the same to all logits of a query: without rotary positions, whatever it is changes no softmax."""


def paths(rule):
    return (rule.ours,) if isinstance(rule.ours, str) else rule.ours


def wrong_forms(rule):
    """The rule with two axes swapped, on the right, or within a group on the left; parts in another order."""
    left, right = (side.strip() for side in rule.form.split("->"))
    axes = right.split()
    first = 1 if axes[0] == "part" else 0
    for place in range(first, len(axes) - 1):
        swapped = [*axes[:place], axes[place + 1], axes[place], *axes[place + 2 :]]
        yield rule._replace(form=f"{left} -> {' '.join(swapped)}")
    if "(" in left:
        group = left[left.index("(") + 1 : left.index(")")]
        yield rule._replace(form=rule.form.replace(f"({group})", f"({' '.join(reversed(group.split()))})", 1))
    if not isinstance(rule.ours, str):
        yield rule._replace(ours=rule.ours[::-1])


def mutants(rules):
    """Tables with one fault each, by what it is."""
    for number, rule in enumerate(rules):
        for wrong in wrong_forms(rule):
            yield f"{rule.theirs}: {wrong.form} {wrong.ours}", [*rules[:number], wrong, *rules[number + 1 :]]
        yield f"without {rule.theirs}", [*rules[:number], *rules[number + 1 :]]
    by_form = collections.defaultdict(list)
    for number, rule in enumerate(rules):
        by_form[rule.form, len(paths(rule)), "{layer}" in rule.theirs].append(number)
    for numbers in by_form.values():
        for one, other in itertools.pairwise(numbers):  # query for key, one norm for another
            changed = list(rules)
            changed[one], changed[other] = (
                Rule(rules[a].theirs, rules[b].ours, rules[a].form) for a, b in ((one, other), (other, one))
            )
            yield f"{rules[one].theirs} for {rules[other].theirs}", changed


@pytest.mark.parametrize("name", CASES)
def test_every_wrong_table_is_caught(name, tmp_path, monkeypatch):
    model = CASES[name].build()
    model.save_pretrained(tmp_path)
    expected, family = theirs(model, TOKENS), FAMILIES.find(name)
    run = load(tmp_path)
    assert difference(ours(run, TOKENS), expected) <= 2e-5
    present = {path for path in _own_paths(run)}
    right = [
        rule for rule in family.rules(family(), run.config.model, run.config.objective.kind) if _used(rule, present)
    ]
    caught, missed = collections.Counter(), []
    for what, rules in mutants(right):
        monkeypatch.setattr(family, "rules", lambda *_, rules=rules: rules)
        try:
            logits = ours(load(tmp_path), TOKENS)
        except (UserError, ValueError) as error:
            caught["a shape" if "shape" in str(error) or "axes" in str(error) else "strictness"] += 1
            continue
        if difference(logits, expected) > 1e-3 or WITHOUT_EFFECT in what:
            caught["without effect" if WITHOUT_EFFECT in what else "other logits"] += 1
        else:
            missed.append(what)
    print(f"\n{name}: {sum(caught.values())} of {sum(caught.values()) + len(missed)} caught, {dict(caught)}")
    assert not missed
    assert sum(caught.values()) >= 25


def _own_paths(run):
    from_tree = []

    def walk(tree, path):
        for key, value in tree.items():
            walk(value, f"{path}{key}/") if isinstance(value, dict) else from_tree.append(f"{path}{key}")

    walk(run.params, "")
    return from_tree


def _used(rule, present):
    return all(path.replace("{layer}", "0") in present for path in paths(rule))
