"""The loss that reads logits once is the plain loss: values, gradients, second derivatives, over every objective and mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config, DataConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.ops import fused_loss, losses
from transformer.parallel.mesh import make_mesh
from transformer.parts import Parts, StandIn, resolve, training_runtime

SETTINGS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.1},
    "all": {"label_smoothing": 0.3, "z_loss": 0.01},
}
INF = np.inf


def make_logits(kind):
    """Float32 logits [2, 3, 300] and targets."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 300)).astype(np.float32) * 4
    targets = rng.integers(0, 300, (2, 3)).astype(np.int32)
    match kind:
        case "far":
            logits *= 1e4
        case "equal":
            logits[:] = logits[..., :1]
        case "ties":
            logits = np.round(logits / 8)
        case "impossible":
            logits[..., ::7] = -INF
            targets = targets // 7 * 7 + 1
    return jnp.asarray(logits), jnp.asarray(targets)


def close(found, expected, rtol=1e-5):
    """Within a share of the largest element."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b), initial=0, where=np.isfinite(b)))

    jax.tree.map(check, found, expected)


def both(function, *arguments):
    """What it gives with each way to read logits."""
    return tuple(jax.jit(functools.partial(function, s))(*arguments) for s in (fused_loss.summarize, losses.summarize))


@pytest.mark.parametrize("kind", ["normal", "far", "equal", "ties", "impossible"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.usefixtures("strict_dtypes")
def test_values_and_gradients_agree_with_the_reference(settings, kind):
    logits, targets = make_logits(kind)
    weights = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)

    def graded(summarize, logits):
        def total(logits):
            found = losses.cross_entropy(logits, targets, **settings, summarize=summarize)
            # The likelihood has a gradient of its own.
            return jnp.sum(weights * (found.loss + 0.5 * found.nll)), found

        return jax.value_and_grad(total, has_aux=True)(logits)

    found, expected = both(graded, logits)
    close(found, expected)
    np.testing.assert_array_equal(found[0][1].correct, expected[0][1].correct)
    np.testing.assert_array_equal(fused_loss.summarize(logits, targets).best, jnp.argmax(logits, axis=-1))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_have_gradients(settings):
    logits, targets = make_logits("impossible")

    def twice(summarize, logits):
        def loss(logits):
            return jnp.sum(losses.cross_entropy(logits, targets, **settings, summarize=summarize).loss)

        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(logits)

    close(*both(twice, logits))


def test_there_is_no_forward_mode():
    logits, targets = make_logits("normal")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: fused_loss.summarize(x, targets).log_normalizer, (logits,), (logits,))


@pytest.mark.parametrize("value", [np.nan, INF])
def test_a_broken_row_breaks_itself_only(value):
    logits, targets = make_logits("normal")
    poisoned = logits.at[0, 1, 7].set(value)

    def graded(summarize, logits):
        return jax.grad(lambda x: jnp.sum(losses.cross_entropy(x, targets, summarize=summarize).loss))(logits)

    found, expected = both(graded, poisoned)
    assert np.array_equal(np.isnan(found).any(-1), np.isnan(expected).any(-1))
    assert np.isnan(found).any(-1).sum() == 1


@pytest.mark.parametrize("target", [-1, 300])
def test_a_target_outside_the_vocabulary_is_nan(target):
    logits, _ = make_logits("normal")
    outside = jnp.full((2, 3), target)
    found = losses.cross_entropy(logits, outside, **SETTINGS["all"], summarize=fused_loss.summarize)
    assert np.isnan(found.nll).all() and np.isnan(found.loss).all() and not np.any(found.correct)


def test_the_gradient_is_no_scatter_and_logits_are_reduced_once():
    logits, targets = jax.ShapeDtypeStruct((8, 1000), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)

    def graded(summarize, logits, targets):
        return jax.grad(lambda x: jnp.sum(losses.cross_entropy(x, targets, summarize=summarize).loss))(logits)

    def count(summarize, platform):
        text = jax.jit(functools.partial(graded, summarize)).trace(logits, targets)
        text = text.lower(lowering_platforms=(platform,)).as_text()
        wide = [line for line in text.splitlines() if "tensor<8x1000x" in line]
        scatters = sum('"stablehlo.scatter"' in line for line in text.splitlines())
        return scatters, sum(bool(re.search(r"stablehlo\.reduce\(", line)) for line in wide)

    for platform in ("cuda", "tpu"):
        assert count(fused_loss.summarize, platform) == (0, 1)
        scatters, reductions = count(losses.summarize, platform)
        assert scatters == 1 and reductions > 1


# ---- From the objectives of a run ------------------------------------------------------------------------------------


def make_config(kind, *, chunks=1, num_layers=1, **model):
    """A small run of an objective."""
    objective = dataclasses.replace(OBJECTIVES.find(kind)(), loss_chunks=chunks, **SETTINGS["all"])
    block = BlockConfig(AttentionConfig(num_heads=2))
    return Config(
        model=ModelConfig(vocab_size=290, num_layers=num_layers, embed_dim=16, pattern=(block,), init_std=0.3, **model),
        data=DataConfig(sequence_length=12, batch_size=4),
        objective=objective,
    )


def make_parts(config, platform):
    vocabulary = StandIn(270)
    return Parts(resolve(config, vocabulary), vocabulary, training_runtime(platform))


@functools.cache
def make_params(kind, **model):
    """They are the same for every platform and number of chunks."""
    return make_parts(make_config(kind, **model), "cpu").init_params(jax.random.key(0))


def graded_step(kind, platform, *, chunks=1, mesh=None, **model):
    """Loss and gradient of a batch as training on a platform has them, and the compiled text."""
    config = make_config(kind, chunks=chunks, **model)
    parts, objective = make_parts(config, platform), config.objective
    rng = np.random.default_rng(0)

    def field(name, shape):
        if np.issubdtype(shape.dtype, np.floating):
            return (rng.random(shape.shape) < 0.6).astype(np.float32) * 1.5
        if "segment" in name:
            return (np.arange(shape.shape[1]) < 9) * np.ones(shape.shape, np.int32)
        if name == "positions":
            return np.arange(shape.shape[1], dtype=np.int32) * np.ones(shape.shape, np.int32)
        return rng.integers(0, 270, shape.shape, dtype=np.int32)

    shapes = objective.batch_shapes(config)
    batch = type(shapes)(*(x if x is None else field(n, x) for n, x in zip(shapes._fields, shapes, strict=True)))

    def loss(params, batch):
        (total, _), (_, statistics) = parts.loss.loss(params, (), batch, jax.random.key(1), True)
        return total, statistics

    params = make_params(kind, **model)
    with jax.set_mesh(mesh) if mesh is not None else jax.set_mesh(make_mesh(1)):
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch).compile()
        return compiled(params, batch), compiled.as_text()


@functools.cache
def reference(kind, **model):
    """The same with the logits read as a CPU reads them, in one chunk on one device."""
    return graded_step(kind, "cpu", **model)[0]


KINDS = ("next_token", "prefix_lm", "masked_lm", "seq2seq", "span_corruption")


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_has_its_loss_and_gradient(kind, chunks):
    found, _ = graded_step(kind, "gpu", chunks=chunks)
    expected = reference(kind)
    close(found, expected)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_models_differ_by_their_rounding(dtype, platform):
    found, _ = graded_step("next_token", platform, dtype=dtype)
    expected = reference("next_token", dtype=dtype)
    close(found[0], expected[0])
    close(found[1], expected[1], rtol=2e-2)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_vocabulary_over_devices_is_one(tie_embeddings, chunks):
    mesh = make_mesh({"tensor": 2, "data": 2})
    model = {"tie_embeddings": tie_embeddings, "logits_soft_cap": 5.0}
    found, text = graded_step("next_token", "gpu", mesh=mesh, chunks=chunks, **model)
    expected = reference("next_token", **model)
    close(found, expected)
    gathered = re.findall(r"= \S*\[([\d,]+)\]\S* all-gather\(", text)
    assert not any(shape.endswith(",290") for shape in gathered), "logits must not be gathered"


@pytest.mark.parametrize("settings", [{"scan_layers": True}, {"remat": "dots"}, {"scan_layers": True, "remat": "full"}])
def test_what_a_gpu_computes_again_changes_nothing(settings):
    found, _ = graded_step("next_token", "gpu", num_layers=2, **settings)
    expected = reference("next_token", num_layers=2, **settings)
    close(found, expected)
