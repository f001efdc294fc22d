"""Philox4x32-10, the counter-based generator behind every draw.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

Words = NDArray[np.uint64]
"""32-bit words, one a row, held in 64 bits so that a product fits."""


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Encrypt counters with keys, all rows at once.

    Args:
        counter: four arrays of 32-bit words, least significant first.
        key: two arrays of 32-bit words, least significant first.

    Returns:
        Four arrays of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) a row, a function of the row's (seed, position) alone.

    Args:
        seeds: 64-bit keys; wider or negative integers are taken modulo 2^64.
        positions: counters, the position of the token to be drawn.

    Returns:
        `[rows]` float64, 53 random bits each.
    """
    wide = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    at = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(at)
    # The upper counter words stay zero: further draws of one position are numbered there.
    low, high, _, _ = philox4x32((at & _LOW, at >> _HALF, zero, zero), (wide & _LOW, wide >> _HALF))
    bits = ((high << _HALF) | low) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
