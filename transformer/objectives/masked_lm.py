"""Masked language modelling: the cross-entropy of masked tokens, given the tokens on both sides."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import DataConfig
from transformer.data.draws import random_at
from transformer.generation.likelihood import Query, masked_scores
from transformer.generation.rows import Row, computed_rows, segment_ids_of
from transformer.models.encoder import Encoder
from transformer.objective import OBJECTIVES
from transformer.objectives.bases import TokenObjective, read_whole, refuse_target
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import chunked, predicted_statistics
from transformer.tokenizer import around_text, drawable, encoder_ids, known_tokens, mask_id, never_hidden
from transformer.trained import Trained
from transformer.types import Array, Batch, LossOutput, PyTree, Reading
from transformer.validation import require

if TYPE_CHECKING:
    import flax.linen as nn

    from transformer.data.tokenizers import Tokenizer, Vocabulary

_HIDDEN_AT_ONCE = 16
MASK = "[MASK]"
"""The mask in a user's text, for any tokenizer."""
_KEY = 7  # separates these random numbers from others with the same seed


@OBJECTIVES.register
@dataclasses.dataclass(frozen=True)
class MaskedLM(TokenObjective):
    """Cross-entropy of masked tokens (Devlin et al. 2019)."""

    kind = "masked_lm"
    reads = "text"
    model_class = Encoder
    init_method = "logits"
    settings = ("model.token_types", "model.masked_head", "model.head_bias")

    mask_rate: float = 0.15
    """Share of tokens to predict."""
    mask_scheme: Literal["bert", "plain"] = "bert"
    """Treatment of these tokens: bert replaces 80 % by a mask and 10 % by a random token, and keeps 10 %; plain masks all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.mask_rate < 1, f"MaskedLM.mask_rate must be above 0 and below 1, got {self.mask_rate}.")

    def extra_tokens(self, vocabulary: "Vocabulary", length: int) -> int:
        """The mask, unless the tokenizer has one."""
        return int(mask_id(vocabulary) == vocabulary.vocab_size)

    def num_masked(self, length: int) -> int:
        """The number of tokens to predict among `length` tokens."""
        return max(1, round(self.mask_rate * length))

    def check_batch(self, batch: PyTree) -> None:
        """Raise UserError if a row has more tokens to predict than logits are computed for."""
        weights = getattr(batch, "weights", None)
        if isinstance(weights, np.ndarray):
            most = self.num_masked(weights.shape[1])
            found = int(np.max(np.count_nonzero(weights, axis=1), initial=0))
            require(
                found <= most,
                f"MaskedLM(mask_rate={self.mask_rate}) predicts at most {most} tokens of a row of {weights.shape[1]}, a row "
                f"of the batch has {found} with a weight other than 0; mask fewer tokens, or raise objective.mask_rate.",
            )

    def loss(
        self,
        model: "nn.Module",
        vocabulary: "Vocabulary",
        params: PyTree,
        carry: PyTree,
        batch: Batch,
        key: Array,
        train: bool,
    ) -> LossOutput:
        """The loss of an `Encoder` on a batch; tokens to predict have a weight above 0 (section 3.1).

        Logits are computed for these tokens only: in every row, for the largest possible number of them. Its statistics are sums
        over masked tokens: `loss`, `weight`, `correct`, `objective` (`predicted_statistics`).
        """
        most = self.num_masked(batch.inputs.shape[1])
        weights_BN, indices_BN = jax.lax.top_k(batch.weights, most)
        predicted, routing = model.apply(
            {"params": params},
            batch.inputs,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            indices_BN=indices_BN,
            train=train,
            rngs={"dropout": key} if train else {},
            head=not chunked(self),
            mutable="routing",
            method="logits",
        )
        targets_BN = jnp.take_along_axis(batch.targets, indices_BN, axis=1)
        statistics = predicted_statistics(model, params, predicted, targets_BN, weights_BN, self)
        statistics = add_routing(statistics, routing, self)
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """The text unchanged; the logits of each token are computed while that token is masked."""
        refuse_target(self, target)
        ids_T = read_whole(encoder_ids(run.tokenizer, text), run.config.model.max_length)
        hidden = functools.partial(_hidden_in_turn, ids_T=ids_T, mask=mask_id(run.tokenizer))
        return Reading(
            {"encoder": ids_T},
            (ids_T[None],),
            predicts="token here, if it were masked",
            of="encoder",
            ahead=0,
            logits=hidden,
        )

    def changes(self, tokenizer: "Tokenizer", length: int, seed: int) -> Mapping[str, Any]:
        """Mask a share of a row's tokens and make them the targets; end-of-text and padding are neither masked nor targets."""
        others = np.flatnonzero(known_tokens(tokenizer))

        def noise(batch: Batch, row: int, place: tuple[int, ...]) -> None:
            random = random_at(seed, _KEY, *place)
            inputs_T = batch.inputs[row]
            order_T, kind_T = random.permutation(len(inputs_T)), random.uniform(size=len(inputs_T))
            other_T = others[random.randint(len(others), size=len(inputs_T))]
            eligible_T = (batch.segment_ids[row] > 0) & ~np.isin(inputs_T, never_hidden(tokenizer))
            eligible = order_T[eligible_T[order_T]]
            chosen_T = np.zeros(len(inputs_T), bool)
            chosen_T[eligible[: self.num_masked(len(eligible))]] = True
            batch.targets[row] = inputs_T
            batch.weights[row] = chosen_T
            if self.mask_scheme == "plain":
                kind_T = np.zeros_like(kind_T)
            inputs_T[chosen_T & (kind_T < 0.8)] = mask_id(tokenizer)
            replaced_T = chosen_T & (kind_T >= 0.8) & (kind_T < 0.9)
            inputs_T[replaced_T] = other_T[replaced_T]

        return {"noise": noise}

    def score(
        self, run: Trained, texts: Sequence[tuple[str, str]], names: Sequence[str], batch_size: int, stride: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-probability of each token, given all others (Salazar et al. 2020): n rows for a text of n tokens."""
        del names
        begin, end = (np.array(ids, np.int32) for ids in around_text(run.tokenizer))
        queries = []
        for prompt, text in texts:
            before, tokens = (np.asarray(run.tokenizer.encode(part), np.int32) for part in (prompt, text))
            queries.append((Query(np.concatenate([begin, before]), tokens), end))
        scores = masked_scores(run, queries, mask_id(run.tokenizer), batch_size=batch_size, stride=stride)
        return ((query.tokens, found) for (query, _), found in zip(queries, scores, strict=True))

    def encode(self, text: str, tokenizer: Any, data: DataConfig) -> np.ndarray:
        """A text between its special ids; each [MASK], or the tokenizer's own mask text, becomes a masked token."""
        del data
        begin, end = around_text(tokenizer)
        mask = mask_id(tokenizer)
        if mask < tokenizer.vocab_size:
            middle = tokenizer.encode(text.replace(MASK, tokenizer.name_of(mask)), special=True)
        else:
            first, *others = (np.asarray(tokenizer.encode(part), np.int32) for part in text.split(MASK))
            middle = np.concatenate([first, *(np.append(mask, part) for part in others)])
        return np.concatenate([begin, middle, end]).astype(np.int32)

    def predict(
        self, run: Trained, texts: Sequence[str], names: Sequence[str], batch_size: int, top_k: int = 1
    ) -> Iterator[dict[str, Any]]:
        """The text `filled` with the most likely word for each mask, and the `top_k` most likely `words` of each mask with
        their `probabilities`, best first.
        """
        tokenizer, limit = run.tokenizer, run.config.model.max_length
        mask, allowed = mask_id(tokenizer), drawable(tokenizer, run.config.model.vocab_size, 1)
        allowed = np.ones(run.config.model.vocab_size, bool) if allowed is None else np.array(allowed)
        allowed[list(never_hidden(tokenizer))] = allowed[mask] = False
        most = int(allowed.sum())
        require(1 <= top_k <= most, f"top_k must be from 1 to the {most} tokens, got {top_k}.")

        def rows() -> Iterator[Row]:
            for text, name in zip(texts, names, strict=True):
                tokens = self.encode(text, tokenizer, run.config.data)
                places = np.flatnonzero(tokens == mask).astype(np.int32)
                require(
                    len(places) > 0, f"A masked model says what is hidden by {MASK}, {name} has none: {text!r:.60}."
                )
                require(
                    len(tokens) <= limit,
                    f"A text must fit in the model's {limit} tokens, {name} has {len(tokens)}; shorten it.",
                )
                yield tokens, places

        compute = functools.partial(_most_likely, top_k, tuple(np.flatnonzero(~allowed).tolist()))
        for ((tokens, places), (ids_NK, log_NK)), name in zip(
            computed_rows(run, compute, rows(), batch_size, limit), names, strict=True
        ):
            ids_NK, log_NK = ids_NK[: len(places)], log_NK[: len(places)]
            require(not bool(np.isnan(log_NK).any()), f"A probability must be a number, {name} has NaN.")
            filled = tokens.copy()
            filled[places] = ids_NK[:, 0]
            words = [[tokenizer.decode([token]).strip() for token in ids_K] for ids_K in ids_NK]
            yield {
                "filled": tokenizer.decode(filled[~np.isin(filled, never_hidden(tokenizer))]),
                "words": words,
                "probabilities": np.exp(log_NK).tolist(),
            }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _most_likely(
    top_k: int,
    excluded: tuple[int, ...],
    model: Any,
    params: PyTree,
    lengths_PB: Array,
    tokens_BT: Array,
    indices_BN: Array,
) -> tuple[Array, Array]:
    """Ids and log-probabilities [B, N, K] of the most likely tokens at each index."""
    logits_BNV: Any = model.apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=segment_ids_of(lengths_PB[0], tokens_BT),
        indices_BN=indices_BN,
        method="logits",
    )
    scores_BNV = jax.nn.log_softmax(logits_BNV.astype(jnp.float32))
    best_BNK, ids_BNK = jax.lax.top_k(scores_BNV.at[..., jnp.array(excluded, jnp.int32)].set(-jnp.inf), top_k)
    # A NaN among the logits makes all scores NaN, except the replaced ones.
    return ids_BNK, best_BNK


def _hidden_in_turn(model: Any, params: PyTree, output: Array, *, ids_T: np.ndarray, mask: int) -> np.ndarray:
    """Logits [T, V] of each token of a text; each is computed in a separate row with the mask in the token's place."""
    del output
    T, found = len(ids_T), []
    for start in range(0, T, _HIDDEN_AT_ONCE):
        # The last rows fill up the batch.
        places_B1 = np.minimum(np.arange(start, start + _HIDDEN_AT_ONCE), T - 1)[:, None]
        rows_BT = np.where(np.arange(T)[None] == places_B1, mask, ids_T[None]).astype(np.int32)
        found.append(np.asarray(_logits_at(model, params, rows_BT, places_B1), np.float32)[:, 0])
    return np.concatenate(found)[:T]


@functools.partial(jax.jit, static_argnums=0)
def _logits_at(model: Any, params: PyTree, tokens_BT: Array, indices_BN: Array) -> Array:
    return model.apply({"params": params}, tokens_BT, indices_BN=indices_BN, method="logits")
