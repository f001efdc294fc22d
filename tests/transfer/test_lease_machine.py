"""Both halves of a lease under any order of events: one is complete only with every token of every layer.

`KVRELAY_EXAMPLES=20` runs twenty times as many examples.
"""

import os
from collections import deque
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.layout import KvLayout, Piece
from kvrelay_transfer.lease import (
    MAX_QUIET_ASKS,
    MAX_REFUSED_FRAMES,
    MAX_RESENDS,
    Abandon,
    Complete,
    HandoverMessage,
    KvMessage,
    LeaseId,
    Missing,
    OpenLease,
    Outgoing,
    ReceiveLease,
    ReceiveState,
    SendLease,
    SendState,
    Verdict,
)

EXAMPLES = int(os.environ.get("KVRELAY_EXAMPLES", "1"))
LAYERS, BLOCK, HEADS = 3, 4, 2
LAYOUT = KvLayout("m", "float32", BLOCK, LAYERS, HEADS, 8)
FATES = ("whole", "whole", "whole", "corrupt", "foreign", "lost")
IDENTITY = LeaseId(bytes(16), 1, 1)


class Leases(RuleBasedStateMachine):
    """A prompt is computed, sent and received; `wire` keeps the order of what was sent."""

    @initialize(
        tokens=st.integers(1, 30), first_block=st.integers(0, 7), per_message=st.integers(1, 9)
    )
    def start(self, tokens: int, first_block: int, per_message: int) -> None:
        self.tokens = tokens
        self.first = min(first_block, tokens // BLOCK) * BLOCK
        self.computed_to = 0
        nbytes = HEADER_SIZE + per_message * LAYOUT.layer_block_bytes
        self.lease = OpenLease(
            IDENTITY, 1, b"d", self.first // BLOCK, nbytes, LAYOUT, ticket=bytes(32)
        )
        self.sender = SendLease(LAYOUT)
        self.receiver = ReceiveLease(IDENTITY, LAYERS * (tokens - self.first))
        self.wire: deque[Outgoing] = deque()
        self.past: list[Outgoing] = []
        self.written: dict[tuple[int, int], int] = {}
        """By layer and token: the message that brought it."""
        self.verdict: Verdict | None = None
        self.over = False

    # ---- the sender

    @precondition(lambda self: self.computed_to < self.tokens)
    @rule(chunk=st.integers(1, 3), split=st.booleans())
    def compute(self, chunk: int, split: bool) -> None:
        """The next whole blocks, layer by layer or all layers at once."""
        end = min(self.computed_to + chunk * BLOCK, self.tokens)
        count = end - self.computed_to
        for layer in range(0, LAYERS, 1 if split else LAYERS):
            self.sender.ready(Piece(layer, 1 if split else LAYERS, self.computed_to, count))
        self.computed_to = end
        if end == self.tokens:
            self.sender.computed()

    @precondition(lambda self: self.receiver.state is ReceiveState.RESERVED)
    @rule()
    def post(self) -> None:
        self.receiver.posted()

    @precondition(lambda self: self.receiver.state is not ReceiveState.RESERVED)
    @rule(other=st.booleans())
    def grant(self, other: bool) -> None:
        """The first grant counts, whatever a second one says, and none wakes a released sender."""
        first, state = self.sender.lease, self.sender.state
        self.sender.open(replace(self.lease, tag=2) if other and first else self.lease)
        if first is not None or state is SendState.RELEASED:
            assert (self.sender.lease, self.sender.state) == (first, state)

    @rule(count=st.integers(1, 4))
    def send(self, count: int) -> None:
        for _ in range(count):
            message = self.sender.next()
            if message is None:
                self.sender.idle()
                return
            self.wire.append(message)

    @rule(numbers=st.lists(st.integers(-1, 40), max_size=4))
    def late_resend(self, numbers: list[int]) -> None:
        """What somebody once missed; unknown numbers among it."""
        self.sender.resend(numbers)

    # ---- the way

    @precondition(lambda self: self.receiver.state is ReceiveState.RECEIVING)
    @rule(fates=st.lists(st.sampled_from(FATES), min_size=1, max_size=8))
    def flow(self, fates: list[str]) -> None:
        """Messages are sent and come, one by one, each with its fate."""
        for fate in fates:
            self.send(1)
            if not self.wire or not self.receiving:
                return
            message = self.wire.popleft()
            match fate:
                case "corrupt" | "foreign":
                    self.past.append(message)
                    self.judge(getattr(self.receiver, fate)())
                case "lost" if isinstance(message, KvMessage):
                    self.past.append(message)
                case _:
                    self.take(message)

    @precondition(lambda self: self.past and self.receiving)
    @rule(which=st.integers(0, 30))
    def replay(self, which: int) -> None:
        self.take(self.past[which % len(self.past)])

    @precondition(lambda self: self.receiving and self.receiver.record_in_doubt)
    @rule()
    def quiet(self) -> None:
        self.judge(self.receiver.quiet())

    # ---- the end

    @rule(which=st.integers(0, 30))
    def give_up(self, which: int) -> None:
        """Cancelled, expired or released, on either side; seldom."""
        match which:
            case 0:
                self.sender.release()
            case 1 if self.receiving:
                self.receiver.expire()
            case 2:
                self.receiver.release()
            case _:
                pass

    @property
    def receiving(self) -> bool:
        return self.receiver.state is ReceiveState.RECEIVING and not self.over

    def take(self, message: Outgoing) -> None:
        """As the receiver does with a verified frame."""
        self.past.append(message)
        if isinstance(message, HandoverMessage):
            self.judge(self.receiver.handover(message.total))
            return
        if not self.receiver.has(message.number):
            assert not self.receiver.overlaps(message.piece)
            self.write(message)
        self.judge(self.receiver.kv_message(message.number, message.piece))

    def write(self, message: KvMessage) -> None:
        piece = message.piece
        for layer in range(piece.layer_start, piece.layer_end):
            for token in piece.tokens:
                assert (layer, token) not in self.written
                assert self.first <= token < self.computed_to
                self.written[layer, token] = message.number

    def judge(self, verdict: Verdict) -> None:
        match verdict:
            case Missing(numbers):
                self.sender.resend(list(numbers))
            case Abandon():
                refused = self.receiver.corrupt_frames + self.receiver.foreign_frames
                asked = self.receiver.resends > MAX_RESENDS
                asked = asked or self.receiver.quiet_asks > MAX_QUIET_ASKS
                assert asked or refused > MAX_REFUSED_FRAMES
                self.over = True
            case Complete():
                self.sender.release()
                assert self.sender.state is SendState.RELEASED
                assert len(self.written) == LAYERS * (self.tokens - self.first)

    # ---- what must hold

    @invariant()
    def ready_means_everything_is_here(self) -> None:
        if self.receiver.state in (ReceiveState.READY, ReceiveState.RUNNING):
            cells = {(la, t) for la in range(LAYERS) for t in range(self.first, self.tokens)}
            assert self.written.keys() == cells

    @invariant()
    def a_released_sender_owes_nothing(self) -> None:
        if self.sender.state is SendState.RELEASED:
            assert self.sender.next() is None

    @invariant()
    def nothing_is_sent_without_a_grant(self) -> None:
        if self.sender.state is SendState.COMPUTING:
            assert not self.wire

    def teardown(self) -> None:
        """Undisturbed from here on, a live transfer completes; unless it was asked again too often."""
        if not hasattr(self, "sender") or self.sender.state is SendState.RELEASED:
            return
        while self.computed_to < self.tokens:
            self.compute(3, split=False)
        if self.receiver.state is ReceiveState.RESERVED:
            self.post()
        if self.receiver.state is not ReceiveState.RECEIVING:
            return
        self.grant(other=False)
        for _ in range(400):
            if not self.receiving:
                break
            self.send(4)
            if self.wire:
                self.take(self.wire.popleft())
            elif self.receiver.record_in_doubt:
                self.quiet()
        assert self.over or self.receiver.state is ReceiveState.READY


TestLeases = Leases.TestCase
TestLeases.settings = settings(
    max_examples=60 * EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    derandomize=EXAMPLES == 1,
    suppress_health_check=list(HealthCheck),  # a busy machine is not a finding
)
