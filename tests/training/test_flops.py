"""Operations of a step against arithmetic on the config, written out here, and against JAX's own gradients."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config, DataConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.ops.attention import dot_product_attention
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.poolings.attention import AttentionPooling
from transformer.ops.positions.transformer_xl import TransformerXLPositions
from transformer.optimizers.adamw import AdamW
from transformer.parallel.mesh import make_mesh
from transformer.parts import Parts, StandIn, training_runtime
from transformer.training.flops import count_flops, step_flops, traced_flops
from transformer.types import Batch, LabelledBatch, PairBatch

ROWS, LENGTH, SOURCE, VOCAB, CLASSES = 3, 40, 28, 97, 5
WIDE = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2), FeedForwardConfig(96, gated=True))
NARROW = BlockConfig(AttentionConfig(num_heads=2, head_dim=8, window=6), FeedForwardConfig(48))
SPARSE = BlockConfig(AttentionConfig(num_heads=4, pattern=FixedPattern(4, 2)), FeedForwardConfig())
EXPERTS = BlockConfig(
    AttentionConfig(num_heads=4), FeedForwardConfig(24, gated=True, num_experts=6, experts_per_token=2)
)
XL = {"memory_length": 24, "positions": TransformerXLPositions()}

MODELS = {
    "causal": ("next_token", {}),
    "untied": ("next_token", {"tie_embeddings": False}),
    "windows": ("next_token", {"pattern": (NARROW,)}),
    "patterns": ("next_token", {"pattern": (SPARSE,)}),
    "experts": ("next_token", {"pattern": (EXPERTS,)}),
    "unequal": ("next_token", {"pattern": (WIDE, NARROW, EXPERTS, SPARSE)}),
    "memory": ("next_token", {"memory_length": 24}),
    "transformer_xl": ("next_token", XL),
    "transformer_xl, unequal, experts": ("next_token", {**XL, "pattern": (WIDE, NARROW, EXPERTS)}),
    "prefix": ("prefix_lm", {}),
    "prefix, experts": ("prefix_lm", {"pattern": (EXPERTS, WIDE)}),
    "masked": ("masked_lm", {}),
    "masked, experts": ("masked_lm", {"pattern": (WIDE, EXPERTS)}),
    "classes": ("classification", {}),
    "classes, attention pooling": ("classification", {"pooling": AttentionPooling()}),
    "classes, experts": ("classification", {"pattern": (EXPERTS,)}),
    "pairs": ("seq2seq", {}),
    "pairs, two vocabularies": ("seq2seq", {"sources": 51, "tie_embeddings": False}),
    "pairs, unequal": ("seq2seq", {"pattern": (WIDE, NARROW)}),
    "pairs, experts": ("seq2seq", {"pattern": (EXPERTS,)}),
    "spans": ("span_corruption", {"pattern": (WIDE, NARROW)}),
}


def make(kind, *, objective=None, optimizer=None, sources=0, **settings):
    """A config, the shapes of its parameters and of a batch."""
    settings = {"embed_dim": 32, "pattern": (WIDE,), **settings}
    settings = {"num_layers": max(2, len(settings["pattern"])), **settings}
    model = ModelConfig(
        vocab_size=VOCAB,
        max_length=LENGTH + settings.get("memory_length", 0),
        **settings,
    )
    config = Config(
        model=model,
        data=DataConfig(sequence_length=LENGTH, batch_size=ROWS),
        objective=OBJECTIVES.find(kind)(**(objective or {})),
        optimizer=optimizer or AdamW(),
    )
    vocabulary = StandIn(VOCAB)
    if sources:
        vocabulary.source = StandIn(sources)
    parts = Parts(config, vocabulary, class_names=("class",) * CLASSES)

    def ids(*shape, dtype=np.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    row, weights = ids(ROWS, LENGTH), ids(ROWS, LENGTH, dtype=np.float32)
    if config.objective.num_stacks == 2:
        return parts, PairBatch(ids(ROWS, SOURCE), ids(ROWS, SOURCE), row, row, weights, row)
    if kind == "classification":
        return parts, LabelledBatch(row, row, ids(ROWS), ids(ROWS, dtype=np.float32))
    return parts, Batch(row, row, weights, row, row)


def pairs(attention, queries, earlier, *, causal, prefix):
    """Pairs of a row that see each other, one after another."""
    total = 0.0
    for query in range(earlier, earlier + queries):
        for key in range(earlier + queries):
            if attention.window and abs(query - key) >= attention.window:
                continue
            if not attention.pattern.sees_all:
                unit, stride = attention.pattern.block_size, attention.pattern.stride
                same = query // unit // stride == key // unit // stride
                if not same and (key // unit) % stride < stride - attention.pattern.summary:
                    continue
            if not causal or key <= query:
                total += 1
            elif prefix:  # of every length below the row's: the share of those that reach beyond the key
                total += (queries - 1 - key) / queries
    return total


def stack_flops(model, length, *, causal, cross=0, prefix=False):
    """Of one row through a stack, forward: each block's matrices, then its pairs."""
    D, total, earlier = model.embed_dim, 0.0, model.memory_length
    relative = D if model.positions.kind == "transformer_xl" else 0
    for block in model.pattern * (model.num_layers // len(model.pattern)):
        attention, network = block.attention, block.feed_forward
        H, G, K = (
            attention.num_heads,
            attention.num_kv_heads or attention.num_heads,
            attention.head_dim or D // attention.num_heads,
        )
        total += 2 * length * D * H * K * 2  # query, out
        total += 2 * (earlier + length) * D * G * K * 2  # key, value
        total += 2 * length * H * K * relative  # distances
        seen = pairs(attention, length, earlier, causal=causal, prefix=prefix)
        total += 2 * seen * H * (K + relative + K)
        if cross:
            total += 2 * length * D * H * K * 2 + 2 * cross * D * G * K * 2 + 2 * length * cross * H * 2 * K
        F = network.hidden_dim or 4 * D
        experts = network.experts_per_token if network.num_experts else 1
        total += 2 * length * D * network.num_experts  # router
        total += 2 * length * experts * D * F * (3 if network.gated else 2)
    return total


def expected_flops(config):
    model, kind = config.model, config.objective.kind
    D = model.embed_dim
    if config.objective.continues_text:
        row = stack_flops(model, LENGTH, causal=True, prefix=kind == "prefix_lm") + 2 * LENGTH * D * VOCAB
    elif kind == "masked_lm":
        row = stack_flops(model, LENGTH, causal=False) + 2 * round(0.15 * LENGTH) * D * VOCAB
    elif kind == "classification":
        pooling = 2 * LENGTH * D * 2 if model.pooling == AttentionPooling() else 0
        row = stack_flops(model, LENGTH, causal=False) + pooling + 2 * D * CLASSES
    else:
        decoded = stack_flops(model, LENGTH, causal=True, cross=SOURCE) + 2 * LENGTH * D * VOCAB
        row = stack_flops(model, SOURCE, causal=False) + decoded
    return 3 * ROWS * row


@pytest.mark.parametrize("name", MODELS)
def test_operations_agree_with_arithmetic(name):
    kind, settings = MODELS[name]
    parts, batch = make(kind, **settings)
    assert parts.count_step(batch).total == pytest.approx(expected_flops(parts.config), rel=0.01)


@pytest.mark.parametrize("kind", ["next_token", "seq2seq"])
def test_unequal_blocks_count_in_any_order(kind):
    counts = {counted(*make(kind, pattern=pattern)).total for pattern in ((WIDE, NARROW), (NARROW, WIDE))}
    assert len(counts) == 1


def counted(parts, batch):
    return parts.count_step(batch)


def gradient(objective, key):
    def function(params, carry, batch):
        def loss(params):
            (loss, weight), rest = objective.loss(params, carry, batch, key, True)
            return loss, (weight, rest)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return function


@pytest.mark.parametrize(
    "groups", [(), ("block_0/=0",), ("(token_embedding|blocks)/=0",)], ids=["all", "a block", "blocks"]
)
@pytest.mark.parametrize("name", ["unequal", "transformer_xl", "masked, experts", "classes", "pairs, two vocabularies"])
def test_products_agree_with_the_gradient_that_jax_traces(name, groups):
    kind, settings = MODELS[name]
    parts, batch = make(kind, optimizer=AdamW(parameter_groups=groups), **settings)
    carry = jax.eval_shape(lambda: parts.loss.init_carry(ROWS))
    traced = traced_flops(gradient(parts.loss, jax.random.key(0)), parts.shapes, carry, batch)
    assert parts.count_step(batch).products == traced


SAVED = {
    "remat": {"remat": "full"},
    "scan": {"scan_layers": True},
    "both": {"remat": "dots", "scan_layers": True},
    "offload": {"remat": "offload"},
}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
def test_saving_memory_changes_no_count_of_any_objective(settings, platform):
    """Of the objective that is trained, not only of the plain one that `count_step` makes of it."""
    parts, batch = make("next_token", objective={"loss_chunks": 4}, num_layers=4, pattern=(WIDE, EXPERTS), **settings)
    trained = dataclasses.replace(parts, runtime=training_runtime(platform))
    found = step_flops(trained.loss, trained.shapes, batch)
    assert found == parts.count_step(batch) == trained.count_step(batch)
    assert found == counted(*make("next_token", num_layers=4, pattern=(WIDE, EXPERTS)))


def test_parts_that_are_filled_up_do_not_count():
    whole, parts = (make("masked_lm", objective={"loss_chunks": chunks}) for chunks in (1, 4))
    assert counted(*parts) == counted(*whole), "6 hidden tokens in 4 parts are 8"


@pytest.mark.parametrize("implementation", ["xla", "blockwise", "splash", "auto"])
@pytest.mark.parametrize("remat", [False, True])
def test_attention_counts_alike_however_it_is_done(implementation, remat):
    mask = AttentionMask(causal=True, window=100)

    def attend(kernel, x):
        def layer(kernel, x):
            heads = (x @ kernel).reshape(2, 512, 4, 8)
            pair = heads[:, :, :2]
            return dot_product_attention(heads, pair, pair, mask=mask, implementation=implementation)

        return jnp.sum((jax.checkpoint(layer) if remat else layer)(kernel, x))

    counted = count_flops(attend, shape(32, 32), shape(2, 512, 32))
    visible = 100 * 101 / 2 + 412 * 100
    assert counted == (2 * 2 * 2 * 512 * 32 * 32, 3 * 2 * 2 * 2 * 32 * visible, 3 * 2 * 2 * 2 * 32 * 512 * 512)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


PRODUCT = 2 * 8 * 8 * 8


def scanned(w, x):
    # Only in the second round does what is carried depend on the parameters.
    def body(carry, _):
        x, y = carry
        return (y @ w, x), None

    return jnp.sum(jax.lax.scan(body, (x, x), None, length=6)[0][0])


def beside_in_a_loop(w, x):
    # The loop's second product reaches no loss, nor does what it starts from.
    def body(carry, _):
        loss, other = carry
        return (loss + 1.0, other @ w), None

    return jax.lax.scan(body, (jnp.sum(x @ w), x @ w), None, length=4)[0][0]


def counted_up(w, x):
    return jnp.sum(jax.lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] + 1, s[1] @ w), (2, x))[1])


