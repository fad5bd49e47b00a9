"""Training on an NVIDIA GPU reaches cuDNN's fused attention: the real step of every objective and config, lowered for CUDA."""

import dataclasses
import functools
import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from trained_objectives import TRAINED

from transformer.cli.arguments import load_config
from transformer.config import Config, DataConfig, ParallelConfig
from transformer.data.datasets import data_of
from transformer.data.pipeline import whole_rows
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.ops.backends import cudnn
from transformer.ops.backends.cudnn_packed import Target
from transformer.parallel.mesh import make_mesh
from transformer.parts import Parts, StandIn, Steps, resolve, training_runtime
from transformer.planning.chips import find_topology
from transformer.types import Batch, UserError

BYTES = ByteTokenizer()
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("


@pytest.fixture
def installed(monkeypatch):
    """As with JAX's CUDA plugin, for an H100, with what a trainer takes on one."""
    monkeypatch.setattr("transformer.parts.training_runtime", lambda *_: training_runtime("gpu"))
    monkeypatch.setattr(cudnn, "_INSTALLED", True)
    monkeypatch.setattr(cudnn, "find_target", lambda: Target((9, 0), present=False))
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_100)


def make(kind, *, length=512, dtype="bfloat16", memory_length=0, attention=None, **data):
    block = BlockConfig(AttentionConfig(num_heads=2, **(attention or {})))
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(block,), dtype=dtype, memory_length=memory_length),
        data=DataConfig(sequence_length=length, batch_size=2, **data),
        objective=OBJECTIVES.find(kind)(),
        parallel=ParallelConfig(data=1),
    )


def step_for_cuda(config):
    """The text of the training step, the parts, and how many forward and backward kernels it asks for."""
    tokenizer = StandIn(config.model.vocab_size) if config.model.vocab_size else BYTES
    config = resolve(config, tokenizer)
    steps = Steps(config, tokenizer, class_names=("a", "b"))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), steps.state)
    traced = jax.jit(steps.train_step).trace(state, config.objective.batch_shapes(config))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, steps.parts, (text.count(FORWARD), text.count(BACKWARD))


def has_square(text, length):
    """Whether there is an array of queries by keys, for heads or rows."""
    return re.search(rf"tensor<\d+x\d+x(\d+x)*{length}x{length}x(f32|bf16|i1)>", text) is not None


@pytest.mark.parametrize(
    ("kind", "settings", "calls"),
    [
        ("next_token", {}, 1),
        ("next_token", {"max_segments": 1}, 1),
        ("next_token", {"attention": {"implementation": "cudnn"}}, 1),
        ("next_token", {"pack": False}, 1),
        ("next_token", {"pack": False, "max_segments": 0}, 1),
        ("masked_lm", {}, 1),
        ("masked_lm", {"pack": False}, 1),
        ("classification", {}, 1),
        ("seq2seq", {}, 3),
        # What is hidden is a fifth of a row, and it must be as long as a kernel is worth.
        ("span_corruption", {"length": 4096}, 3),
    ],
)
def test_the_step_of_an_objective_calls_kernels(installed, kind, settings, calls):
    text, parts, found = step_for_cuda(make(kind, **settings))
    assert found == (calls, calls)
    assert not has_square(text, 512)
    assert parts.describe_attention("gpu") == "cudnn"
    assert parts.describe_attention("cpu") == ("cudnn" if "attention" in settings else "blockwise")


@pytest.mark.parametrize(
    ("kind", "settings", "described"),
    [
        ("prefix_lm", {}, "blockwise"),  # a prefix is no mask of cuDNN's
        ("prefix_lm", {"pack": False}, "blockwise"),
        ("next_token", {"max_segments": 0}, "blockwise"),  # nothing is promised
        ("next_token", {"memory_length": 64}, "blockwise"),  # keys of earlier rows
        ("next_token", {"dtype": "float32"}, "blockwise"),
        ("next_token", {"attention": {"dropout": 0.1}}, "xla"),
        ("next_token", {"attention": {"window": 100}}, "blockwise"),
        ("next_token", {"length": 256}, "blockwise"),
    ],
)
def test_what_takes_no_kernel_says_so(installed, kind, settings, described):
    _, parts, found = step_for_cuda(make(kind, **settings))
    assert found == (0, 0)
    assert parts.describe_attention("gpu") == described


