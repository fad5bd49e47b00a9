"""Panels: the same product, and read in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.ops.panels import cut_panels, panel_product, panel_width

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def random(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("rows", [1, 3])
def test_product_agrees_with_the_whole_matrix(rows, columns):
    x, matrix = random((rows, 5)), random((5, columns))
    panels = cut_panels(matrix, 8)
    assert panels.shape == (-(-columns // 8), 5, 8)
    out = panel_product(x, panels, columns, jnp.float32)
    np.testing.assert_allclose(out, x @ matrix, rtol=1e-5, atol=1e-6)


def test_panels_are_columns_filled_up_with_zeros():
    panels = cut_panels(jnp.arange(10.0).reshape(2, 5), 3)
    np.testing.assert_array_equal(panels, [[[0, 1, 2], [5, 6, 7]], [[3, 4, 0], [8, 9, 0]]])


def test_bfloat16_is_accumulated_in_float32():
    x, matrix = random((2, 300), jnp.bfloat16), random((300, 40), jnp.bfloat16)
    panels = cut_panels(matrix, 32)
    assert panels.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    np.testing.assert_allclose(panel_product(x, panels, 40, jnp.float32), expected, rtol=1e-4, atol=1e-4)
    assert panel_product(x, panels, 40, jnp.bfloat16).dtype == jnp.bfloat16


def test_many_rows_want_the_whole_matrix():
    assert panel_width(1) > 0
    assert panel_width(4) > 0
    assert panel_width(64) == 0


def test_a_step_of_a_loop_does_not_copy_the_panels():
    """XLA must multiply panels where they lie: a transposition in the loop would cost more than it gains."""
    panels = cut_panels(random((64, 64)), 32)

    def steps(x, panels):
        return jax.lax.fori_loop(0, 9, lambda _, x: jnp.tanh(panel_product(x, panels, 64, jnp.float32)), x)

    text = jax.jit(steps).lower(random((1, 64)), panels).compile().as_text()
    copies = [line for line in text.splitlines() if " f32[2,64,32]" in line.split("=")[-1][:20] and "copy(" in line]
    assert copies == []
    assert "transpose" not in text
