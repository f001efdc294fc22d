"""What the trace says of the messages of one transfer: one event each, or of neighbours together."""

from dataclasses import dataclass

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_transfer.frames import FrameHeader
from kvrelay_transfer.timings import MessageNotes


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message of blocks, or several: what they carried and what it took to take them in."""

    first_message: int
    messages: int
    layers: range
    tokens: range
    bytes: int
    """Headers included."""
    receive_s: float
    """Verifying and writing to the pool."""
    at_ns: int
    """Wall clock when the last of them was in, nanoseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class MessageEvent:
    """An event of the span `kv_transfer`."""

    arrived: Arrived
    blocks: int
    """Of the decode worker."""
    gather_s: float
    send_s: float

    @property
    def attributes(self) -> dict[str, int | float]:
        """By the names of docs/observability.md."""
        arrived = self.arrived
        return {
            "kvrelay.kv.message": arrived.first_message,
            "kvrelay.kv.messages": arrived.messages,
            "kvrelay.kv.first_layer": arrived.layers.start,
            "kvrelay.kv.layers": len(arrived.layers),
            "kvrelay.kv.blocks": self.blocks,
            "kvrelay.kv.bytes": arrived.bytes,
            "kvrelay.kv.gather_ms": self.gather_s * 1e3,
            "kvrelay.kv.send_ms": self.send_s * 1e3,
            "kvrelay.kv.receive_ms": arrived.receive_s * 1e3,
            "kvrelay.kv.gigabytes_per_second": arrived.bytes / max(self.send_s, 1e-9) / 1e9,
        }


def arrival_of(header: FrameHeader, nbytes: int, receive_s: float, at_ns: int) -> Arrived:
    """The note of one frame of `nbytes` bytes."""
    return Arrived(
        first_message=header.sequence,
        messages=1,
        layers=range(header.layer_start, header.layer_start + header.layer_count),
        tokens=range(header.token_start, header.token_start + header.token_count),
        bytes=nbytes,
        receive_s=receive_s,
        at_ns=at_ns,
    )


def merge(one: Arrived, other: Arrived) -> Arrived:
    """Both together."""
    return Arrived(
        first_message=min(one.first_message, other.first_message),
        messages=one.messages + other.messages,
        layers=_cover(one.layers, other.layers),
        tokens=_cover(one.tokens, other.tokens),
        bytes=one.bytes + other.bytes,
        receive_s=one.receive_s + other.receive_s,
        at_ns=max(one.at_ns, other.at_ns),
    )


def message_events(
    notes: MessageNotes[Arrived], handover: pb.Handover, block_size: int
) -> list[MessageEvent]:
    """What both sides noted, side by side; by message number."""
    sent = handover.gather_seconds_each, handover.send_seconds_each
    return [
        MessageEvent(arrived, _blocks(arrived.tokens, block_size), gather_s, send_s)
        for arrived, gather_s, send_s in zip(notes.in_order, *sent, strict=False)
    ]


def _blocks(tokens: range, block_size: int) -> int:
    return -(-tokens.stop // block_size) - tokens.start // block_size


def _cover(one: range, other: range) -> range:
    return range(min(one.start, other.start), max(one.stop, other.stop))
