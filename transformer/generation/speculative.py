"""Speculative decoding: a small model drafts tokens, and a large model checks them in one pass, with an exact result."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer.generation.generate import Generator, read_rows, roll_cache, rounded
from transformer.generation.loop import Draw, State, adjusted_logits, last_tokens, row_keys
from transformer.generation.prepare import DecodingModel
from transformer.generation.sampling import NO_TOKEN, SamplingConfig, filter_logits
from transformer.generation.window import windows
from transformer.layers.cache import cache_lengths, cache_overflow, shorten
from transformer.models.decoder import Decoder
from transformer.types import PyTree
from transformer.validation import require


class Caches(NamedTuple):
    """The caches of both models, lengths of the prompts, and counts of offered and accepted draft tokens."""

    target: PyTree
    draft: PyTree
    prompts_B: Int[Array, " B"]
    offered: Int[Array, ""]
    accepted: Int[Array, ""]


class SpeculativeGenerator(Generator):
    """A `Generator` with a draft model: the tokens have the distribution of the model alone; a good draft saves time.

    In each round the draft model draws `draft_tokens` tokens, one after the other. The model reads them in one pass, and
    accepts each with probability min(1, p / q). Here p and q are the token's probabilities under the model and the draft
    model, after temperature, top-k and the other filters. The first rejected token is replaced by a draw from max(p - q, 0),
    normalised. If all are accepted, the model draws one more (Leviathan et al. 2023, algorithm 1). With greedy decoding, the
    tokens equal the tokens of the model alone.

    Args:
        model: a decoder.
        params: its parameters.
        draft: a smaller decoder with the same vocabulary.
        draft_params: its parameters.
        draft_tokens: drafted tokens of each round.
        place: as for a `Generator`.
        keep_first: as for a `Generator`.
    """

    def __init__(
        self,
        model: Decoder,
        params: PyTree,
        draft: Decoder,
        draft_params: PyTree,
        *,
        draft_tokens: int = 4,
        place: Callable[[np.ndarray], jax.Array | np.ndarray] = lambda rows: rows,
        keep_first: int | None = None,
    ) -> None:
        super().__init__(model, params, place, keep_first=keep_first)
        sizes = model.config.vocab_size, draft.config.vocab_size
        require(
            sizes[0] == sizes[1],
            f"A draft must have the model's vocabulary of {sizes[0]:,} tokens, it has {sizes[1]:,}.",
        )
        require(draft_tokens >= 1, f"draft_tokens must be at least 1, got {draft_tokens}.")
        self._draft, self._draft_tokens = DecodingModel(draft, draft_params), draft_tokens
        self.offered = 0
        """Number of drafted tokens that could be accepted, in all calls so far."""
        self.accepted = 0
        """Number of accepted tokens, in all calls so far."""

    def _sizes(self, longest: int, max_new_tokens: int) -> tuple[int, int, int]:
        limit, _, _ = super()._sizes(longest, max_new_tokens)
        reach, needed = self._draft.model.config.max_length, longest + max_new_tokens
        needed = min(needed, limit) if limit else needed
        require(
            reach == 0 or needed <= reach,
            f"A draft must read as many tokens as the model, here {needed:,}, it reads {reach:,}; request fewer tokens, or use "
            "another draft.",
        )
        # The last round of a row may draw more tokens than requested.
        width = rounded(longest + max_new_tokens + self._draft_tokens + 1)
        return limit, min(width, limit) if limit else width, width

    def _prefill(self, window: tuple[Any, ...], draw: Draw, sampling: SamplingConfig, sizes: dict[str, int]) -> State:
        state = super()._prefill(window, draw, sampling, sizes)
        draft = _read_draft(self._draft.model, self._draft.params, *window, **self._of_draft(sizes))
        counts = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two arrays: both are donated
        return state._replace(cache=Caches(state.cache, draft, jnp.asarray(window[1]), *counts))

    def _of_draft(self, sizes: dict[str, int]) -> dict[str, int]:
        reach = self._draft.model.config.max_length or sizes["capacity"]
        return sizes | {"capacity": min(sizes["capacity"], reach), "length": min(sizes["length"], reach)}

    def _decode(self, state: State, num_new: int, sampling: SamplingConfig, draw: Draw) -> tuple[State, Any]:
        rows = len(state.tokens_BP)
        params = self._target.prepared(rows * (self._draft_tokens + 1)), self._draft.prepared(rows)
        before = int(state.cache.offered), int(state.cache.accepted)
        models = self._target.model, self._draft.model
        how: Any = {"draft_tokens": self._draft_tokens, "sampling": sampling}
        state, overflow = _rounds(models, params, state, np.int32(num_new), draw, **how)
        self.offered += int(state.cache.offered) - before[0]
        self.accepted += int(state.cache.accepted) - before[1]
        return state, overflow

    def _roll_caches(self, state: State, rows: tuple[np.ndarray, ...], sizes: dict[str, int]) -> State:
        tokens_BP, caches = state.tokens_BP, state.cache
        target = roll_cache(self._target.model, self._target.params, caches.target, tokens_BP, *rows, **sizes)
        draft = roll_cache(
            self._draft.model, self._draft.params, caches.draft, tokens_BP, *rows, **self._of_draft(sizes)
        )
        return state._replace(cache=caches._replace(target=target, draft=draft))


@functools.partial(jax.jit, static_argnames=("model", "keep_first", "length", "capacity"))
def _read_draft(
    model: Decoder,
    params: PyTree,
    tokens_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    dropped_B: Int[Array, " B"],
    *,
    keep_first: int,
    length: int,
    capacity: int,
) -> Any:
    """The draft's cache of the prompts."""
    tokens_BT = windows(tokens_BP, dropped_B, keep_first=keep_first, length=length)
    return read_rows(model, params, tokens_BT, lengths_B - dropped_B, capacity)[1]


