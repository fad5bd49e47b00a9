"""Random draws for the data: each depends only on a seed and its coordinates, not on earlier draws."""

import numpy as np
from jaxtyping import Int


def permutation(length: int, seed: int, *coordinates: int) -> Int[np.ndarray, " n"]:
    """A random permutation of 0, ..., length - 1 that depends only on the seed and the coordinates."""
    # (Grain's index_shuffle needs no memory, but takes 15 ms an index for 4 records and 0.2 ms for 300.)
    return random_at(seed, *coordinates).permutation(length)


def random_at(seed: int, *coordinates: int) -> np.random.RandomState:
    """A random generator that depends only on the seed and the coordinates."""
    # RandomState's sequences are frozen, unlike NumPy's newer generators: data order must outlive versions.
    return np.random.RandomState(np.random.SeedSequence(seed, spawn_key=coordinates).generate_state(4))
