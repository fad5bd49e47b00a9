"""Derivatives of any order and mode with plain attention and products; one sentence where a kernel has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer import AttentionConfig, AttentionMask, BlockConfig, Decoder, ModelConfig, dot_product_attention
from transformer.objectives.next_token import NextToken
from transformer.parts import training_runtime

MODES = {
    "forward": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "forward over reverse": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,))[1],
    "reverse over reverse": lambda f: jax.grad(lambda x: total(jax.grad(f)(x))),
    "reverse over forward": lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1]),
}


def total(tree):
    return sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in jax.tree.leaves(tree))


def lower(function, *arguments):
    """As far as JAX looks at derivatives: what it has no rule for shows at the latest here."""
    return jax.jit(function).lower(*arguments)


def model_loss(dtype, length, *, scan=False, remat="none", tied=True, implementation="xla", make=Decoder):
    config = ModelConfig(
        vocab_size=7,
        num_layers=2,
        embed_dim=8,
        dtype=dtype,
        scan_layers=scan,
        remat=remat,
        tie_embeddings=tied,
        pattern=(BlockConfig(AttentionConfig(num_heads=2, implementation=implementation)),),
    )
    model, tokens = make(config), jnp.ones((1, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return params, lambda params: (model.apply(params, tokens) ** 2).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [{"length": 8}, {"length": 512, "tied": False}, {"length": 600, "scan": True, "remat": "full"}],
    ids=["short", "long", "scanned"],
)
def test_every_derivative_of_a_model(mode, dtype, settings):
    params, loss = model_loss(dtype, **settings)
    lower(MODES[mode](loss), params)


def test_a_loaded_model_has_them_and_a_trained_one_its_own_products():
    params, loss = model_loss("bfloat16", 8, make=NextToken().make_model)
    lower(MODES["forward"](loss), params)
    for choice in (("cpu",), ("cpu", False), ("gpu",)):
        _, loss = model_loss("bfloat16", 8, make=functools.partial(Decoder, runtime=training_runtime(*choice)))
        with pytest.raises(TypeError, match="forward-mode autodiff"):
            lower(MODES["forward"](loss), params)


def test_hessian_product_is_a_difference_of_gradients():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 512, 1, 4)), jnp.float32)

    def loss(x):
        out = dot_product_attention(x, x, x, mask=AttentionMask(causal=True), implementation="xla")
        return (out**3).mean()

    direction = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    exact = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (direction,))[1])(x)
    gradient, step = jax.jit(jax.grad(loss)), 1e-2
    difference = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(exact, difference, atol=2e-2 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("implementation", ["auto", "splash"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "forward"])
def test_second_derivatives_of_a_kernel_name_the_setting(mode, implementation):
    """Of one for a TPU too, which `auto` traces beside what a CPU takes."""
    params, loss = model_loss("bfloat16", 512, implementation=implementation)
    with pytest.raises(NotImplementedError, match="for second ones set implementation='xla'"):
        lower(MODES[mode](loss), params)
