"""Names of KV blocks: a hash chain over everything that determines a block's content."""

import hashlib
from collections.abc import Sequence
from itertools import islice

HASH_BYTES = 16


def root_hash(model_fingerprint: str, cache_salt: bytes) -> bytes:
    """The parent of first blocks: blocks are shared within one model and one tenant's salt only."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    digest.update(model_fingerprint.encode())
    digest.update(b"\0")
    digest.update(cache_salt)
    return digest.digest()


def next_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of one full block: its own tokens and, through `parent`, all tokens before them.

    Keyed cryptographic hash rather than a fast one: a collision would show one prompt's KV to another.
    """
    digest = hashlib.blake2b(parent, digest_size=HASH_BYTES)
    digest.update(b"".join(token.to_bytes(4, "little") for token in tokens))
    return digest.digest()


def hash_full_blocks(tokens: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """One hash per full block of `tokens`; a partial last block has none."""
    hashes: list[bytes] = []
    parent = root
    iterator = iter(tokens)
    for _ in range(len(tokens) // block_size):
        parent = next_hash(parent, list(islice(iterator, block_size)))
        hashes.append(parent)
    return hashes
