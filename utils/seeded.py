"""Random numbers without state: a hash of (seed, epoch, image, draw), equal on every machine and for any order of use.

Augmentation, shuffling and subsets take their numbers here, so neither the number of loader processes nor a resume in
the middle of an epoch changes them.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK_64 = (1 << 64) - 1

Words = int | np.ndarray


def hash64(*words: Words) -> np.ndarray:
    """uint64 hash of integer words (any sign, taken modulo 2^64); arrays broadcast, the result has at least one axis.

    Each word is added to the state and mixed by SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, OOPSLA 2014).
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _mix(state + _as_uint64(word))
    return state


def uniform(*words: Words) -> np.ndarray:
    """float64 in [0, 1), a multiple of 2^-53, from the hash of the words."""
    return (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(limit: int, *words: Words) -> np.ndarray:
    """int64 in [0, limit) from the hash of the words; limit at most 2^31 (bias below 2^-22)."""
    return np.floor(uniform(*words) * limit).astype(np.int64)


def permutation(count: int, *words: int) -> np.ndarray:
    """int64 [count]: the numbers 0..count-1 in an order given by the hash of the words."""
    return np.argsort(hash64(*words, np.arange(count)), kind="stable")


def _as_uint64(word: Words) -> np.ndarray:
    if isinstance(word, np.ndarray):
        return word.astype(np.uint64)
    return np.array([word & _MASK_64], dtype=np.uint64)


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))
