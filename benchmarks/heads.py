"""Statistics of the heads and hidden units of a decoder before and after training; prints one JSON line.

    python benchmarks/heads.py runs/python_stdlib [--text FILE] [--windows 128] [--plot docs/heads.svg]

The model before training has the initial parameters of the run's seed. Both models read the same windows of the validation
split, or of FILE. Statistics are means over the second half of each window, where a query has many keys:

    distance     tokens from a query back to a key, as a mean over a head's weights
    entropy      entropy of a head's weights, in bits
    divergence   Jensen-Shannon divergence of the weights of two heads of a layer, in bits, as a mean over pairs of heads; 0 if
                 they are equal, 1 if no key has weight in both
    habit        the divergence of the heads' mean weights at each distance. The divergence above also grows with the sharpness
                 of heads; this one grows only if they prefer different distances

The feed-forward network is read as a memory (Geva et al. 2021). A column of `up` is the key of a hidden unit, which contexts
match. A row of `down` is its value, which the output embedding maps to a score for each token.

    agreement    how often the next token is the token with the unit's highest score, in the contexts that
                 activate the unit most
    by_chance    the same with the token of another unit of the layer

The shown units have the largest agreement beyond chance in their layer, among units with a visible token.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transformer import load
from transformer.analysis.attention import layer_weights
from transformer.analysis.heads import divergence, entropy, share_by_distance
from transformer.data.datasets import open_data
from transformer.layers.scan_params import loop_params
from transformer.models.decoder import Decoder
from transformer.parts import initialize

CONTEXTS = 50  # of a unit, those that activate it most
BATCH = 8


def look(model: nn.Module, params: Any, tokens_BT: Any) -> tuple[list[Any], list[Any]]:
    """Attention weights [B, H, T, S] and hidden units [B, T, F] of every layer of a decoder; units where `down` reads them."""
    hidden = []

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.name == "down" and context.method_name == "__call__":
            hidden.append(args[0].astype(jnp.float32))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        _, seen = model.apply({"params": params}, tokens_BT, mutable=["attention"])
    layers = layer_weights(seen["attention"], scanned=False)["decoder"]
    return [layer["attention"] for layer in layers], hidden


# ---- The feed-forward network as a memory ----------------------------------------------------------------------------


class Memory(NamedTuple):
    """Contexts that activate the units of a layer, and the tokens that the units promote."""

    contexts_FC: np.ndarray  # positions that activate a unit most, strongest first
    scores_FV: np.ndarray  # of each token, by the unit's value
    agreement_F: np.ndarray
    by_chance_F: np.ndarray


def read_memory(hidden_NF: np.ndarray, following_N: np.ndarray, scores_FV: np.ndarray) -> Memory:
    """Compare the tokens that units promote with the next tokens of the contexts that activate them."""
    F, V = scores_FV.shape
    contexts_FC = np.argsort(-hidden_NF, axis=0, kind="stable")[:CONTEXTS].T
    follows_FV = np.stack([np.bincount(following_N[places], minlength=V) for places in contexts_FC])
    follows_FV = follows_FV / contexts_FC.shape[1]
    promoted_F = scores_FV.argmax(axis=-1)
    agreement_F = follows_FV[np.arange(F), promoted_F]
    by_chance_F = (follows_FV.sum(axis=0)[promoted_F] - agreement_F) / (F - 1)
    return Memory(contexts_FC, scores_FV, agreement_F, by_chance_F)


def value_scores(params: Any, config: Any, layer: int) -> np.ndarray:
    """A score for each hidden unit and token: the row of `down`, scaled as the final norm does, times the embedding."""
    value_FD = np.asarray(params["decoder"]["blocks"][f"block_{layer}"]["feed_forward"]["down"]["kernel"], np.float32)
    if config.pattern[-1].norm.kind == "layer_norm":
        value_FD = value_FD - value_FD.mean(axis=-1, keepdims=True)
    value_FD = value_FD * np.asarray(params["decoder"].get("final_norm", {}).get("scale", 1.0))
    tied = config.tie_embeddings
    return value_FD @ np.asarray(params["token_embedding"]["embedding"].T if tied else params["output"]["kernel"])


# ---- Both, of one model ----------------------------------------------------------------------------------------------


class Measures(NamedTuple):
    """Of a model: a list entry for each layer."""

    entropy: list[np.ndarray]
    """[heads]"""
    divergence: list[float]
    shares: list[np.ndarray]
    """[heads, distances]"""
    memory: list[Memory]


def measure(config: Any, params: Any, windows_NT: np.ndarray) -> Measures:
    """Read the windows in batches; the last token of each is only predicted."""
    model = Decoder(dataclasses.replace(config, scan_layers=False, remat="none"))
    params = loop_params(params) if config.scan_layers else params
    half = windows_NT.shape[1] // 2

    @jax.jit
    def read(params: Any, tokens_BT: Any) -> Any:
        weights, hidden = look(model, params, tokens_BT)
        late = [weights_BHTS[:, :, half:] for weights_BHTS in weights]
        means = [(entropy(w).mean(axis=(0, 2)), divergence(w), w.mean(axis=0)) for w in late]
        return means, hidden

    starts = range(0, len(windows_NT), BATCH)
    batches = [jax.device_get(read(params, windows_NT[start : start + BATCH, :-1])) for start in starts]
    sizes = [len(windows_NT[start : start + BATCH]) for start in starts]
    entropies, divergences, weights = (
        [
            np.average([means[layer][i] for means, _ in batches], axis=0, weights=sizes)
            for layer in range(config.num_layers)
        ]
        for i in range(3)
    )
    following_N = windows_NT[:, 1:].reshape(-1)
    memory = []
    for layer in range(config.num_layers):
        hidden_NF = np.concatenate([hidden[layer].reshape(-1, hidden[layer].shape[-1]) for _, hidden in batches])
        memory.append(read_memory(hidden_NF, following_N, value_scores(params, config, layer)))
    return Measures(entropies, [float(d.mean()) for d in divergences], [share_by_distance(w) for w in weights], memory)


def summary(measures: Measures) -> dict[str, Any]:
    """Numbers to print; of heads, in the order of the layer."""
    return {
        "distance": [[round(float(d), 1) for d in shares @ np.arange(shares.shape[-1])] for shares in measures.shares],
        "entropy": [[round(float(e), 2) for e in layer] for layer in measures.entropy],
        "divergence": [round(d, 3) for d in measures.divergence],
        "habit": [round(float(divergence(shares[None, :, None]).mean()), 3) for shares in measures.shares],
        "agreement": [round(float(m.agreement_F.mean()), 3) for m in measures.memory],
        "by_chance": [round(float(m.by_chance_F.mean()), 3) for m in measures.memory],
    }


def show_units(memory: list[Memory], windows_NT: np.ndarray, decode: Callable[[Any], str], count: int) -> Iterable[Any]:
    """The units with the largest agreement in each layer, with their strongest contexts and most promoted tokens."""
    length = windows_NT.shape[1] - 1
    for layer, units in enumerate(memory):
        visible_F = np.array([bool(decode(token[None]).strip()) for token in units.scores_FV.argmax(axis=-1)])
        beyond_F = np.where(visible_F, units.agreement_F - units.by_chance_F, -1)
        for unit in np.argsort(-beyond_F, kind="stable")[:count]:
            contexts = []
            for place in units.contexts_FC[unit, :5]:
                row, last = divmod(int(place), length)
                tokens = windows_NT[row, : last + 2]
                contexts.append([decode(tokens[:-1])[-24:], decode(tokens[-1:])])
            promoted = np.argsort(-units.scores_FV[unit], kind="stable")[:5]
            yield {
                "layer": layer + 1,
                "unit": int(unit),
                "agreement": round(float(units.agreement_F[unit]), 2),
                "promotes": [decode(promoted[i : i + 1]) for i in range(5)],
                "contexts": contexts,
            }


def draw(path: str, before: Measures, after: Measures) -> None:
    """A plot for each layer: the weight of each head on the last n tokens, before and after training."""
    plt = importlib.import_module("matplotlib.pyplot")
    plt.style.use("petroff6")  # colours for the colour-blind
    plt.rcParams.update({"svg.hashsalt": "heads", "font.size": 9})
    columns = len(after.shares)
    figure, axes = plt.subplots(
        1, columns, figsize=(2.1 * columns + 1, 2.5), sharey=True, squeeze=False, layout="constrained"
    )
    for layer, axis in enumerate(axes[0]):
        size = after.shares[layer].shape[-1]
        # As many points as a line needs on a logarithmic axis.
        counts = np.unique(np.geomspace(1, size, 40).astype(int))
        for shares in before.shares[layer]:
            (grey,) = axis.plot(counts, 100 * np.cumsum(shares)[counts - 1], color="0.6", linewidth=1, linestyle="--")
        for head, shares in enumerate(after.shares[layer]):
            axis.plot(counts, 100 * np.cumsum(shares)[counts - 1], linewidth=1.5, label=f"head {head + 1}")
        grey.set_label("untrained")
        axis.set_title(f"layer {layer + 1}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks([4**power for power in range(10) if 4**power < size])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.set_xlim(1, size)
        axis.set_ylim(0, 101)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("n, the query's own token included", fontsize=9)
    axes[0][0].set_ylabel("weight on the last n tokens, %")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)


def cut_windows(texts: Iterable[str], encode: Callable[[str], Any], length: int, count: int) -> np.ndarray:
    """`count` windows of `length` tokens, each of one text, at even distances over all texts."""
    encoded = [np.asarray(encode(text), np.int32) for text in texts]
    windows = [t[start : start + length] for t in encoded for start in range(0, len(t) - length + 1, length)]
    if not windows:
        raise SystemExit(f"The text must hold {length} tokens in a piece, its longest piece is shorter; pass --text.")
    chosen = np.unique(np.linspace(0, len(windows) - 1, count).astype(int))
    return np.stack([windows[index] for index in chosen])


def main() -> None:
    """Measure a run before and after training and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="directory of a trained decoder with pre-norm blocks")
    parser.add_argument("--text", help="a file to read instead of the run's validation split")
    parser.add_argument(
        "--windows", type=int, default=128, help="number of windows, each as long as the model's length"
    )
    parser.add_argument("--units", type=int, default=1, help="number of shown units of each layer")
    parser.add_argument("--plot", help="a .svg or .png file to draw (needs matplotlib: the extra `notebooks`)")
    options = parser.parse_args()
    model, params, tokenizer, config, step = load(options.run)
    if not isinstance(model, Decoder) or config.model.pattern[-1].norm.placement != "pre":
        parser.error(f"{options.run} must hold a decoder with pre-norm blocks")
    texts: Iterable[str] = (
        [pathlib.Path(options.text).read_text()]
        if options.text
        else open_data(config.data, config.objective).texts("validation")
    )
    windows_NT = cut_windows(texts, tokenizer.encode, config.model.max_length + 1, options.windows)
    untrained, _ = initialize(config.objective, model, jax.random.key(config.training.seed))
    before, after = (measure(config.model, tree, windows_NT) for tree in (untrained, params))
    result = {
        "benchmark": "heads",
        "jax": jax.__version__,
        "step": step,
        "seed": config.training.seed,
        "tokens": windows_NT[:, 1:].size,
        "untrained": summary(before),
        "trained": summary(after),
        "units": list(show_units(after.memory, windows_NT, tokenizer.decode, options.units)),
    }
    print(json.dumps(result))
    if options.plot:
        draw(options.plot, before, after)


if __name__ == "__main__":
    main()
