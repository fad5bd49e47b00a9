"""Beam search finds what `generate(num_beams=...)` of transformers finds with the same weights: tokens and scores."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

from transformer.generation.beams import beam_search  # noqa: E402
from transformer.generation.generate import generate  # noqa: E402
from transformer.generation.sampling import SamplingConfig  # noqa: E402
from transformer.generation.translate import translate  # noqa: E402
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig  # noqa: E402
from transformer.models.decoder import Decoder  # noqa: E402
from transformer.models.encoder_decoder import EncoderDecoder  # noqa: E402
from transformer.ops.norms.layer_norm import LayerNorm  # noqa: E402
from transformer.ops.norms.rms_norm import RMSNorm  # noqa: E402
from transformer.ops.positions.learned import LearnedPositions  # noqa: E402
from transformer.ops.positions.t5 import T5Positions  # noqa: E402

V, D, H, LAYERS, END, PAD, NEW = 14, 16, 2, 2, 1, 0, 9
ROWS = [np.random.default_rng(n).integers(2, V, length).tolist() for n, length in enumerate((5, 2, 9, 3))]


def tree(arrays):
    flat = {tuple(path.split("/")): jnp.asarray(x.detach().float().numpy()) for path, x in arrays.items()}
    return unflatten_dict(flat)


def spread(model):
    """Weights that make clear choices, and an end that comes at different lengths."""
    torch.manual_seed(3)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.35)
    return model.eval()


@functools.cache
def gpt2():
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_embd=D, n_layer=LAYERS, n_head=H, bos_token_id=END, eos_token_id=END
    )
    theirs = spread(transformers.GPT2LMHeadModel(config))
    with torch.no_grad():
        theirs.transformer.wte.weight.mul_(0.5)  # or each token would repeat
    block = BlockConfig(
        AttentionConfig(num_heads=H, use_bias=True),
        FeedForwardConfig(hidden_dim=4 * D, activation="gelu_tanh", use_bias=True),
        LayerNorm(use_bias=True),
    )
    state, arrays = theirs.transformer.state_dict(), {}
    arrays["token_embedding/embedding"] = state["wte.weight"]
    arrays["decoder/position_embedding/embedding"] = state["wpe.weight"]
    for name, kind in (("scale", "weight"), ("bias", "bias")):
        arrays[f"decoder/final_norm/{name}"] = state[f"ln_f.{kind}"]
    for layer in range(LAYERS):
        ours, his = f"decoder/blocks/block_{layer}/", f"h.{layer}."
        for name, kind in (("scale", "weight"), ("bias", "bias")):
            arrays[f"{ours}pre_attention_norm/{name}"] = state[f"{his}ln_1.{kind}"]
            arrays[f"{ours}pre_feed_forward_norm/{name}"] = state[f"{his}ln_2.{kind}"]
        kernels, biases = state[f"{his}attn.c_attn.weight"].split(D, 1), state[f"{his}attn.c_attn.bias"].split(D)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            arrays[f"{ours}attention/{name}/kernel"] = kernel.reshape(D, H, D // H)
            arrays[f"{ours}attention/{name}/bias"] = bias.reshape(H, D // H)
        arrays[f"{ours}attention/out/kernel"] = state[f"{his}attn.c_proj.weight"].reshape(H, D // H, D)
        arrays[f"{ours}attention/out/bias"] = state[f"{his}attn.c_proj.bias"]
        for name, other in (("up", "c_fc"), ("down", "c_proj")):
            arrays[f"{ours}feed_forward/{name}/kernel"] = state[f"{his}mlp.{other}.weight"]
            arrays[f"{ours}feed_forward/{name}/bias"] = state[f"{his}mlp.{other}.bias"]
    model = Decoder(
        ModelConfig(V, max_length=64, num_layers=LAYERS, embed_dim=D, pattern=(block,), positions=LearnedPositions())
    )
    return theirs, model, tree(arrays)


@functools.cache
def t5():
    config = transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=D // H, d_ff=4 * D, num_layers=LAYERS, num_heads=H, eos_token_id=END,
        pad_token_id=PAD, decoder_start_token_id=PAD, dropout_rate=0.0, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = spread(transformers.T5ForConditionalGeneration(config))
    with torch.no_grad():
        theirs.shared.weight.mul_(2)
    block = BlockConfig(
        AttentionConfig(num_heads=H, query_scale=1.0),
        FeedForwardConfig(hidden_dim=4 * D, activation="relu"),
        RMSNorm(epsilon=1e-6),
    )
    state = theirs.state_dict()
    arrays = {"token_embedding/embedding": state["shared.weight"]}
    for side in ("encoder", "decoder"):
        subs = [("SelfAttention", "attention"), *([("EncDecAttention", "cross_attention")] * (side == "decoder"))]
        arrays[f"{side}/final_norm/scale"] = state[f"{side}.final_layer_norm.weight"]
        bias = state[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        arrays[f"{side}/relative_bias/embedding"] = bias
        for layer in range(LAYERS):
            ours, his = f"{side}/blocks/block_{layer}/", f"{side}.block.{layer}.layer."
            for number, (other, name) in enumerate(subs):
                arrays[f"{ours}pre_{name}_norm/scale"] = state[f"{his}{number}.layer_norm.weight"]
                for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
                    kernel = state[f"{his}{number}.{other}.{letter}.weight"]
                    arrays[f"{ours}{name}/{part}/kernel"] = kernel.T.reshape(D, H, D // H)
                arrays[f"{ours}{name}/out/kernel"] = state[f"{his}{number}.{other}.o.weight"].T.reshape(H, D // H, D)
            last = len(subs)
            arrays[f"{ours}pre_feed_forward_norm/scale"] = state[f"{his}{last}.layer_norm.weight"]
            for name, other in (("up", "wi"), ("down", "wo")):
                arrays[f"{ours}feed_forward/{name}/kernel"] = state[f"{his}{last}.DenseReluDense.{other}.weight"].T
    model = EncoderDecoder(
        ModelConfig(V, num_layers=LAYERS, embed_dim=D, pattern=(block,), positions=T5Positions(), logits_scale=D**-0.5)
    )
    return theirs, model, tree(arrays)


def padded(rows, left):
    """Their batch: tokens, and a mask."""
    longest = max(map(len, rows))
    put = (
        (lambda row, fill: [fill] * (longest - len(row)) + row)
        if left
        else (lambda row, fill: row + [fill] * (longest - len(row)))
    )
    tokens, mask = [put(row, PAD) for row in rows], [put([1] * len(row), 0) for row in rows]
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}


def their_beams(theirs, num_return, **options):
    left = not theirs.config.is_encoder_decoder
    given = padded(ROWS, left)
    with torch.no_grad():
        found = theirs.generate(
            **given, do_sample=False, max_new_tokens=NEW, pad_token_id=PAD, num_return_sequences=num_return,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
    read = given["input_ids"].shape[1] if left else 1
    return found.sequences[:, read:].reshape(len(ROWS), num_return, -1).tolist(), found.sequences_scores


def until_end(tokens, ends):
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0]] if places else tokens


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("make", [gpt2, t5])
def test_beams_are_theirs(make, length_penalty, early_stopping):
    theirs, model, params = make()
    start = {} if make is gpt2 else {"start": PAD}
    for num_beams, num_return, ends in ((4, 3, (END,)), (3, 1, (END, 7, 9))):
        how = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
        sequences, scores = their_beams(theirs, num_return, eos_token_id=list(ends), **how)
        options = {**how, **start, "num_return": num_return, "end_of_text": ends}
        found = beam_search(model, params, ROWS, max_new_tokens=NEW, **options)
        np.testing.assert_allclose(found.scores.ravel(), scores.numpy(), rtol=1e-4, atol=1e-4)
        for row in range(len(ROWS)):
            for rank in range(num_return):
                said = found.tokens[row, rank, : found.lengths[row, rank]].tolist()
                assert said == until_end(sequences[row][rank], ends)[:NEW], (row, rank)


@pytest.mark.parametrize("make", [gpt2, t5])
def test_the_ends_are_at_different_lengths(make):
    """Else the tests above would say little."""
    _, model, params = make()
    found = beam_search(
        model, params, ROWS, max_new_tokens=NEW, num_beams=4, num_return=4, end_of_text=(END, 7, 9), length_penalty=0.0
    )
    assert len(set(found.lengths.ravel().tolist())) > 2


@pytest.mark.parametrize("make", [gpt2, t5])
def test_greedy_with_a_penalty_is_theirs(make):
    theirs, model, params = make()
    sampling = SamplingConfig(temperature=0, repetition_penalty=1.7)
    with torch.no_grad():
        given = padded(ROWS, left=make is gpt2)
        found = theirs.generate(
            **given, do_sample=False, max_new_tokens=NEW, pad_token_id=PAD, eos_token_id=END, repetition_penalty=1.7
        )
    read = given["input_ids"].shape[1] if make is gpt2 else 1
    expected = [until_end(row, (END,)) for row in found[:, read:].tolist()]
    if make is gpt2:
        output = generate(model, params, ROWS, max_new_tokens=NEW, sampling=sampling, end_of_text=END)
        said = [row[:length].tolist() for row, length in zip(output.tokens, output.lengths, strict=True)]
    else:
        targets = translate(model, params, ROWS, max_new_tokens=NEW, sampling=sampling, end_of_text=END, start=PAD)
        said = [target.tolist() for target in targets]
    assert said == expected
