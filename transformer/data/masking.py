"""Masked language modelling: which tokens of a row are hidden and what stands in their place."""

from collections.abc import Callable

import numpy as np

from transformer.config import ObjectiveConfig
from transformer.data.rows import random_at
from transformer.data.tokenizers import Tokenizer, Vocabulary
from transformer.types import Batch

Noise = Callable[[Batch, int, tuple[int, ...]], None]
"""Changes row `row` of a batch in place; its randomness depends on the place of the row in the data alone."""

_KEY = 7  # tells these draws from those of other parts that use the same seed


def mask_token(tokenizer: Vocabulary) -> int:
    """The id of the mask: the one after the tokenizer's."""
    return tokenizer.vocab_size


def masking(config: ObjectiveConfig, tokenizer: Tokenizer, seed: int) -> Noise:
    """Hide `config.mask_rate` of a row's tokens (Devlin et al. 2019, section 3.1) and make them the targets.

    End-of-text and padding stay, and are no targets. Under the scheme `bert`, of the tokens to predict 80 % become the
    mask, 10 % a random token, and 10 % stay as they are; under `plain` all become the mask.
    """

    def noise(batch: Batch, row: int, place: tuple[int, ...]) -> None:
        random = random_at(seed, _KEY, *place)
        inputs_T = batch.inputs[row]
        order_T, kind_T = random.permutation(len(inputs_T)), random.uniform(size=len(inputs_T))
        other_T = random.randint(tokenizer.vocab_size, size=len(inputs_T))
        eligible_T = (batch.segment_ids[row] > 0) & (inputs_T != tokenizer.end_of_text)
        eligible = order_T[eligible_T[order_T]]
        chosen_T = np.zeros(len(inputs_T), bool)
        chosen_T[eligible[: config.num_masked(len(eligible))]] = True
        batch.targets[row] = inputs_T
        batch.weights[row] = chosen_T
        if config.mask_scheme == "plain":
            kind_T = np.zeros_like(kind_T)
        inputs_T[chosen_T & (kind_T < 0.8)] = mask_token(tokenizer)
        replaced_T = chosen_T & (kind_T >= 0.8) & (kind_T < 0.9)
        inputs_T[replaced_T] = other_T[replaced_T]

    return noise
