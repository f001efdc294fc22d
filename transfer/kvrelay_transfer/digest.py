"""xxh3-128 over the bytes of a KV frame, and the keyed BLAKE2b-128 that says whose frame it is.

The first is no defence against forgery: it finds bytes that were flipped, lost or overwritten on the way.
"""

import hashlib

from typing_extensions import Buffer
from xxhash import xxh3_128

DIGEST_SIZE = 16


def digest(*parts: Buffer) -> bytes:
    """16 bytes over the concatenation of `parts`, read in place.

    xxhash releases the interpreter lock for large buffers, so a thread may do this beside the loop.
    """
    state = xxh3_128()
    for part in parts:
        state.update(part)
    value: bytes = state.digest()
    return value


def mac(key: bytes, part: Buffer) -> bytes:
    """16 bytes over `part` that only a holder of `key` (up to 64 bytes) can make."""
    return hashlib.blake2b(part, key=key, digest_size=DIGEST_SIZE).digest()
