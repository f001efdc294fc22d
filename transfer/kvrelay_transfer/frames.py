"""One message of the KV plane: a fixed header directly followed by its payload.

Little-endian, version 3, 160 bytes:

```
offset size field             offset size field
     0    4 magic "KVRF"          56    8 payload bytes
     4    2 version               64   16 trace id
     6    1 kind                  80    8 span id
     7    1 trace flags           88   16 digest of the payload
     8   16 lease id             104    1 which one: 0 xxh3-128, 1 of blocks
    24    8 epoch                105    1 dtype (layout.DTYPE_CODES)
    32    4 generation           106    2 first head
    36    4 sequence             108    2 head count
    40    2 layer start          110    2 tokens in a block of the payload
    42    2 layer count          112   16 reserved, zero
    44    4 total messages       128   16 seal: BLAKE2b-128 of bytes 0..128 under the frame key
    48    4 first token          144   16 xxh3-128 of bytes 0..144
    52    4 token count
```

The payload (`layout.py` has its order) is covered by one of two digests, which the frame names: xxh3-128 of
its bytes, or the digest of KV blocks, which whoever copies them takes on the way (the formula is the
copier's). Either lies in the header. The header ends in two of its own, and they answer two questions:

- *Is it whole?* xxh3-128, which anybody can take. If it fails the frame was damaged on its way: CorruptFrame,
  ask for it again. Nothing else in it is believed before.
- *Is it ours?* The seal, which needs the key of this lease, tenant, model and prompt (`ticket.py`). A frame
  that is whole but names another lease, epoch or allocation, or that no holder of the key sealed, is a
  StaleFrame: sent right, meant for somebody else.

A key alone could not tell the two apart, as damage breaks a seal just as well.

Header and payload share one staging buffer, so a frame is one message without a gather. Parsing
reads fixed offsets only; nothing is unpickled or evaluated.
"""

import enum
import struct
from dataclasses import dataclass, field
from hmac import compare_digest

from kvrelay_protocol.errors import CorruptFrame, StaleFrame
from kvrelay_protocol.trace import PACKED_SIZE, TraceContext

from .digest import DIGEST_SIZE, digest, mac
from .transport import Buffer, readable_bytes, writable_bytes

MAGIC = b"KVRF"
VERSION = 3
HEADER_SIZE = 160
_FIELDS = struct.Struct("<4sHBB16sQIIHHIIIQ16s8s16sBBHHH16x")
_SEAL_AT = _FIELDS.size
_DIGEST_AT = _SEAL_AT + DIGEST_SIZE
_NO_TRACE = bytes(PACKED_SIZE - 1)


class _PayloadDigest(enum.IntEnum):
    XXH3 = 0
    BLOCKS = 1


class FrameKind(enum.IntEnum):
    """What the payload is."""

    KV_GROUP = 1
    """KV of some layers for some blocks."""
    HANDOVER = 2
    """The record that lets the decode worker go on: first token, position, prompt tail."""


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a frame says about itself."""

    kind: FrameKind
    lease_id: bytes
    """16 random bytes, chosen by the receiver."""
    epoch: int
    """Incarnation of the sender: 64 random bits, new at every process start."""
    generation: int
    """Allocation generation of the lease on the receiver."""
    sequence: int
    """Number of this message in its transfer, from 0."""
    layer_start: int = 0
    layer_count: int = 0
    token_start: int = 0
    """Position in the sequence."""
    token_count: int = 0
    head_start: int = 0
    """Among the KV heads of the model."""
    head_count: int = 0
    block_tokens: int = 0
    """Tokens in a block of the payload; the last block is padded to as many."""
    dtype_code: int = 0
    """Of the payload's numbers."""
    total_messages: int = 0
    """Messages in the whole transfer, this one included; 0 while unknown. Set in the handover."""
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """What the receiver's lease accepts; any other frame is stale."""

    lease_id: bytes
    epoch: int
    generation: int
    key: bytes = field(repr=False)
    """Of `ticket.frame_key`."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame with a verified header. `payload` is a view of the buffer it was received into."""

    header: FrameHeader
    payload: memoryview
    blocks_digest: bytes | None = None
    """What the payload must still be compared with, by whoever copies its blocks; None if `payload` is
    verified already."""


