"""Our modules inside the code of others: NNX, scans and maps, export, Haiku, Equinox, Flax's TrainState."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from transformer import (
    Attention,
    AttentionConfig,
    AttentionMask,
    Block,
    BlockConfig,
    Decoder,
    FeedForward,
    FeedForwardConfig,
    MixtureOfExperts,
    ModelConfig,
)

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
TOKENS = jnp.array([[1, 2, 3, 4]])
BLOCK = BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(hidden_dim=12))
MODULES = {
    "attention": Attention(AttentionConfig(num_heads=2, num_kv_heads=1, qk_norm=True, use_bias=True)),
    "block": Block(BLOCK),
    "experts": MixtureOfExperts(FeedForwardConfig(hidden_dim=12, num_experts=3)),
    "feed_forward": FeedForward(FeedForwardConfig(activation="silu", gated=True)),
}


def tiny(**changes):
    return Decoder(ModelConfig(vocab_size=7, num_layers=2, embed_dim=8, pattern=(BLOCK,), **changes))


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


def params_of(module, *args):
    return jax.jit(module.init)(jax.random.key(0), *args)


def same(found, expected, **tolerance):
    np.testing.assert_allclose(found, expected, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def bridged(module, *args):
    """An NNX module with its parameters, and the same as linen's tree."""
    module = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(*args)
    return module, nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize("name", MODULES)
def test_nnx_bridge(name):
    module, params = bridged(MODULES[name], X)
    expected = jax.tree.map(jnp.shape, params_of(MODULES[name], X)["params"])
    assert jax.tree.map(jnp.shape, params) == expected
    same(module(X), MODULES[name].apply({"params": params}, X))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_nnx_bridge_of_a_model_and_a_step_of_training(scan_layers):
    class Wrapped(nnx.Module):
        def __init__(self, rngs):
            self.decoder = nnx.bridge.ToNNX(tiny(scan_layers=scan_layers), rngs=rngs)
            nnx.bridge.lazy_init(self.decoder, TOKENS)
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, tokens):
            return self.decoder(tokens) * self.scale

    model = Wrapped(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    linen = tiny(scan_layers=scan_layers)
    params = nnx.to_pure_dict(nnx.state(model.decoder, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: loss_of(model(TOKENS)))(model)
        optimizer.update(model, gradient)
        return loss

    @jax.jit
    def graded(params):
        return jax.value_and_grad(lambda params: loss_of(linen.apply({"params": params}, TOKENS)))(params)

    loss, gradient = jax.device_get(graded(params))
    same(step(model, optimizer), loss)
    after = nnx.to_pure_dict(nnx.state(model.decoder, nnx.Param))
    jax.tree.map(lambda a, p, g: same(a, np.asarray(p) - 0.05 * g), after, params, gradient)
    assert loss_of(model(TOKENS)) < loss


def test_nnx_keeps_a_cache_out_of_its_state():
    """The cache is given and returned, so that a bridged decoder needs no mutable variables."""
    model, params = bridged(tiny(), TOKENS)
    cache = tiny().init_cache(1, 4)
    first, cache = model(TOKENS[:, :3], cache=cache)
    last, _ = model(TOKENS[:, 3:], cache=cache)
    full = jax.jit(tiny().apply)({"params": params}, TOKENS)
    same(jnp.concatenate([first, last], axis=1), full)


@pytest.mark.parametrize("name", MODULES)
def test_linen_scan(name):
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            run = nn.scan(
                lambda module, x, _: (module(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return run(MODULES[name].copy(name="layer"), x, None)[0]

    variables = params_of(Stacked(), X)
    expected = X
    for layer in range(3):
        expected = MODULES[name].apply({"params": layer_of(variables["params"]["layer"], layer)}, expected)
    same(Stacked().apply(variables, X), expected)


def layer_of(tree, index):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[index]), tree)


def test_linen_vmap():
    mapped = nn.vmap(Attention, variable_axes={"params": 0}, split_rngs={"params": True})(AttentionConfig(num_heads=2))
    inputs = jnp.stack([X, 2 * X, X - 1])
    variables = params_of(mapped, inputs)
    kernel = variables["params"]["query"]["kernel"]
    assert kernel.shape == (3, 8, 2, 4) and not np.array_equal(kernel[0], kernel[1])
    out = mapped.apply(variables, inputs)
    for index in range(3):
        params = {"params": layer_of(variables["params"], index)}
        same(out[index], Attention(AttentionConfig(num_heads=2)).apply(params, inputs[index]))


def test_vmap_and_scan_of_jax():
    layer = MODULES["block"]
    stacked = jax.vmap(lambda key: layer.init(key, X))(jax.random.split(jax.random.key(0), 3))
    out, _ = jax.lax.scan(lambda x, variables: (layer.apply(variables, x), None), X, stacked)
    expected = X
    for index in range(3):
        expected = layer.apply(layer_of(stacked, index), expected)
    same(out, expected)
    # A row's attention with a row's own parameters, as an ensemble has it.
    ensemble = jax.vmap(layer.apply, in_axes=(0, None))(stacked, X)
    same(ensemble[1], layer.apply(layer_of(stacked, 1), X))


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "tpu", "cuda")], ids="-".join)
def test_export(platforms):
    """A model as a program, for platforms that are not there too."""
    model = tiny()
    variables = params_of(model, TOKENS)
    exported = jax.export.export(jax.jit(model.apply), platforms=platforms)(variables, TOKENS)
    same(exported.call(variables, TOKENS), model.apply(variables, TOKENS))