def test_a_window_of_whole_rows_is_a_kernel(installed):
    _, parts, found = step_for_cuda(make("next_token", pack=False, attention={"window": 100}))
    assert found == (1, 1)
    assert parts.describe_attention("gpu") == "cudnn"


def test_packed_rows_on_an_older_gpu_stay_with_blockwise(installed, monkeypatch):
    monkeypatch.setattr(cudnn, "find_target", lambda: Target((8, 0), present=False))
    for kind, settings, described in (
        ("next_token", {}, "blockwise"),
        ("next_token", {"pack": False}, "cudnn"),
        ("classification", {}, "cudnn"),
    ):
        assert step_for_cuda(make(kind, **settings))[1].describe_attention("gpu") == described


@pytest.mark.parametrize("name", ["gpt2_124m", "llama_1b", "llama_8b", "llama_70b", "moe_8x7b"])
def test_shipped_configs_for_accelerators_ask_for_kernels(installed, name):
    config = load_config(str(CONFIGS / f"{name}.py"))
    shipped = resolve(config, StandIn(config.model.vocab_size))
    if (
        name != "gpt2_124m"
    ):  # which trains on one device; of the others, one has a part of the rows, of a length like no width
        data = dataclasses.replace(config.data, batch_size=8, sequence_length=3072)
        config = dataclasses.replace(config, data=data)
    config = dataclasses.replace(config, parallel=ParallelConfig(data=1))
    text, parts, (forward, backward) = step_for_cuda(config)
    # A scan has its body once; where a layer is computed again, its forward pass is there twice.
    assert (forward, backward) == (12, 12) if name == "gpt2_124m" else (1 <= forward <= 2 and backward == 1)
    assert not has_square(text, config.data.sequence_length)
    assert parts.describe_attention("gpu") == "cudnn"
    if name in ("gpt2_124m", "llama_1b"):  # whose rows fit eight devices
        eight = dataclasses.replace(shipped, parallel=ParallelConfig(data=1, fsdp=8))
        assert Parts(eight, StandIn(config.model.vocab_size)).describe_attention("gpu") == "cudnn"


@pytest.mark.parametrize("pack", [True, False])
def test_user_defined_batches_are_described_with_ids_and_without(installed, pack):
    config = resolve(make("next_token", pack=pack), BYTES)
    parts = Steps(config, BYTES, own_batches=True).parts
    assert parts.describe_attention("gpu") == "cudnn for rows without segment ids, blockwise for others"
    assert parts.describe_attention("cpu") == "blockwise"