def seal(
    buffer: Buffer,
    header: FrameHeader,
    payload_bytes: int,
    key: bytes,
    blocks_digest: bytes | None = None,
) -> memoryview:
    """Write header, digests and seal in front of a payload already at `buffer[HEADER_SIZE:]`.

    Args:
        buffer: where the frame lies.
        header: what the frame says about itself.
        payload_bytes: length of the payload.
        key: of `ticket.frame_key`.
        blocks_digest: the payload's digest if its copier took one; without it the payload is read.

    Returns the bytes to send.

    Raises:
        ValueError: the payload does not fit the buffer, or a field is out of range.
    """
    view = writable_bytes(buffer)
    if payload_bytes < 0 or HEADER_SIZE + payload_bytes > len(view):
        raise ValueError(
            f"a payload of {payload_bytes} bytes and its header do not fit {len(view)} bytes"
        )
    if len(header.lease_id) != 16:
        raise ValueError(f"a lease id has 16 bytes, not {len(header.lease_id)}")
    packed_trace = header.trace.pack() if header.trace else _NO_TRACE + b"\0"
    end = HEADER_SIZE + payload_bytes
    taken = _PayloadDigest.XXH3 if blocks_digest is None else _PayloadDigest.BLOCKS
    payload_digest = digest(view[HEADER_SIZE:end]) if blocks_digest is None else blocks_digest
    if len(payload_digest) != DIGEST_SIZE:
        raise ValueError(f"a digest has {DIGEST_SIZE} bytes, not {len(payload_digest)}")
    try:
        _FIELDS.pack_into(
            view,
            0,
            MAGIC,
            VERSION,
            header.kind,
            packed_trace[24],
            header.lease_id,
            header.epoch,
            header.generation,
            header.sequence,
            header.layer_start,
            header.layer_count,
            header.total_messages,
            header.token_start,
            header.token_count,
            payload_bytes,
            packed_trace[:16],
            packed_trace[16:24],
            payload_digest,
            taken,
            header.dtype_code,
            header.head_start,
            header.head_count,
            header.block_tokens,
        )
    except struct.error as error:
        raise ValueError(f"{header} has a field out of range: {error}") from error
    view[_SEAL_AT:_DIGEST_AT] = mac(key, view[:_SEAL_AT])
    view[_DIGEST_AT:HEADER_SIZE] = digest(view[:_DIGEST_AT])
    return view[:end]


def open_frame(buffer: Buffer, nbytes: int, expected: Expected) -> Frame:
    """Verify and parse the `nbytes` received into `buffer`.

    A payload of blocks that was sealed by its copier stays unverified: see `Frame.blocks_digest`.

    Raises:
        CorruptFrame: length, magic, version or digest do not hold. Nothing in it can be trusted.
        StaleFrame: it is whole, but belongs to another lease, incarnation or allocation, or was not
            sealed with this lease's key: it is another tenant's, model's or prompt's.
    """
    view = readable_bytes(buffer)
    if not HEADER_SIZE <= nbytes <= len(view):
        raise CorruptFrame(
            f"a frame of {nbytes} bytes in a buffer of {len(view)}: shorter than its "
            f"{HEADER_SIZE}-byte header, or longer than the buffer"
        )
    (
        magic,
        version,
        kind,
        trace_flags,
        lease_id,
        epoch,
        generation,
        sequence,
        layer_start,
        layer_count,
        total_messages,
        token_start,
        token_count,
        payload_bytes,
        trace_id,
        span_id,
        payload_digest,
        taken,
        dtype_code,
        head_start,
        head_count,
        block_tokens,
    ) = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise CorruptFrame(f"a frame starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise CorruptFrame(f"frame version {version}; this side speaks {VERSION}")
    if payload_bytes != nbytes - HEADER_SIZE:
        raise CorruptFrame(
            f"the header says {payload_bytes} payload bytes, {nbytes - HEADER_SIZE} arrived"
        )
    if digest(view[:_DIGEST_AT]) != bytes(view[_DIGEST_AT:HEADER_SIZE]):
        raise CorruptFrame("the digest of a frame's header does not hold")
    _check_current(expected, lease_id, epoch, generation)
    if not compare_digest(mac(expected.key, view[:_SEAL_AT]), view[_SEAL_AT:_DIGEST_AT]):
        raise StaleFrame("a whole frame that another lease, tenant, model or prompt was sealed for")
    if kind not in tuple(FrameKind):
        raise CorruptFrame(f"unknown frame kind {kind}")
    payload = view[HEADER_SIZE:nbytes]
    by_copier = taken == _PayloadDigest.BLOCKS and kind == FrameKind.KV_GROUP
    if not by_copier and (taken != _PayloadDigest.XXH3 or digest(payload) != payload_digest):
        raise CorruptFrame(
            f"the digest of a frame with {payload_bytes} payload bytes does not hold"
        )
    trace = TraceContext(trace_id, span_id, trace_flags) if any(trace_id) else None
    header = FrameHeader(
        kind=FrameKind(kind),
        lease_id=lease_id,
        epoch=epoch,
        generation=generation,
        sequence=sequence,
        layer_start=layer_start,
        layer_count=layer_count,
        token_start=token_start,
        token_count=token_count,
        head_start=head_start,
        head_count=head_count,
        block_tokens=block_tokens,
        dtype_code=dtype_code,
        total_messages=total_messages,
        trace=trace,
    )
    return Frame(header, payload, payload_digest if by_copier else None)


def _check_current(expected: Expected, lease_id: bytes, epoch: int, generation: int) -> None:
    if lease_id != expected.lease_id:
        raise StaleFrame(f"frame of lease {lease_id.hex()}, expected {expected.lease_id.hex()}")
    if epoch != expected.epoch:
        raise StaleFrame(f"frame of sender epoch {epoch:#x}, expected {expected.epoch:#x}")
    if generation != expected.generation:
        raise StaleFrame(f"frame of allocation {generation}, expected {expected.generation}")