def own_kernel(w, x):
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
    return jnp.sum(product(w, jnp.tanh(x @ w)))


def convolution(w, x):
    kernel_WIO = w[None, :, :]
    return jnp.sum(
        jax.lax.conv_general_dilated(x[None], kernel_WIO, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    )


FUNCTIONS = {
    "a product": (lambda w, x: jnp.sum(x @ w), 2),
    "two": (lambda w, x: jnp.sum(x @ w @ w), 2 + 3),
    "transposed": (lambda w, x: jnp.sum((x @ w).T @ w), 2 + 3),
    "jit": (lambda w, x: jnp.sum(jax.jit(lambda w, x: x @ w)(w, x) @ w), 2 + 3),
    "einsum": (lambda w, x: jnp.sum(jnp.einsum("ab,cb->ac", x, w)), 2),
    "vmap": (lambda w, x: jnp.sum(jax.vmap(lambda row: row @ w)(x)), 2),
    "a target": (lambda w, x: jnp.sum(x @ w + jax.lax.stop_gradient(x @ w @ w)), 2 + 1 + 1),
    "beside the loss": (lambda w, x: (jnp.sum(x @ w), x @ w @ w), 2 + 1 + 1),
    "whole numbers": (lambda w, x: jnp.sum(x @ w) + jnp.argmax(x @ w), 2 + 1),
    "the dearer branch": (
        lambda w, x: jnp.sum(jax.lax.cond(x[0, 0] > 0, lambda w, x: x @ w @ w, lambda w, x: x @ w, w, x)),
        2 + 3,
    ),
    "for": (lambda w, x: jnp.sum(jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x)), 5 * 3),
    "scan": (scanned, 6 * 3),
    "beside the loss, in a loop": (beside_in_a_loop, 2 + 1 + 4),
    "map": (lambda w, x: jnp.sum(jax.lax.map(lambda row: x @ w, x)), 8 * 2),
    "while": (counted_up, 5 * 3),
    "remat": (jax.checkpoint(lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w)), 2 + 3),
    "custom gradient": (own_kernel, 2 + 3),
    "convolution": (convolution, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_product_counts_for_its_result_and_each_gradient(name):
    function, products = FUNCTIONS[name]
    assert count_flops(function, shape(8, 8), shape(8, 8)) == (products * PRODUCT, 0, 0)


def test_nothing_to_differentiate_is_a_forward_pass():
    assert count_flops(lambda _, w, x: jnp.sum(x @ w @ w), (), shape(8, 8), shape(8, 8)).total == 2 * PRODUCT


def test_devices_of_a_shard_map_count_together():
    mesh = make_mesh({"data": 4}, jax.devices()[:4])
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    product = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(whole, rows), out_specs=rows)
    assert count_flops(lambda w, x: jnp.sum(product(w, x)), shape(8, 8), shape(8, 8)).total == 2 * PRODUCT


def test_a_user_defined_model_counts_too():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16)(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
            return nn.Dense(4)(nn.Conv(16, (3,))(x))

    model, x = Model(), shape(2, 10, 8)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(model.apply(params, x) ** 2)

    first, places = 2 * 20 * 8 * 16, 20
    # Flax's attention says nothing of what is visible: its products count whole.
    others = 2 * places * (4 * 16 * 16 + 3 * 16 * 16 + 16 * 4) + 2 * 2 * 2 * 10 * 10 * 16
    assert count_flops(loss, params, x).total == 2 * first + 3 * others
    cost = jax.jit(loss).lower(params, x).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(first + others, rel=0.1), "all that XLA counts in the forward pass"
