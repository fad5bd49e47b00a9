"""Every rule descends, and clips, decays, freezes and scales the configured parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.optimizer import OPTIMIZERS
from transformer.optimizers.muon import muon_dimensions
from transformer.schedules.constant import ConstantSchedule
from transformer.training.checkpoint import Checkpointer
from transformer.training.optimizer import (
    check_scanned_groups,
    decay_mask,
    freeze,
    group_scales,
    make_optimizer,
    parameter_path,
)
from transformer.training.state import create_state
from transformer.types import UserError

NAMES = OPTIMIZERS.names


def small_params(seed=0):
    """Two matrices of a block, and one of each other sort: few, because every optimizer compiles them often."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)

    return {
        "token_embedding": {"embedding": normal(11, 8)},
        "positions": {"position_embedding": {"embedding": normal(6, 8)}},
        "block": {
            "query": {"kernel": normal(8, 2, 4), "bias": normal(2, 4)},
            "up": {"kernel": normal(8, 16)},
            "norm": {"scale": jnp.ones((8,), jnp.float32)},
        },
        "unused": {"kernel": jnp.array([[-0.0, 0.0], [1.0, -1.0]])},
    }


def config(name, **changes):
    return OPTIMIZERS.find(name)(**{"learning_rate": 0.01, "schedule": ConstantSchedule(), **changes})


def by_path(tree):
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def run(optimizer, params, gradients, steps):
    """Parameters after `steps` updates with the given gradient function, compiled."""

    @jax.jit
    def update(params, opt_state):
        updates, opt_state = optimizer.update(gradients(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for _ in range(steps):
        params, opt_state = update(params, opt_state)
    assert update._cache_size() == 1, "the second step compiled again"
    return params, opt_state


def zero_gradients(params):
    return jax.tree.map(jnp.zeros_like, params)


# ---- Contract of every optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_goes_down_a_quadratic(name):
    target = small_params(seed=1)

    def loss(params):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))

    # Adafactor's learning rate is relative to the size of each parameter.
    rate = 0.1 if name == "adafactor" else 0.02
    optimizer, _ = make_optimizer(config(name, learning_rate=rate, weight_decay=0.0), 100, small_params())
    params, _ = run(optimizer, small_params(), jax.grad(loss), 100)
    assert float(loss(params)) < 0.2 * float(loss(small_params()))


@pytest.mark.parametrize("name", NAMES)
def test_decays_matrices_only_and_by_learning_rate_times_decay(name):
    """With a gradient of zero, decay alone moves the parameters."""
    params = jax.tree.map(jnp.ones_like, small_params())
    optimizer, _ = make_optimizer(config(name, weight_decay=0.5), 10, params)
    after, _ = run(optimizer, params, zero_gradients, 1)
    decayed = {
        "token_embedding/embedding",
        "block/query/kernel",
        "block/up/kernel",
        "unused/kernel",
    }
    for path, leaf in by_path(after).items():
        expected = 1 - 0.01 * 0.5 if path in decayed else 1.0
        np.testing.assert_allclose(leaf, np.full_like(leaf, expected), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_group_keeps_every_bit_and_has_no_state(name):
    """Of negative zeros too, under decay and with gradients that are not finite."""
    groups = ("^block/(query|norm)=0", "unused=0", "token_embedding=0")
    optimizer, _ = make_optimizer(config(name, parameter_groups=groups), 10, small_params())

    def gradients(params):
        grads = jax.tree.map(jnp.ones_like, params)
        grads["unused"]["kernel"] = jnp.full((2, 2), jnp.nan)
        return grads

    after, opt_state = run(optimizer, small_params(), gradients, 3)
    before = by_path(small_params())
    for path, leaf in by_path(after).items():
        same = leaf.tobytes() == before[path].tobytes()
        frozen = path.startswith(("block/query", "block/norm", "unused", "token_embedding"))
        assert same == frozen, path
    assert (11, 8) not in {x.shape for x in jax.tree.leaves(opt_state)}, "moments kept for a frozen embedding"


def test_frozen_negative_zero_survives_an_update_that_is_not_compiled():
    """XLA drops an addition of zero; without it -0.0 + 0.0 is 0.0."""
    optimizer, _ = make_optimizer(config("adamw", parameter_groups=("unused=0",)), 10, small_params())
    updates, _ = optimizer.update(small_params(), optimizer.init(small_params()), small_params())
    after = optax.apply_updates(small_params(), updates)
    assert after["unused"]["kernel"].tobytes() == small_params()["unused"]["kernel"].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_group_scales_its_learning_rate(name):
    def moved(groups):
        optimizer, _ = make_optimizer(config(name, parameter_groups=groups, clip_norm=0.0), 10, small_params())
        after, _ = run(optimizer, small_params(), lambda params: jax.tree.map(jnp.ones_like, params), 1)
        return jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), after, small_params())

    plain, scaled = by_path(moved(())), by_path(moved(("query/kernel=0.5", "block=2", "up=7")))
    for path, factor in (("block/query/kernel", 0.5), ("block/up/kernel", 2.0), ("token_embedding/embedding", 1.0)):
        np.testing.assert_allclose(scaled[path], factor * plain[path], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_a_checkpoint(name, tmp_path):
    optimizer, _ = make_optimizer(config(name, parameter_groups=("query=0", "up=0.5")), 10, small_params())
    state = create_state(small_params(), optimizer, jax.random.key(0))
    params, opt_state = run(optimizer, state.params, lambda params: jax.tree.map(jnp.ones_like, params), 2)
    state = state._replace(params=params, opt_state=opt_state)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, {})
    checkpointer.wait()
    restored = checkpointer.restore(create_state(small_params(), optimizer, jax.random.key(0))).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, (restored.params, restored.opt_state), (params, opt_state))