@functools.partial(jax.jit, static_argnames=("models", "draft_tokens", "sampling"), donate_argnames="state")
def _rounds(
    models: tuple[Decoder, Decoder],
    params: tuple[PyTree, PyTree],
    state: State,
    num_new: Any,
    draw: Draw,
    *,
    draft_tokens: int,
    sampling: SamplingConfig,
) -> tuple[State, Bool[Array, ""]]:
    """Run rounds until each row has `num_new` tokens or ends, or a window is full; also returns whether a cache overflowed."""

    def done(state: State) -> Bool[Array, " B"]:
        return state.ended_B | (state.lengths_B - state.cache.prompts_B >= num_new)

    def should_continue(state: State) -> Bool[Array, ""]:
        return ~jnp.all(done(state)) & jnp.all(done(state) | (_room(state.cache.target) > 0))

    def one_round(state: State) -> State:
        return _round(models, params, state, done(state), draw, draft_tokens, sampling)

    state = jax.lax.while_loop(should_continue, one_round, state)
    return state, cache_overflow(state.cache.target) | cache_overflow(state.cache.draft)


def _round(
    models: tuple[Decoder, Decoder],
    params: tuple[PyTree, PyTree],
    state: State,
    done_B: Bool[Array, " B"],
    draw: Draw,
    K: int,
    sampling: SamplingConfig,
) -> State:
    """Draft K tokens of each row, append the accepted ones and one more by the model; rows that are done do not change."""
    (model, draft), (weights, draft_weights), caches = models, params, state.cache
    n_B, held_B = state.lengths_B, cache_lengths(caches.target)
    tokens_BP, draft_cache, d_BK, q_BKV = _drafted(draft, draft_weights, state, held_B, draw, K, sampling)

    # ---- Read all of them, and accept ----------------------------------------------------------------------------------
    last_B1 = last_tokens(state.tokens_BP, n_B)
    room_B = _room(caches.target)
    logits_BTV, target = _apply(model, weights, jnp.concatenate([last_B1, d_BK], axis=1), caches.target)
    p_BTV = jnp.stack(
        [distribution(logits_BTV[:, i], tokens_BP, n_B + i, draw, sampling) for i in range(K + 1)], axis=1
    )
    u_BK = jnp.stack([jax.vmap(jax.random.uniform)(_keys(draw, n_B + i, 1)) for i in range(K)], axis=1)
    can_B = jnp.minimum(K, room_B - 1)  # the model's own token needs a slot too
    a_B, p_BV, residual_BV = accept(p_BTV, q_BKV, d_BK, u_BK, can_B)
    own_B = jnp.where(_usable(p_BV), _draw(residual_BV, _keys(draw, n_B + a_B, 2)), NO_TOKEN)
    new_BT = jnp.where(jnp.arange(K + 1)[None] == a_B[:, None], own_B[:, None], jnp.pad(d_BK, ((0, 0), (0, 1))))

    # ---- Append up to the first that ends the row ----------------------------------------------------------------------
    ends_BT = (jnp.isin(new_BT, draw.ends_E) | (new_BT == NO_TOKEN)) & (jnp.arange(K + 1)[None] <= a_B[:, None])
    ends_B = jnp.any(ends_BT, axis=1) & ~done_B
    added_B = jnp.where(done_B, 0, jnp.where(ends_B, jnp.argmax(ends_BT, axis=1), a_B) + 1)
    offered, accepted = (jnp.sum(jnp.where(done_B, 0, count_B)) for count_B in (can_B, a_B))
    counts = caches.offered + offered, caches.accepted + accepted
    caches = Caches(shorten(target, held_B + added_B), draft_cache, caches.prompts_B, *counts)
    return _appended(state, tokens_BP, new_BT, added_B, done_B, ends_B)._replace(cache=caches)