# ---- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("kind", ["next_token", "masked_lm", "prefix_lm", "span_corruption"])
def test_shapes_of_batches_have_the_parts_of_those_that_come(tmp_path, kind, pack):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 100)
    data = {"source": (str(tmp_path / "text.txt"),), "data_dir": str(tmp_path / "data"), "record_bytes": 256}
    config = make(kind, length=64, pack=pack, **data)
    batch, shapes = next(data_of(config).train_batches(BYTES)), config.objective.batch_shapes(config)
    assert jax.tree.structure(batch) == jax.tree.structure(shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert (batch.segment_ids is None) == (not pack or kind == "span_corruption")


@pytest.mark.parametrize(("kind", "length"), [("next_token", 256), *((kind, 64) for kind in TRAINED)], ids=str)
def test_rows_without_ids_train_as_those_with_ids_of_one(kind, length):
    """By blockwise attention, and by the reference; but for the order in which XLA adds up in another program."""
    config = make(kind, length=length, dtype="float32")
    steps = Steps(resolve(config, BYTES), BYTES, class_names=("a", "b"))
    shapes = config.objective.batch_shapes(config)
    tokens = jax.tree.map(lambda x: np.random.default_rng(x.ndim).integers(0, 2, x.shape).astype(x.dtype), shapes)
    most = config.objective.num_masked(length) if kind == "masked_lm" else length
    counted = np.zeros(shapes.weights.shape, np.float32)
    counted[..., -most:] = 1
    whole = tokens._replace(weights=counted, segment_ids=None)
    ids = {"segment_ids": np.ones(shapes.inputs.shape, np.int32)}
    if hasattr(shapes, "positions"):
        whole = whole._replace(positions=np.tile(np.arange(length, dtype=np.int32), (2, 1)))
    if hasattr(shapes, "source"):
        whole = whole._replace(source_segment_ids=None)
        ids["source_segment_ids"] = np.ones(shapes.source.shape, np.int32)
    params = steps.parts.init_params(jax.random.key(0))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def graded(batch):
        def loss(params):
            (loss_sum, _), (_, statistics) = steps.parts.loss.loss(params, (), batch, jax.random.key(1), True)
            return loss_sum, statistics

        return jax.value_and_grad(loss, has_aux=True)(params)

    found, expected = graded(whole), graded(whole._replace(**ids))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, expected)


def test_rows_of_windows_must_be_whole(tmp_path):
    batch = Batch.of(
        np.ones((2, 4), np.int32), np.ones((2, 4), np.int32), segment_ids=np.array([[1] * 4, [1, 1, 2, 2]])
    )
    with pytest.raises(UserError, match=r"Windows of text .* one document each, got segment ids other than 1"):
        whole_rows(batch)
    assert whole_rows(batch._replace(segment_ids=np.ones((2, 4), np.int32))).segment_ids is None


def test_a_runner_takes_batches_with_ids_and_without():
    steps = Steps(resolve(make("next_token", length=16), BYTES), BYTES)
    tokens, state = np.ones((2, 16), np.int32), steps.init_state()
    for others in ({"segment_ids": np.ones((2, 16), np.int32)}, {}, {"segment_ids": np.ones((2, 16), np.int32)}):
        batch = steps.runner.place_batch(Batch.of(tokens, tokens, **others))
        _, scores = steps.runner.evaluate_step(state.params, state.carry, batch)
        state, sums = steps.runner.step(state, batch)
        assert np.isfinite(float(sums["loss"])) and np.isfinite(float(scores["loss"]))


# ---- Without the device, with its compiler ---------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not PLUGIN, reason="needs JAX's CUDA plugin: pip install 'jax[cuda12]'")
@pytest.mark.parametrize("pack", [True, False])
def test_gpt2_compiles_for_an_h100_with_a_kernel_for_each_pass_of_each_layer(pack):
    config = load_config(str(CONFIGS / "gpt2_124m.py"))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=16, pack=pack),
        optimizer=dataclasses.replace(config.optimizer, accumulate_steps=1),
    )
    vocabulary = StandIn(config.model.vocab_size)
    config = resolve(config, vocabulary)
    steps = Steps(config, vocabulary, make_mesh(config.parallel.sizes, find_topology("h100:1").devices))
    text = steps.runner.lower(steps.state, config.objective.batch_shapes(config)).compile().as_text()
    targets = [re.findall(rf'custom_call_target="__cudnn\$fmhaSoftmax{name}"', text) for name in ("", "Backward")]
    assert [len(found) for found in targets] == [12, 12]
    assert re.search(r"\[\d+,\d+,(\d+,)*1024,1024\]", text) is None
    # The kernels' arguments about rows are computed once, not in each layer.
    assert len(re.findall(r"= s32\[16,33\]\S* fusion\(", text)) <= 2
