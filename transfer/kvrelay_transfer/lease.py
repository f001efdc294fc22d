"""The life of one KV hand-over, on both sides, as pure state machines: no I/O, no clock.

```
prefill worker   COMPUTING ──open──► SENDING ──all sent──► SENT ──release──► RELEASED
                     │                  │ ▲                 │
                     │                  │ └────resend───────┘
                     └──────────────────┴──────cancel───────────────────────► RELEASED

decode worker    RESERVED ──posted──► RECEIVING ──complete──► READY ──run──► RUNNING ──► RELEASED
                     │                    └───no progress───► EXPIRED            │
                     └──────────────────── cancel ──────────────────────────────►┘
```

Messages of one transfer share one random tag and arrive in the order sent. The hand-over record comes
last and names how many KV messages there are; the receiver asks for what is missing (a frame whose
digest failed), gets it again followed by the record again, and is complete only on a record with
nothing missing, so no message is left over for the next transfer.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from enum import StrEnum

from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.layout import KvLayout, Piece, WireFormat, split

MAX_RESENDS = 2
"""Rounds of asking again before the receiver computes the prompt itself."""
MAX_QUIET_ASKS = 4
"""Rounds of asking for the record because nothing comes. More, since on a slow link that may be too early."""
MAX_REFUSED_FRAMES = 64
"""Corrupt or foreign frames of one transfer before the link is given up."""


@dataclass(frozen=True, slots=True)
class LeaseId:
    """What every frame must name to be let in. All of it is chosen by the decode worker."""

    lease_id: bytes
    """16 random bytes."""
    epoch: int
    """Incarnation of the decode worker."""
    generation: int
    """Allocation generation of the reserved blocks."""


@dataclass(frozen=True, slots=True)
class OpenLease:
    """A granted lease, as the sender sees it."""

    identity: LeaseId
    tag: int
    address: bytes
    """Transport address of the receiver."""
    first_block: int
    """Logical blocks of the receiver before this one are there already."""
    max_message_bytes: int
    layout: KvLayout
    """Of the receiver's blocks."""
    ticket: bytes = field(repr=False)
    """See `ticket.py`."""

    @property
    def first_token(self) -> int:
        """Positions before this one are at the receiver already."""
        return self.first_block * self.layout.block_size


@dataclass(frozen=True, slots=True)
class KvMessage:
    """One message of blocks; `number` counts from 0 within the transfer."""

    number: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class HandoverMessage:
    """The last message; `total` KV messages came before it."""

    total: int


Outgoing = KvMessage | HandoverMessage


class SendState(StrEnum):
    """Where the sender stands."""

    COMPUTING = "computing"
    SENDING = "sending"
    SENT = "sent"
    RELEASED = "released"


@dataclass(slots=True)
class SendLease:
    """What a prefill worker has computed, sent and still owes for one sequence.

    Args:
        layout: of the blocks that are sent.
    """

    layout: KvLayout
    state: SendState = SendState.COMPUTING
    lease: OpenLease | None = None
    wire: WireFormat | None = None
    """How the KV is written for that lease."""
    _ready: deque[Piece] = field(default_factory=deque)
    _resend: deque[KvMessage] = field(default_factory=deque)
    _numbered: list[KvMessage] = field(default_factory=list)
    _computed: bool = False
    _handover_due: bool = False
    _record_sent: bool = False

    def ready(self, piece: Piece) -> None:
        """KV of these layers of these tokens is written; joined to the piece before it if it can be."""
        last = self._ready[-1] if self._ready else None
        if last and last.layer_end == piece.layer_start and last.tokens == piece.tokens:
            self._ready[-1] = replace(last, layer_count=last.layer_count + piece.layer_count)
        else:
            self._ready.append(piece)

    def open(self, lease: OpenLease) -> None:
        """The decode worker granted the lease; a second grant is ignored.

        Raises:
            LayoutMismatch: its blocks can't hold this KV.
        """
        if self.lease is None and self.state is SendState.COMPUTING:
            self.wire = WireFormat.between(self.layout, lease.layout)
            self.lease = lease
            self.state = SendState.SENDING

    def computed(self) -> None:
        """The first token is sampled: no more segments will come."""
        self._computed = True
        self._handover_due = True

    def resend(self, numbers: list[int]) -> None:
        """The receiver misses these; unknown numbers are ignored, an empty list asks for the record only."""
        if self.state not in (SendState.SENDING, SendState.SENT):
            return
        self._resend.extend(self._numbered[n] for n in numbers if 0 <= n < len(self._numbered))
        if self._record_sent:
            self._handover_due = True
            self.state = SendState.SENDING

    def release(self) -> None:
        """Cancelled, or the receiver has everything: nothing more is owed."""
        self.state = SendState.RELEASED
        self._ready.clear()
        self._resend.clear()

    def next(self) -> Outgoing | None:
        """The next message to send now, or None when there is nothing to send yet."""
        if self.state is not SendState.SENDING or self.lease is None or self.wire is None:
            return None
        if self._resend:
            return self._resend.popleft()
        piece = self._next_piece(self.lease, self.wire)
        if piece is not None:
            message = KvMessage(len(self._numbered), piece)
            self._numbered.append(message)
            return message
        if self._handover_due:
            self._handover_due = False
            self._record_sent = True
            return HandoverMessage(len(self._numbered))
        return None

    def idle(self) -> None:
        """Every message returned by `next` has been sent; SENT once the record was among them."""
        nothing_due = not (self._ready or self._resend or self._handover_due)
        if self.state is SendState.SENDING and self._computed and nothing_due:
            self.state = SendState.SENT

    def _next_piece(self, lease: OpenLease, wire: WireFormat) -> Piece | None:
        while self._ready:
            head = self._ready.popleft()
            pieces = split(
                wire,
                range(head.layer_start, head.layer_end),
                range(max(head.token_start, lease.first_token), head.tokens.stop),
                lease.max_message_bytes - HEADER_SIZE,
            )
            if pieces:
                self._ready.extendleft(reversed(pieces[1:]))
                return pieces[0]
        return None


