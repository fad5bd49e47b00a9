"""A checkpoint fits the same model on other devices, and with its layers scanned instead of looped, or the other way round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.layers.scan_params import loop_params, scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.parallel.mesh import MeshRunner, make_mesh
from transformer.training.checkpoint import Checkpointer, find_checkpoint, load_params
from transformer.training.state import create_state
from transformer.types import UserError

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
BLOCK = BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(hidden_dim=16))


def model(scan_layers, pattern_length=2, num_layers=4):
    return Decoder(
        ModelConfig(
            vocab_size=16,
            max_length=8,
            num_layers=num_layers,
            embed_dim=8,
            pattern=(BLOCK,) * pattern_length,
            scan_layers=scan_layers,
        )
    )


def make_state(params):
    """A state whose every array is different."""
    state = create_state(params, OPTIMIZER, jax.random.key(3), ema=True)
    numbers = iter(range(10_000))

    def differ(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.ndim == 0:
            return x
        return x + next(numbers)

    return jax.tree.map(differ, state)._replace(step=jnp.int32(5))


def runner_of(sizes, scan_layers):
    shapes, axes = init_params(model(scan_layers), None)
    runner = MeshRunner(make_mesh(sizes), lambda s, b: (s, {}), lambda p, c, b: (c, {}), axes)
    return runner, runner.abstract_state(jax.eval_shape(make_state, shapes))


def plain(tree):
    return jax.device_get(tree._replace(key=jax.random.key_data(tree.key)))


@pytest.fixture(scope="module")
def looped():
    return make_state(init_params(model(False), jax.random.key(0))[0])


def saved(state, directory):
    checkpointer = Checkpointer(directory)
    checkpointer.save(state, {"place": 7})
    checkpointer.close()
    return Checkpointer(directory)


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_from_a_loop_to_a_scan_and_back(sizes, looped, tmp_path):
    _, scanned_target = runner_of(sizes, True)
    restored = saved(looped, tmp_path / "looped").restore(scanned_target)
    assert restored.step == 5 and restored.loop == {"place": 7}
    jax.tree.map(np.testing.assert_array_equal, plain(restored.state), plain(scan_params(looped, 2)))
    jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail(str(x.sharding)), restored.state, scanned_target)

    runner, looped_target = runner_of(sizes, False)
    again = saved(restored.state, tmp_path / "scanned").restore(looped_target)
    jax.tree.map(np.testing.assert_array_equal, plain(again.state), plain(looped))
    # What is placed already is not copied.
    assert (
        runner.place_state(again.state).params["token_embedding"]["embedding"]
        is (again.state.params["token_embedding"]["embedding"])
    )


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ({"data": 1}, {"data": 1, "fsdp": 8}),
        ({"data": 1, "fsdp": 8}, {"data": 1}),
        ({"data": 1, "fsdp": 8}, {"data": 4, "tensor": 2}),
        ({"data": 1, "fsdp": 4}, {"dcn": 2, "fsdp": 2, "data": 1}),
    ],
    ids=str,
)
def test_from_one_mesh_to_another(writer, reader, looped, tmp_path):
    runner, _ = runner_of(writer, False)
    placed = runner.place_state(looped)
    _, target = runner_of(reader, False)
    restored = saved(runner.fetch_state(placed), tmp_path).restore(target).state
    jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(looped))
    embedding = restored.params["token_embedding"]["embedding"]
    assert embedding.sharding.mesh.shape == make_mesh(reader).shape


def test_parameters_alone(looped, tmp_path):
    saved(looped, tmp_path)
    shapes, _ = init_params(model(True), None)
    step, params = load_params(find_checkpoint(tmp_path), shapes)
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, params, scan_params(looped.ema_params, 2))


def test_a_single_period(tmp_path):
    """As many blocks either way: only the leading axis tells."""
    params, _ = init_params(model(False, 2, 2), jax.random.key(0))
    saved(make_state(params), tmp_path)
    shapes, _ = init_params(model(True, 2, 2), None)
    _, found = load_params(find_checkpoint(tmp_path), shapes)
    expected = loop_params(found)
    jax.tree.map(np.testing.assert_array_equal, make_state(params).ema_params, expected)


def test_frozen_blocks_have_no_moments_to_count_periods_by(tmp_path):
    frozen = {"trained": OPTIMIZER, "frozen": optax.set_to_zero()}

    def make(params):
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if "blocks" in jax.tree_util.keystr(path) else "trained", params
        )
        return create_state(params, optax.partition(frozen, labels), jax.random.key(3))

    state = make(init_params(model(False), jax.random.key(0))[0])
    target = jax.eval_shape(make, init_params(model(True), None)[0])
    restored = saved(state, tmp_path / "looped").restore(target)
    again = saved(restored.state, tmp_path / "scanned").restore(jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, plain(again.state), plain(state))


def test_another_depth_is_refused(looped, tmp_path):
    saved(looped, tmp_path)
    for scan_layers in (False, True):
        shapes, _ = init_params(model(scan_layers, num_layers=6), None)
        with pytest.raises(UserError, match="must fit the model, but differs in"):
            load_params(find_checkpoint(tmp_path), shapes)