def test_flax_train_state():
    model = tiny()
    state = TrainState.create(apply_fn=model.apply, params=params_of(model, TOKENS)["params"], tx=optax.adam(1e-2))

    @jax.jit
    def step(state):
        loss, gradient = jax.value_and_grad(lambda p: loss_of(state.apply_fn({"params": p}, TOKENS)))(state.params)
        return state.apply_gradients(grads=gradient), loss

    state, first = step(state)
    for _ in range(5):
        state, last = step(state)
    assert last < first


def test_haiku():
    """The parameters of a linen module are converted to a Haiku module's."""
    haiku = pytest.importorskip("haiku", reason="Haiku is not installed (pip install dm-haiku)")
    layer = MODULES["attention"]

    def forward(x):
        params = haiku.lift(lambda key, x: layer.init(key, x)["params"], name="attention")(haiku.next_rng_key(), x)
        return layer.apply({"params": params}, x)

    transformed = haiku.transform(forward)
    params = transformed.init(jax.random.key(0), X)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    out = transformed.apply(params, jax.random.key(1), X)
    assert out.shape == X.shape
    gradient = jax.grad(lambda params: (transformed.apply(params, jax.random.key(1), X) ** 2).sum())(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


def test_equinox():
    """Module and parameters are the fields of one Equinox module, of which the arrays are trained."""
    equinox = pytest.importorskip("equinox", reason="Equinox is not installed (pip install equinox)")

    class Layer(equinox.Module):
        params: dict
        linen: nn.Module = equinox.field(static=True)

        def __call__(self, x):
            return self.linen.apply({"params": self.params}, x, mask=AttentionMask(causal=True))

    layer = Layer(params_of(MODULES["attention"], X)["params"], MODULES["attention"])
    expected = MODULES["attention"].apply({"params": layer.params}, X, mask=AttentionMask(causal=True))
    same(equinox.filter_jit(layer)(X), expected)

    @equinox.filter_jit
    def step(layer):
        loss, gradient = equinox.filter_value_and_grad(lambda layer: (layer(X) ** 2).mean())(layer)
        return equinox.apply_updates(layer, jax.tree.map(lambda g: -0.1 * g, gradient)), loss

    layer, first = step(layer)
    _, last = step(layer)
    assert last < first
