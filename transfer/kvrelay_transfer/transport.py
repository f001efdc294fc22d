"""What a KV transport promises, and how one is chosen by URI scheme.

Terms: a *message* is one contiguous buffer; a *tag* is 64 random bits that name one transfer; a
*peer* is the opaque address another transport published over the control plane.
"""

import importlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import parse_qsl, urlsplit

from typing_extensions import Buffer

from kvrelay_protocol.errors import TransferError, TransportMisconfigured

__all__ = [
    "MAX_TAG",
    "Buffer",
    "KVTransport",
    "Receive",
    "TransportStats",
    "Truncated",
    "complete_uri",
    "create_transport",
    "readable_bytes",
    "register_transport",
    "writable_bytes",
]

MAX_TAG = 2**64 - 1


class Truncated(TransferError):
    """The message is longer than the buffer posted for it; nothing was written."""

    code = "truncated"


@dataclass(slots=True)
class TransportStats:
    """Counters since `start`."""

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    bytes_received: int = 0
    peers_lost: int = 0
    cancelled: int = 0
    refused: int = 0
    """Messages nobody had posted a receive for, turned away because the waiting room was full."""
    late: int = 0
    """Messages for transfers that had ended, turned away."""


class Receive(ABC):
    """One posted receive. It owns the right to write to its buffer until it is done."""

    @abstractmethod
    async def wait(self) -> int:
        """Wait for the message; return its length in bytes.

        May be called again, and by several tasks. Cancelling the waiting task leaves the receive
        posted. Whatever this returns or raises, the buffer is no longer written to afterwards.

        Raises:
            PeerLost: the sender went away in the middle of the message. A peer that goes away
                *before* its message arrived is not seen here: the control plane reports it.
            TransferCancelled: `cancel`, `close`, `abort`, or the sender gave up half-way.
            Truncated: the message is longer than the buffer.
        """

    @abstractmethod
    async def cancel(self) -> bool:
        """Withdraw the receive and confirm it.

        Returns:
            True when it was withdrawn: nothing is written to the buffer any more. False when it
            had completed (or failed) before: the buffer is just as free, and `wait` has the outcome.

        A message that is being written is stopped at its next chunk; a peer that does not answer
        within the transport's grace period is dropped as lost, which stops it too.
        """

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the outcome is known and the buffer is free."""


class KVTransport(ABC):
    """Moves contiguous buffers between processes. Owned by one asyncio loop, which calls it.

    Ordering: messages with one tag from one sender are received in the order they were sent.
    Delivery: when `send` returns the bytes have left the buffer; that they arrived is said by the
    receiver, over the control plane.
    """

    scheme: ClassVar[str]
    stats: TransportStats
    chosen: str
    """What the first test at `start` went over, such as "tcp/lo"; `transport_of` has the last word."""

    @property
    @abstractmethod
    def address(self) -> bytes:
        """What a peer needs to reach this transport; valid after `start`, different every start."""

    @abstractmethod
    async def start(self) -> None:
        """Make the transport usable.

        Raises:
            TransportMisconfigured: the environment leaves no usable transport; the message names
                the variable, its value and the fix. Within seconds, never a hang.
        """

    @abstractmethod
    def connect(self, peer: bytes) -> None:
        """Begin to connect, so that the first message finds the way open. Never waits; a peer that
        can't be reached is reported by `send`.
        """

    @abstractmethod
    async def send(self, peer: bytes, tag: int, buffer: Buffer) -> None:
        """Send one message; return when `buffer` may be reused.

        Cancelling the awaiting task cancels the message; the cancel is confirmed (the buffer is
        free) before `CancelledError` propagates. A cancel may come too late to keep the message
        from arriving whole.

        Raises:
            PeerLost: the peer is unreachable or went away. The next send connects anew.
            TransferCancelled: the receiver stopped or refused the message, or the transport was
                closed.
        """

    @abstractmethod
    def receive(self, tag: int, buffer: Buffer) -> Receive:
        """Post a receive at once; it takes the first message with this tag."""

    @abstractmethod
    def end(self, tag: int) -> None:
        """No receive will be posted for this tag again: messages that wait for one, or still come, are
        turned away. Without this the late messages of cancelled transfers would fill the waiting room.
        """

    @abstractmethod
    def transport_of(self, peer: bytes) -> str:
        """What really carries messages to `peer`, such as "tcp/lo" or "inproc"; "" before use."""

    @abstractmethod
    async def close(self) -> None:
        """Let sends finish and reach their peers (bounded), cancel receives, free everything."""

    @abstractmethod
    async def abort(self) -> None:
        """Free everything at once; whatever is under way fails on both sides."""


def readable_bytes(buffer: Buffer) -> memoryview:
    """`buffer` as contiguous bytes, without a copy.

    Raises:
        ValueError: it is not C-contiguous.
    """
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("a message must be one C-contiguous buffer")
    return view.cast("B") if view.nbytes else memoryview(b"")


def writable_bytes(buffer: Buffer) -> memoryview:
    """`buffer` as contiguous writable bytes, without a copy.

    Raises:
        ValueError: it is read-only or not C-contiguous.
    """
    view = memoryview(buffer)
    if view.readonly:
        raise ValueError("a receive needs a writable buffer")
    return readable_bytes(view) if view.nbytes else memoryview(bytearray())


# Scheme -> (module, class). Imported when first asked for: `ucx` loads native libraries.
_SCHEMES = {
    "ucx": ("kvrelay_transfer.ucx", "UcxTransport"),
    "inproc": ("kvrelay_transfer.inproc", "InprocTransport"),
}


def register_transport(scheme: str, module: str, name: str) -> None:
    """Let `create_transport` build the class `name` of `module` for a scheme, in the place of any other.

    The class is a `KVTransport` with a `from_options(mapping)` of its own.
    """
    _SCHEMES[scheme] = (module, name)


def complete_uri(transport: str) -> str:
    """The URI of a transport that may be named by its scheme alone."""
    return transport if "://" in transport else f"{transport}://"


def create_transport(uri: str) -> KVTransport:
    """Build the transport a URI names; it is not started yet.

    `inproc://`, or `ucx://` with the options of `UcxOptions` as a query:
    `ucx://?tls=tcp&devices=eth0`.

    Raises:
        TransportMisconfigured: unknown scheme, unknown or malformed option, or a package that is
            not installed.
    """
    parts = urlsplit(uri)
    if parts.scheme not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in sorted(_SCHEMES))
        raise TransportMisconfigured(f"no transport for {uri!r}; known: {known}")
    module, name = _SCHEMES[parts.scheme]
    try:
        built = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise TransportMisconfigured(
            f"{parts.scheme}:// needs a package that does not load here ({error}); "
            f"install kvrelay[worker] for Python {sys.version_info[0]}.{sys.version_info[1]}"
        ) from error
    transport: KVTransport = built.from_options(dict(parse_qsl(parts.query, strict_parsing=False)))
    return transport
