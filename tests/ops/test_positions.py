"""Rotary products depend on distances only, scalings follow their formulas, sinusoids are the paper's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transformer.ops.positions.rotary import RotaryPositions
from transformer.ops.positions.scalings import frequencies, plain_frequencies
from transformer.ops.positions.sinusoidal import sinusoidal
from transformer.ops.positions.transformer_xl import turn_to_query
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SCALINGS = {
    "none": {},
    "linear": {"scaling": "linear", "scaling_factor": 4.0},
    "llama3": {"scaling": "llama3", "scaling_factor": 8.0, "original_length": 64},
}


def turned(x, positions, **settings):
    return RotaryPositions(**settings).rotate(x, x, lambda: (positions, positions))[0]


compiled_rotary = jax.jit(turned, static_argnames=[field.name for field in dataclasses.fields(RotaryPositions)])


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def at(position):
    return jnp.full((1, 1), position, jnp.int32)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.integers(0, 500),
    second=st.integers(0, 500),
    shift=st.integers(-500, 500),
    scaling=st.sampled_from([*SCALINGS]),
)
def test_rotary_products_depend_on_the_difference_only(first, second, shift, scaling):
    query, key = normal(1, 1, 2, 16), normal(1, 1, 2, 16, seed=1)

    def product(query_position, key_position):
        rotated_query = compiled_rotary(query, at(query_position), **SCALINGS[scaling])
        rotated_key = compiled_rotary(key, at(key_position), **SCALINGS[scaling])
        return jnp.sum(rotated_query * rotated_key, axis=-1)

    np.testing.assert_allclose(product(first, second), product(first + shift, second + shift), atol=2e-3)


def test_rotary_products_depend_on_the_difference():
    query = key = jnp.ones((1, 1, 1, 8))
    here = jnp.sum(compiled_rotary(query, at(3)) * compiled_rotary(key, at(3)))
    away = jnp.sum(compiled_rotary(query, at(3)) * compiled_rotary(key, at(1)))
    assert abs(here - 8) < 1e-5
    assert abs(here - away) > 1


def test_rotary_turns_complex_numbers_made_of_the_two_halves():
    x, positions = normal(2, 5, 3, 8), jnp.asarray([[0, 1, 2, 3, 4], [7, 0, 9, 9, 1000]], jnp.int32)
    planes = np.asarray(x)[..., :4] + 1j * np.asarray(x)[..., 4:]
    frequencies = 100.0 ** (-np.arange(4) / 4)
    turned = planes * np.exp(1j * np.asarray(positions)[:, :, None, None] * frequencies)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(compiled_rotary(x, positions, theta=100.0), expected, atol=2e-4)


def test_rotary_accepts_one_row_of_positions_for_all():
    x, positions = normal(2, 4, 1, 6), jnp.arange(4, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(
        compiled_rotary(x, positions), compiled_rotary(x, jnp.broadcast_to(positions, (2, 4)))
    )


def test_rotary_computes_in_float32_and_returns_the_dtype_it_got():
    x, positions = normal(1, 4, 2, 8, dtype=jnp.bfloat16), jnp.arange(4, dtype=jnp.int32)[None] + 1001
    rotated = compiled_rotary(x, positions)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotated, compiled_rotary(x.astype(jnp.float32), positions).astype(jnp.bfloat16))


def test_rotary_is_the_same_compiled_and_vmapped_and_keeps_norms():
    x, positions = normal(3, 4, 2, 8), jnp.asarray(np.arange(12).reshape(3, 4), jnp.int32)
    with jax.disable_jit():
        expected = turned(x, positions)
    np.testing.assert_allclose(compiled_rotary(x, positions), expected, atol=1e-6)
    each = jax.vmap(lambda x, positions: compiled_rotary(x[None], positions[None])[0])(x, positions)
    np.testing.assert_allclose(each, expected, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(expected, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_linear_scaling_divides_positions():
    x = normal(1, 1, 1, 8)
    np.testing.assert_allclose(
        compiled_rotary(x, at(12), scaling="linear", scaling_factor=4.0), compiled_rotary(x, at(3)), atol=1e-5
    )


def test_llama3_scaling_by_wavelength():
    plain = plain_frequencies(64, 500_000.0)
    scaled = frequencies(RotaryPositions(theta=500_000.0, scaling="llama3", scaling_factor=8.0), 64)
    wavelengths = 2 * np.pi / plain
    expected = []
    for frequency, wavelength in zip(plain, wavelengths, strict=True):
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192:
            expected.append(frequency / 8)
        else:
            blend = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - blend) * frequency / 8 + blend * frequency)
    assert min(wavelengths) < 8192 / 4 < max(wavelengths) > 8192
    assert any(8192 / 4 < wavelength < 8192 for wavelength in wavelengths)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_sinusoidal_is_the_formula_of_the_paper():
    positions = jnp.asarray([[0, 1, 7], [3, 2, 100]], jnp.int32)
    vectors = np.asarray(sinusoidal(positions, 6))
    for row in range(2):
        for column in range(3):
            for i in range(3):
                angle = float(positions[row, column]) / 10_000 ** (2 * i / 6)
                np.testing.assert_allclose(vectors[row, column, 2 * i], np.sin(angle), atol=1e-5)
                np.testing.assert_allclose(vectors[row, column, 2 * i + 1], np.cos(angle), atol=1e-5)


def test_sinusoidal_of_an_odd_width_drops_the_last_cosine():
    positions = jnp.arange(3, dtype=jnp.int32)[None]
    vectors = sinusoidal(positions, 5)
    assert vectors.shape == (1, 3, 5)
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(vectors[..., 4], np.sin(np.arange(3) / 10_000 ** (4 / 5))[None], atol=1e-6)


def test_an_odd_head_is_an_error():
    with pytest.raises(ValueError, match="head_dim must be even, got 7"):
        plain_frequencies(7, 10.0)


def test_an_unknown_scaling_is_an_error():
    with pytest.raises(UserError, match=r"scaling must be one of none, linear, llama3, .*, got 'ntk'"):
        RotaryPositions(scaling="ntk")


def test_turned_vectors_make_products_with_distances_products_with_positions():
    vector, queries, keys = normal(2, 5, 3, 8), np.array([[0, 3, 4, 90, 7], [5, 5, 1, 2, 0]]), np.array([0, 6, 2, 90])
    turned = turn_to_query(vector, jnp.asarray(queries, jnp.int32), theta=100.0)
    found = jnp.einsum("bthd,sd->bhts", turned, sinusoidal(jnp.asarray(keys[None], jnp.int32), 8, theta=100.0)[0])
    distances = jnp.asarray((queries[:, :, None] - keys).reshape(2, -1), jnp.int32)
    expected = jnp.einsum("bthd,btsd->bhts", vector, sinusoidal(distances, 8, theta=100.0).reshape(2, 5, 4, 8))
    np.testing.assert_allclose(found, expected, atol=2e-4)