def _drafted(
    draft: Decoder,
    params: PyTree,
    state: State,
    held_B: Int[Array, " B"],
    draw: Draw,
    K: int,
    sampling: SamplingConfig,
) -> tuple[Array, Any, Array, Array]:
    """Rows with K drafted tokens, the draft's cache, the drafted tokens [B, K], and their distributions [B, K, V].

    The draft reads the two latest tokens, since its cache may lack the first of them.
    """
    n_B, tokens_BP, cache = state.lengths_B, state.tokens_BP, shorten(state.cache.draft, held_B - 1)
    next_BT = jnp.take_along_axis(tokens_BP, n_B[:, None] + jnp.arange(-2, 0)[None], axis=1)
    drafted, by_draft = [], []
    for index in range(K):
        logits_BTV, cache = _apply(draft, params, next_BT, cache)
        q_BV = distribution(logits_BTV[:, -1], tokens_BP, n_B + index, draw, sampling)
        token_B = _draw(q_BV, _keys(draw, n_B + index, 0))
        tokens_BP = tokens_BP.at[jnp.arange(len(n_B)), n_B + index].set(token_B)
        next_BT = token_B[:, None]
        drafted.append(token_B)
        by_draft.append(q_BV)
    return tokens_BP, cache, jnp.stack(drafted, axis=1), jnp.stack(by_draft, axis=1)


def _appended(
    state: State,
    tokens_BP: Int[Array, "B P"],
    new_BT: Int[Array, "B T"],
    added_B: Int[Array, " B"],
    done_B: Bool[Array, " B"],
    ends_B: Bool[Array, " B"],
) -> State:
    """Append the first `added_B` new tokens; an ended row repeats its last token, a row that is done does not change."""
    n_B = state.lengths_B
    lengths_B, ended_B = n_B + added_B, state.ended_B | ends_B
    columns_BT = n_B[:, None] + jnp.arange(new_BT.shape[1])[None]
    tokens_BP = tokens_BP.at[jnp.arange(len(n_B))[:, None], columns_BT].set(new_BT)
    latest_B1 = last_tokens(tokens_BP, lengths_B)
    behind_BP = jnp.arange(tokens_BP.shape[1])[None] >= lengths_B[:, None]
    tokens_BP = jnp.where(behind_BP & ended_B[:, None], latest_B1, tokens_BP)
    tokens_BP = jnp.where(done_B[:, None], state.tokens_BP, tokens_BP)
    count_B = lengths_B - state.cache.prompts_B
    least = jnp.min(jnp.where(ended_B, tokens_BP.shape[1], count_B))
    num_new = jnp.where(jnp.all(ended_B), jnp.max(count_B), least).astype(jnp.int32)
    return State(tokens_BP, lengths_B, num_new, ended_B, state.cache)


