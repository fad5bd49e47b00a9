"""Prefix language modelling: how much of each text is given, and so is no target."""

import numpy as np

from transformer.data.masking import Noise
from transformer.data.rows import random_at
from transformer.types import Batch

_KEY = 8  # tells these draws from those of other parts that use the same seed


def random_prefixes(seed: int) -> Noise:
    """Take the weight of the first targets of each segment, as many as a uniform draw says, all but one at most.

    What is read before the first target that counts is the prefix (Raffel et al. 2020, section 3.2.3). A segment that
    begins with a prompt has one already.
    """

    def noise(batch: Batch, row: int, place: tuple[int, ...]) -> None:
        segments_T, weights_T = batch.segment_ids[row], batch.weights[row]
        draws_T = random_at(seed, _KEY, *place).uniform(size=len(weights_T))
        for segment in range(1, segments_T.max() + 1):
            (columns,) = np.nonzero(segments_T == segment)
            if weights_T[columns[0]] > 0:
                weights_T[columns[: int(draws_T[segment - 1] * len(columns))]] = 0

    return noise
