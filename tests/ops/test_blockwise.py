"""Block-wise attention computes no block that the mask excludes, and its memory grows with the sequence only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.ops.attention import dot_product_attention
from transformer.ops.backends.blockwise import Blocks, blockwise_attention, choose_blocks
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.patterns.strided import StridedPattern

pytestmark = pytest.mark.usefixtures("strict_dtypes")

BLOCKS = [Blocks(4, 0, unrolled=True), Blocks(4, 4, unrolled=False)]


def temporary_bytes(length, implementation):
    """What the compiled gradient of causal attention needs beside its arguments and results."""
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def loss(query, key, value):
        mask = AttentionMask(causal=True)
        return jnp.sum(dot_product_attention(query, key, value, mask=mask, implementation=implementation) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_sequence_not_with_its_square():
    short, middle, long = (temporary_bytes(length, "blockwise") for length in (512, 2048, 4096))
    assert middle < 5 * short
    assert long < 3 * middle
    assert long < 4096 * 4096
    assert temporary_bytes(2048, "xla") > 2 * 2048 * 2048


def test_long_sequences_do_not_lengthen_the_program():
    def program(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        attend = functools.partial(dot_product_attention, implementation="blockwise", mask=AttentionMask(causal=True))
        return len(jax.jit(attend).lower(x, x, x).as_text().splitlines())

    assert program(16_384) < 1.1 * program(2048)


@pytest.mark.parametrize("length", [1, 5, 128, 300, 1000, 5000])
def test_chosen_blocks_cover_the_square_without_much_padding(length):
    blocks = choose_blocks(length, length)
    assert 1 <= blocks.query_size <= length
    assert blocks.unrolled == (length <= 512)
    assert blocks.unrolled or 1 <= blocks.key_size <= length


@pytest.mark.parametrize("blocks", BLOCKS)
def test_excluded_blocks_are_never_computed(blocks):
    # A weight of zero times NaN is NaN: rows stay finite only if the poisoned blocks are not touched.
    length = 16
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, length, 1, 4)), jnp.float32)

    @jax.jit
    def values_and_gradients(value, mask):
        attend = functools.partial(blockwise_attention, mask=mask, bias=None, scale=1.0, blocks=blocks)
        out, pull_back = jax.vjp(lambda query: attend(query, x, value), x)
        return out, pull_back(jnp.ones_like(out))[0]

    def finite_rows(mask, poisoned):
        out, gradient = values_and_gradients(x.at[:, poisoned].set(jnp.nan), mask)
        finite = np.isfinite(out).all(axis=(0, 2, 3))
        np.testing.assert_array_equal(finite, np.isfinite(gradient).all(axis=(0, 2, 3)))
        return "".join(str(int(row)) for row in finite)

    assert finite_rows(AttentionMask(causal=True), slice(8, None)) == "1111111100000000"
    assert finite_rows(AttentionMask(causal=True, window=2), slice(0, 4)) == "0000000011111111"
    assert finite_rows(AttentionMask(window=2), slice(12, None)) == "1111111100000000"
    segments = jnp.ones((1, length), jnp.int32)
    assert finite_rows(AttentionMask.packed(segments, causal=True), slice(12, None)) == "1111111111110000"


def test_blocks_outside_a_pattern_are_never_computed():
    blocks, length = Blocks(4, 4, unrolled=False), 32
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, length, 1, 4)), jnp.float32)

    def touched(pattern):
        """For each block of queries, the blocks of keys whose NaN it meets."""
        mask = AttentionMask(causal=True, pattern=pattern)
        attend = jax.jit(functools.partial(blockwise_attention, mask=mask, bias=None, scale=1.0, blocks=blocks))
        columns = []
        for block in range(8):
            out = attend(x, x, x.at[:, 4 * block : 4 * block + 4].set(jnp.nan))
            columns.append(np.isnan(out).any(axis=(0, 2, 3)).reshape(8, 4).any(axis=1))
        return ["".join(str(int(cell)) for cell in row) for row in np.stack(columns, axis=1)]

    assert touched(StridedPattern(block_size=4, stride=3)) == [
        *("10000000", "11000000", "11100000", "11110000", "01111000", "00111100", "10011110", "01001111")
    ]
    assert touched(FixedPattern(block_size=4, stride=3)) == [
        *("10000000", "11000000", "11100000", "00110000", "00111000", "00111100", "00100110", "00100111")
    ]
    # Halves and doubles of the blocks that are computed: what any part of a block needs is computed.
    assert touched(FixedPattern(block_size=2, stride=3))[4] == "01111000"
    assert touched(FixedPattern(block_size=8, stride=2))[5] == "00111100"


def test_a_pattern_chooses_the_blocks():
    assert choose_blocks(8192, 8192, FixedPattern(block_size=128, stride=8)) == Blocks(128, 128, False)
    assert choose_blocks(8192, 8192, FixedPattern(block_size=4, stride=8)) == Blocks(64, 64, False)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_queries_beyond_a_window_of_the_last_key_get_zeros(blocks):
    query, key = jnp.ones((1, 13, 1, 4)), jnp.ones((1, 3, 1, 4))
    mask = AttentionMask(causal=True, window=2)
    attend = functools.partial(blockwise_attention, mask=mask, bias=None, scale=1.0, blocks=blocks)
    out = jax.jit(attend)(query, key, key)
    np.testing.assert_array_equal(out[0, :, 0, 0], [1] * 4 + [0] * 9)
