"""A target of weight 0 never matters, whatever it holds; one that counts and is no token of the model is NaN, and refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained_objectives import TRAINED

from transformer.config import Config, DataConfig
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.objectives.next_token import NextToken
from transformer.objectives.statistics import predicted_statistics, token_statistics
from transformer.ops.ids import check_batch_ids
from transformer.parts import Parts, initialize, resolve
from transformer.types import Batch, LabelledBatch, PairBatch, UserError

ROWS, T, CLASSES = 4, 8, ("no", "yes", "perhaps")
RATES = {"mask_rate": 0.9, "noise_density": 0.5, "mean_span_length": 4.0}
SMOOTH = {"label_smoothing": 0.1, "z_loss": 1e-2}
# Each kind once, whole or in chunks, which one function serves; next_token both ways.
_CHUNKS = {"next_token": (1, 3), "prefix_lm": (3,), "seq2seq": (3,)}
KINDS = [pytest.param(kind, chunks, id=f"{kind}-{chunks}") for kind in TRAINED for chunks in _CHUNKS.get(kind, (1,))]


def random_params(objective, model):
    shapes, _ = initialize(objective, model, None)
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * generator.normal(size=leaf.shape), leaf.dtype), shapes)


def objective_of(kind, chunks):
    """An objective with the given settings, as far as it has them."""
    settings = {"loss_chunks": chunks, **RATES, **SMOOTH}
    own = {field.name for field in dataclasses.fields(OBJECTIVES.find(kind))}
    return OBJECTIVES.find(kind)(**{name: value for name, value in settings.items() if name in own})


@functools.cache
def make(kind, chunks):
    """The config, its parameters and a function of a batch: the loss, its gradient and statistics."""
    block = BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(hidden_dim=8))
    config = Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(block,), init_std=0.3),
        objective=objective_of(kind, chunks),
        data=DataConfig(sequence_length=T),
    )
    class_names = CLASSES if kind == "classification" else ()
    parts = Parts(resolve(config, ByteTokenizer()), ByteTokenizer(), class_names=class_names)
    objective = parts.loss
    params = random_params(parts.config.objective, parts.model)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def graded(batch):
        def loss(params):
            (loss_sum, _), (_, statistics) = objective.loss(params, (), batch, jax.random.key(1), False)
            return loss_sum, statistics

        return jax.value_and_grad(loss, has_aux=True)(params)

    return parts.sizes, graded


def make_batch(kind):
    """A batch of which half of the targets do not count; the name of the field with targets."""
    tokens = np.random.default_rng(0).integers(0, 256, (3, ROWS, T)).astype(np.int32)
    weights = (np.arange(T)[None] % 2 * np.ones((ROWS, 1))).astype(np.float32)
    whole, places = np.ones((ROWS, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    if kind == "classification":
        return LabelledBatch(tokens[0], whole, np.array([0, 1, 2, 1], np.int32), weights[0, :ROWS]), "labels"
    if OBJECTIVES.find(kind).num_stacks == 2:
        return PairBatch(tokens[2], whole, tokens[0], tokens[1], weights, whole), "targets"
    return Batch(tokens[0], tokens[1], weights, whole, places), "targets"


def with_targets(batch, name, value, where):
    return batch._replace(**{name: np.where(where, np.int32(value), getattr(batch, name))})


@pytest.mark.parametrize(("kind", "chunks"), KINDS)
def test_a_target_of_weight_0_never_matters(kind, chunks):
    sizes, graded = make(kind, chunks)
    batch, name = make_batch(kind)
    expected = graded(batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    for value in (-1, -100, 10**6):
        poisoned = with_targets(batch, name, value, batch.weights == 0)
        check_batch_ids(sizes, poisoned)
        jax.tree.map(np.testing.assert_array_equal, graded(poisoned), expected)


@pytest.mark.parametrize(("kind", "chunks"), KINDS)
@pytest.mark.parametrize("value", [-1, -100, 10**6])
def test_a_target_that_counts_must_be_the_models(kind, chunks, value):
    sizes, graded = make(kind, chunks)
    batch, name = make_batch(kind)
    first = np.zeros_like(batch.weights, bool)
    first.flat[1] = True
    poisoned = with_targets(batch, name, value, first)
    assert np.isnan(graded(poisoned)[0][0])
    with pytest.raises(UserError, match=rf"(targets|labels) with a weight .*(must be|holds).* {value}"):
        check_batch_ids(sizes, poisoned)


@pytest.mark.parametrize(("kind", "chunks"), KINDS)
def test_a_token_outside_the_table_is_nan_and_refused(kind, chunks):
    sizes, graded = make(kind, chunks)
    batch, _ = make_batch(kind)
    for name in {"inputs", "source"} & set(batch._fields):
        for value in (-1, sizes.vocab_size):
            poisoned = with_targets(batch, name, value, np.arange(T)[None] == 1)
            assert np.isnan(graded(poisoned)[0][0])
            with pytest.raises(UserError, match=f"must be at least 0 and below vocab_size.*{name} holds .*{value}"):
                check_batch_ids(sizes, poisoned)


def test_logits_of_weight_0_may_be_anything():
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(size=(2, 3, 5)).astype(np.float32), jnp.ones((2, 3), jnp.int32)
    weights = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    config = NextToken(**SMOOTH)

    def loss(logits):
        statistics = token_statistics(logits, targets, weights, config)
        return statistics["objective"], statistics

    graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = graded(jnp.asarray(logits))
    for value in (np.nan, np.inf, -np.inf):
        poisoned = jnp.where((weights == 0)[..., None], value, logits)
        jax.tree.map(np.testing.assert_array_equal, graded(poisoned), expected)


def test_hidden_states_of_weight_0_may_be_anything_in_chunks():
    objective = objective_of("next_token", 3)
    block = BlockConfig(AttentionConfig(num_heads=2))
    model = objective.make_model(ModelConfig(vocab_size=257, num_layers=1, embed_dim=8, pattern=(block,)))
    params = random_params(objective, model)
    weights = jnp.asarray(np.arange(8)[None] % 2, jnp.float32)
    hidden, targets = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8)), jnp.float32), jnp.ones((1, 8), int)

    @jax.jit
    def graded(hidden):
        def loss(params, hidden):
            return predicted_statistics(model, params, hidden, targets, weights, objective)["objective"]

        return jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)

    poisoned = jnp.where((weights == 0)[..., None], jnp.nan, hidden)
    jax.tree.map(np.testing.assert_array_equal, graded(poisoned), graded(hidden))
