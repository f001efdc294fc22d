"""W3C trace context: the text form for HTTP and gRPC, 25 bytes for KV frames.

Source: W3C Trace Context, level 1, section 3.2 (`traceparent`, version 00).
"""

import re
import secrets
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$")
PACKED_SIZE = 25


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Identity of the span that is the parent of whatever happens next."""

    trace_id: bytes
    """16 bytes, not all zero."""
    span_id: bytes
    """8 bytes, not all zero."""
    flags: int = 1
    """Bit 0: sampled."""

    @classmethod
    def new(cls) -> "TraceContext":
        return cls(secrets.token_bytes(16), secrets.token_bytes(8))

    @classmethod
    def parse(cls, traceparent: str | None) -> "TraceContext | None":
        """The context in a header's value, or None where it is absent or malformed."""
        match = _TRACEPARENT.match(traceparent or "")
        if match is None:
            return None
        trace_id, span_id = bytes.fromhex(match[1]), bytes.fromhex(match[2])
        if not any(trace_id) or not any(span_id):
            return None
        return cls(trace_id, span_id, int(match[3], 16))

    @classmethod
    def unpack(cls, packed: bytes) -> "TraceContext":
        if len(packed) != PACKED_SIZE:
            raise ValueError(f"a packed trace context has {PACKED_SIZE} bytes, not {len(packed)}")
        return cls(packed[:16], packed[16:24], packed[24])

    def pack(self) -> bytes:
        return self.trace_id + self.span_id + bytes([self.flags])

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{self.flags:02x}"
