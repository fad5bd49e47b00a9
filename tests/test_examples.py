"""Every file of examples/ runs as a script and prints what it should."""

import os
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
# A line that each prints.
PRINTS = {
    "own_dataset": "step 200: 3+4=7",
    "own_objective": "metrics: loss, objective, entropy",
    "own_optimizer": "learning rates: 0.5 0.5 0.5 0.5 0.25 0.25 0.25 0.25 0.125 0.125 0.125 0.125",
    "narrow_and_wide": "wide      (1, 16, 256)      2,097,152  3hk² + hk²",
}


def test_every_example_is_here():
    assert sorted(PRINTS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", PRINTS)
def test_example_runs_as_a_script(name):
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "PYTHONIOENCODING": "utf-8"}
    path = EXAMPLES / f"{name}.py"
    result = subprocess.run([sys.executable, path], env=environment, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    assert PRINTS[name] in result.stdout.splitlines()


@pytest.fixture(scope="module")
def narrow_and_wide():
    return runpy.run_path(str(EXAMPLES / "narrow_and_wide.py"))


@pytest.mark.parametrize(("k", "h"), [(8, 1), (8, 2), (12, 3), (16, 8)])
def test_parameters_of_narrow_and_wide(narrow_and_wide, k, h):
    x = jnp.zeros((1, 2, k))
    # Three projections of each head, and one of their outputs together.
    by_hand = {
        "narrow": 3 * h * (k // h) ** 2 + k * k,
        "standard": 3 * h * k * (k // h) + k * k,
        "wide": 3 * h * k * k + h * k * k,
    }
    for name, (layer, _, expected) in narrow_and_wide["variants"](k, h).items():
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected == by_hand[name], name


def test_narrow_is_standard_with_kernels_that_read_one_chunk(narrow_and_wide):
    kinds = narrow_and_wide["variants"](12, 3)
    narrow, standard = kinds["narrow"][0], kinds["standard"][0]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 12)), jnp.float32)
    out, variables = narrow.init_with_output(jax.random.key(0), x)
    params = variables["params"]
    wider = {"out": params["out"]}
    for role in ("query", "key", "value"):
        kernel = np.zeros((12, 3, 4), np.float32)
        for head in range(3):
            kernel[4 * head : 4 * head + 4, head] = params[role][head]
        wider[role] = {"kernel": jnp.asarray(kernel)}
    np.testing.assert_allclose(standard.apply({"params": wider}, x), out, atol=1e-5)
    # Chunks do not mix before `out`: heads other than the first do not see the first chunk.
    first_off = {**params, "out": {"kernel": params["out"]["kernel"].at[0].set(0)}}
    changed = narrow.apply({"params": first_off}, x.at[..., :4].add(1))
    np.testing.assert_allclose(changed, narrow.apply({"params": first_off}, x), atol=1e-6)