class ReceiveState(StrEnum):
    """Where the receiver stands."""

    RESERVED = "reserved"
    RECEIVING = "receiving"
    READY = "ready"
    RUNNING = "running"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Missing:
    """Ask the sender for these again (none named: for the record, which tells what is missing)."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Asked often enough: compute the prompt here."""

    reason: str


@dataclass(frozen=True, slots=True)
class Complete:
    """Everything is here and verified."""


@dataclass(frozen=True, slots=True)
class Continue:
    """Wait for the next message."""


Verdict = Continue | Missing | Abandon | Complete


@dataclass(slots=True)
class ReceiveLease:
    """What a decode worker holds for one sequence until it runs."""

    identity: LeaseId
    owed: int
    """Tokens times layers that the sender has to send: those of the prompt that are not here yet."""
    state: ReceiveState = ReceiveState.RESERVED
    resends: int = 0
    corrupt_frames: int = 0
    foreign_frames: int = 0
    """Whole, but not of this lease, tenant, model or prompt."""
    record_in_doubt: bool = False
    """A frame was refused and no record came since: it may have been the record, or stand in for it. Or
    all is sent, and no record came.
    """
    quiet_asks: int = 0
    """How often the record was asked for because nothing came."""
    _asked: tuple[int, ...] = ()
    """What was asked for last, if nothing says yet that it did not come. A record that was under way
    already, or asked for by itself, still names it as missing.
    """
    _received: dict[int, Piece] = field(default_factory=dict)
    """By message number; no two of them overlap."""

    def posted(self) -> None:
        """The first receive is posted: the sender may begin."""
        self._expect(ReceiveState.RESERVED)
        self.state = ReceiveState.RECEIVING

    def kv_message(self, number: int, piece: Piece) -> Continue:
        """Verified message `number` is written to the pool. A repeat changes nothing."""
        self._expect(ReceiveState.RECEIVING)
        self._received.setdefault(number, piece)
        return Continue()

    def overlaps(self, piece: Piece) -> bool:
        """Whether a message brought some of this already. Under another number it would count a second
        time, in the place of KV that never came: those blocks hold what was in them before.
        """
        return any(known.overlaps(piece) for known in self._received.values())

    def has(self, number: int) -> bool:
        """Whether message `number` is verified and in the pool: a repeat must not be written over it."""
        return number in self._received

    def handover(self, total: int) -> Verdict:
        """A verified record: `total` KV messages were sent."""
        self._expect(ReceiveState.RECEIVING)
        self.record_in_doubt = False
        missing = tuple(n for n in range(total) if n not in self._received)
        if missing and missing == self._asked:
            self.record_in_doubt = True
            return Continue()
        if missing:
            return self._ask(missing)
        # Counting messages is not enough: a sender that left a piece out would count without it.
        received = sum(piece.size for piece in self._received.values())
        if received != self.owed:
            return Abandon(f"{received} layers of tokens came, the prompt has {self.owed}")
        self.state = ReceiveState.READY
        return Complete()

    def corrupt(self) -> Verdict:
        """A frame was damaged on its way. Which one it was shows when the record comes."""
        self.corrupt_frames += 1
        return self._refused()

    def foreign(self) -> Verdict:
        """A frame is whole, but somebody else's. Ours may still come: one that a stranger slipped in must
        not end the transfer, and a sender that mixed something up is asked again, then given up.
        """
        self.foreign_frames += 1
        return self._refused()

    def all_sent(self) -> None:
        """The sender says that everything is sent, the record as well."""
        self.record_in_doubt = self.record_in_doubt or self.state is ReceiveState.RECEIVING

    def quiet(self) -> Verdict:
        """Nothing came for a while, and the record is in doubt."""
        self._expect(ReceiveState.RECEIVING)
        self.record_in_doubt = False
        self._asked = ()
        self.quiet_asks += 1
        if self.quiet_asks > MAX_QUIET_ASKS:
            return Abandon(f"no record came, asked for {MAX_QUIET_ASKS} times")
        return Missing(())

    def run(self) -> None:
        self._expect(ReceiveState.READY)
        self.state = ReceiveState.RUNNING

    def expire(self) -> None:
        """No progress within the lease time."""
        self.state = ReceiveState.EXPIRED

    def release(self) -> None:
        self.state = ReceiveState.RELEASED

    def _refused(self) -> Verdict:
        self._expect(ReceiveState.RECEIVING)
        self.record_in_doubt = True
        self._asked = ()
        if self.corrupt_frames + self.foreign_frames > MAX_REFUSED_FRAMES:
            return Abandon(
                f"{self.corrupt_frames} corrupt and {self.foreign_frames} foreign frames"
            )
        return Continue()

    def _ask(self, numbers: tuple[int, ...]) -> Verdict:
        self.resends += 1
        if self.resends > MAX_RESENDS:
            return Abandon(f"{len(numbers)} messages still missing after {MAX_RESENDS} resends")
        self._asked = numbers
        return Missing(numbers)

    def _expect(self, state: ReceiveState) -> None:
        if self.state is not state:
            raise RuntimeError(f"lease is {self.state.value}, this needs {state.value}")