@pytest.mark.parametrize("name", NAMES)
def test_types_of_the_state_do_not_change(name):
    """bfloat16 parameters stay so: a change of type would compile every step again."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_params())
    optimizer, _ = make_optimizer(config(name), 10, params)
    before = optimizer.init(params)
    after_params, after = run(optimizer, params, lambda params: jax.tree.map(jnp.ones_like, params), 2)
    assert jax.tree.map(lambda x: x.dtype, (params, before)) == jax.tree.map(lambda x: x.dtype, (after_params, after))


@pytest.mark.parametrize("name", NAMES)
def test_follows_the_schedule(name):
    """A first step at a tenth of the learning rate moves a tenth as far."""
    moves = []
    for warmup in (0, 9):
        optimizer, schedule = make_optimizer(
            config(name, schedule=ConstantSchedule(warmup_steps=warmup), weight_decay=0.0), 20, small_params()
        )
        after, _ = run(optimizer, small_params(), lambda params: jax.tree.map(jnp.ones_like, params), 1)
        moves.append(np.asarray(after["block"]["up"]["kernel"] - small_params()["block"]["up"]["kernel"]))
        assert float(schedule(0)) == pytest.approx(0.01 / (warmup + 1))
    np.testing.assert_allclose(moves[1], moves[0] / 10, rtol=1e-3, atol=1e-7)


# ---- Clipping, masks, Muon's matrices, groups ------------------------------------------------------------------------


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 1.0), (0.0, 50.0), (100.0, 50.0)])
def test_clips_to_the_global_norm(clip_norm, expected):
    """Seen through Adam's first moment, which is (1 - b1) times the clipped gradient."""
    optimizer, _ = make_optimizer(config("adamw", clip_norm=clip_norm), 10, small_params())
    count = sum(x.size for x in jax.tree.leaves(small_params()))
    grads = jax.tree.map(lambda x: jnp.full_like(x, 50 / np.sqrt(count)), small_params())
    _, opt_state = run(optimizer, small_params(), lambda params: grads, 1)
    moment = optax.tree.get(opt_state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx(0.1 * expected, rel=1e-4)


def test_decay_mask_goes_by_name_not_by_rank():
    """Biases of heads have two axes, and so have the norms of a scanned stack."""
    params = {
        "decoder": {
            "blocks": {
                "attention": {"query": {"kernel": jnp.ones((2, 8, 2, 4)), "bias": jnp.ones((2, 2, 4))}},
                "pre_attention_norm": {"scale": jnp.ones((2, 8)), "bias": jnp.ones((2, 8))},
            }
        },
        "positions": {"position_embedding": {"embedding": jnp.ones((4, 8))}},
        "relative_bias": {"embedding": jnp.ones((32, 2))},
        "token_embedding": {"embedding": jnp.ones((4, 8))},
    }
    decayed = [path for path, decays in by_path(decay_mask(params)).items() if decays]
    assert decayed == ["decoder/blocks/attention/query/kernel", "token_embedding/embedding"]


def test_muon_takes_the_matrices_of_blocks(toy):
    other = {
        "output": {"projection": {"kernel": jnp.ones((8, 11))}},
        "mixture": {"router": {"kernel": jnp.ones((8, 3))}},
    }
    params = {**toy.params(), **other}
    taken = {"/".join(path.split("/")[:3]) for path in by_path(muon_dimensions(params))}  # a leaf for each field
    assert taken == {f"block/{name}/kernel" for name in ("query", "out", "up", "down")}


@pytest.mark.parametrize(
    ("role", "shape", "matrix"),
    [
        ("query", (8, 2, 3), (8, 6)),
        ("out", (2, 3, 8), (6, 8)),
        ("gate", (8, 5), (8, 5)),
        ("down", (5, 8), (5, 8)),
        ("up", (3, 8, 5), (8, 5)),
    ],
)
@pytest.mark.parametrize("layers", [0, 2])
def test_muon_orthogonalises_the_whole_matrix(role, shape, matrix, layers):
    """(D, H, K) is one D x HK matrix; a first axis, of a scanned stack or of experts, numbers independent ones."""
    rng = np.random.default_rng(0)
    shape = (layers, *shape) if layers else shape
    grads = {"block": {role: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}}}
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer, _ = make_optimizer(config("muon", learning_rate=1.0, clip_norm=0.0), 10, params)
    updates, _ = run(optimizer, params, lambda params: grads, 1)
    size = 0.2 * np.sqrt(max(matrix))
    for update in np.reshape(updates["block"][role]["kernel"], (-1, *matrix)):
        # Five Newton-Schulz rounds bring singular values near 1, on purpose not closer (Jordan 2024).
        values = np.linalg.svd(update, compute_uv=False) / size
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_first_matching_group_counts(toy):
    scales = by_path(group_scales(config("adamw", parameter_groups=("query=0.5", "block=0", "norm=3")), toy.params()))
    assert scales["block/query/bias"] == 0.5
    assert scales["block/norm/scale"] == 0.0
    assert scales["token_embedding/embedding"] == 1.0


