"""The key that seals the frames of one transfer to its lease, tenant, model and prompt.

The decode worker draws a ticket of 32 random bytes for every lease and sends it with the grant, over the
control plane. Both sides then derive

    key = BLAKE2b-256(key=ticket, salt length, salt, model length, model, token count, tokens)

from what each of them was told of the request, lengths as 8 and tokens as 4 little-endian bytes. They
agree only if all of it does: a worker that computed another prompt, or the same one for another tenant,
can't make a frame that this lease lets in, whatever mixed them up.

Source: keyed hashing as in RFC 7693, section 2.9; one ticket for one lease, so no nonce is needed.
"""

import hashlib
import secrets
import struct
from collections.abc import Sequence

from kvrelay_protocol.errors import LeaseLost

TICKET_SIZE = 32
_KEY_SIZE = 32
_PURPOSE = b"kvrelay frames 3"
"""BLAKE2b's personalisation, 16 bytes: these keys are good for nothing else."""


def new_ticket() -> bytes:
    """32 random bytes; never logged, never given to a client."""
    return secrets.token_bytes(TICKET_SIZE)


def frame_key(ticket: bytes, *, model: str, salt: bytes, tokens: Sequence[int]) -> bytes:
    """32 bytes that seal and open the frames of one transfer.

    Args:
        ticket: of the lease.
        model: fingerprint of the model whose KV is sent.
        salt: of the tenant; empty where there is none.
        tokens: the exact prompt, each id below 2**32.

    Raises:
        LeaseLost: the lease came without a ticket of 32 bytes.
    """
    if len(ticket) != TICKET_SIZE:
        raise LeaseLost(f"a lease with a ticket of {len(ticket)} bytes; it needs {TICKET_SIZE}")
    state = hashlib.blake2b(key=ticket, digest_size=_KEY_SIZE, person=_PURPOSE)
    for part in (salt, model.encode()):
        state.update(struct.pack("<Q", len(part)) + part)
    state.update(struct.pack(f"<Q{len(tokens)}I", len(tokens), *tokens))
    return state.digest()