def accept(
    p_BTV: Float[Array, "B T V"],
    q_BKV: Float[Array, "B K V"],
    drafted_BK: Int[Array, "B K"],
    uniform_BK: Float[Array, "B K"],
    can_B: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, "B V"], Float[Array, "B V"]]:
    """The number of accepted tokens, and the model's and the residual distribution of the token after them.

    The token after the accepted ones is drawn from the residual distribution, which is not normalised.

    Args:
        p_BTV: the model's distributions of the K drafted tokens and of the next one.
        q_BKV: the draft's distributions of the drafted tokens. NaN rejects a token.
        drafted_BK: the drafted tokens.
        uniform_BK: random numbers in [0, 1).
        can_B: most tokens to accept, from 0 to K.
    """
    K = drafted_BK.shape[1]
    p_BK, q_BK = (jnp.take_along_axis(x[:, :K], drafted_BK[..., None], axis=2)[..., 0] for x in (p_BTV, q_BKV))
    fine_BK = (q_BK > 0) & (uniform_BK * q_BK < p_BK) & (jnp.arange(K)[None] < can_B[:, None])
    a_B = jnp.sum(jnp.cumprod(fine_BK.astype(jnp.int32), axis=1), axis=1)
    p_BV = jnp.take_along_axis(p_BTV, a_B[:, None, None], axis=1)[:, 0]
    q_BV = jnp.take_along_axis(q_BKV, jnp.minimum(a_B, K - 1)[:, None, None], axis=1)[:, 0]
    residual_BV = jnp.where((a_B < can_B)[:, None], jnp.maximum(p_BV - q_BV, 0), p_BV)
    # The residual may be all zero by rounding if both are equal, or NaN if the draft is.
    some_B1 = jnp.sum(residual_BV, axis=-1, keepdims=True) > 0
    return a_B, p_BV, jnp.where(some_B1, residual_BV, p_BV)


def distribution(
    logits_BV: Float[Array, "B V"],
    tokens_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    draw: Draw,
    sampling: SamplingConfig,
) -> Float[Array, "B V"]:
    """The distribution from which `append` would draw the next token; NaN if logits are not finite."""
    logits_BV = adjusted_logits(logits_BV, tokens_BP, lengths_B, draw, sampling)
    usable_B1 = jnp.isfinite(jnp.max(logits_BV, axis=-1, keepdims=True))
    if sampling.greedy:
        p_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1], dtype=jnp.float32)
    else:
        p_BV = jax.nn.softmax(filter_logits(logits_BV, sampling), axis=-1)
    return jnp.where(usable_B1, p_BV, jnp.nan)


def _apply(model: Decoder, params: PyTree, tokens_BT: Int[Array, "B T"], cache: Any) -> Any:
    """Logits and cache; tokens beyond the free slots of the cache are padding."""
    columns_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    valid_BT = (columns_BT < _room(cache)[:, None]).astype(jnp.int32)
    return model.apply({"params": params}, tokens_BT, segment_ids_BT=valid_BT, cache=cache)


def _room(cache: Any) -> Int[Array, " B"]:
    """Free slots of each row."""
    return cache[0].attention.key_BGPK.shape[-2] - cache_lengths(cache)


def _usable(p_BV: Float[Array, "B V"]) -> Bool[Array, " B"]:
    return jnp.isfinite(jnp.max(p_BV, axis=-1))


def _draw(p_BV: Float[Array, "B V"], keys_B: Any) -> Int[Array, " B"]:
    return jax.vmap(jax.random.categorical)(keys_B, jnp.log(p_BV)).astype(jnp.int32)


def _keys(draw: Draw, positions_B: Int[Array, " B"], purpose: int) -> Any:
    """A key for each row's position and a purpose. Keys of discarded drafts are used again; no kept token depends on them."""
    return jax.vmap(jax.random.fold_in, (0, None))(row_keys(draw, positions_B), purpose)