def test_group_without_parameters_is_refused(toy):
    with pytest.raises(UserError, match=r"'tokens' must match a parameter; the parameters are block/down/bias"):
        make_optimizer(config("adamw", parameter_groups=("block=1", "tokens=0")), 10, toy.params())


def test_freezing_everything_is_refused(toy):
    with pytest.raises(UserError, match="must leave something to train"):
        make_optimizer(config("adamw", parameter_groups=(".=0",)), 10, toy.params())


def test_groups_must_not_tell_scanned_layers_apart():
    params = {"decoder": {"blocks": {f"block_{i}": {"up": {"kernel": jnp.ones((3, 8, 8))}} for i in range(2)}}}
    for groups in (("up=0.5",), ("block_[024]/=0.5",), ("block_[135]/=0.5", "block=0.1")):
        check_scanned_groups(config("adamw", parameter_groups=groups), params)
    for groups in (("block_0/=0.1",), ("block_[01]/=0",), ("block_5=0.5",)):
        with pytest.raises(UserError, match=r"scanned stack apart.*got .*Set model.scan_layers=False"):
            check_scanned_groups(config("adamw", parameter_groups=groups), params)


def test_frozen_objective_has_no_gradient_there(toy):
    frozen = freeze(toy.objective(), config("adamw", parameter_groups=("query=0",)), toy.params())

    def gradients(objective):
        def loss(params):
            return objective.loss(params, (), toy.batch(), jax.random.key(0), True)[0][0]

        return by_path(jax.jit(jax.grad(loss))(toy.params()))

    plain, held = gradients(toy.objective()), gradients(frozen)
    for path, grad in held.items():
        if "query" in path:
            assert not np.any(grad)
            assert np.any(plain[path])
        else:
            np.testing.assert_allclose(grad, plain[path], rtol=1e-5, atol=1e-7)
    assert freeze(frozen, config("adamw"), toy.params()) is frozen


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(OPTIMIZERS.find(name)(), "moment_dtype")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_has_the_type_of_the_config(name, dtype):
    optimizer, _ = make_optimizer(config(name, moment_dtype=dtype), 10, small_params())
    types = {x.dtype for x in jax.tree.leaves(optimizer.init(small_params())) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert (jnp.dtype("bfloat16") in types) == (dtype == "bfloat16")
