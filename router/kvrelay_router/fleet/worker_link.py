"""One joined worker: what it said about itself, what it was sent, and the way to send it more."""

import asyncio
import math

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.incoming import Incoming
from kvrelay_protocol.outgoing import Outgoing
from kvrelay_router.fleet.slumber import Slumber
from kvrelay_router.requests.placement import Role, WorkerState, blocks_needed

OUTGOING_LIMIT = 4096
"""Messages that may wait for one worker; one more and it counts as lost."""


class PendingWork:
    """What the router has put on a worker that the worker's last report can't contain.

    ```
    dispatched ──► granted (the worker holds blocks for it) ──► contained in the next report
         └────────────── gone (finished, failed, cancelled) ──────────────┘
    ```
    """

    def __init__(self) -> None:
        self._dispatched: dict[int, tuple[int, int]] = {}
        self._granted: dict[int, tuple[int, int]] = {}
        self.blocks = 0
        self.tokens = 0

    @property
    def ungranted(self) -> int:
        return len(self._dispatched)

    def dispatch(self, sequence_id: int, *, blocks: int, tokens: int) -> None:
        self._dispatched[sequence_id] = (blocks, tokens)
        self.blocks += blocks
        self.tokens += tokens

    def grant(self, sequence_id: int) -> bool:
        """Returns whether the sequence was waiting for it."""
        size = self._dispatched.pop(sequence_id, None)
        if size is None:
            return False
        self._granted[sequence_id] = size
        return True

    def gone(self, sequence_id: int) -> None:
        size = self._dispatched.pop(sequence_id, None) or self._granted.pop(sequence_id, None)
        if size:
            self._subtract(size)

    def reported(self) -> None:
        """A report arrived: what was granted before it is contained in it."""
        for size in self._granted.values():
            self._subtract(size)
        self._granted.clear()

    def _subtract(self, size: tuple[int, int]) -> None:
        self.blocks -= size[0]
        self.tokens -= size[1]


def role_of(role: pb.Role) -> Role:
    """The role of a worker whose hello was checked."""
    return Role.PREFILL if role == pb.ROLE_PREFILL else Role.DECODE


class WorkerLink:
    """Owned by the registry. Dropping it (`WorkerRegistry.lose`) ends the Join call that feeds it."""

    def __init__(self, hello: pb.Hello, *, now: float) -> None:
        self.name = hello.worker_name
        self.incarnation = hello.incarnation
        self.role = role_of(hello.role)
        self.model = hello.model
        self.kv_layout = hello.kv_layout
        self.transport = hello.transport
        self.transport_address = hello.transport_address
        self.protocol_version = hello.protocol_version
        self.software_version = hello.software_version
        self.max_model_len = hello.max_model_len
        self.device = hello.device
        self.weights_id = hello.weights_id
        """Of the weights that it can send to others; empty: none."""
        self.load = hello.load
        self.draining = False
        self.slumber = Slumber(asleep=hello.asleep)
        self.last_seen = now
        self.progress_at = now
        """When it last reported to have computed prompt tokens, or to have none to compute."""
        self.pending = PendingWork()
        self.attempts: set[int] = set()
        """Sequences submitted to it whose attempt is in progress; some it may hold no more."""
        self.incoming: Incoming[pb.WorkerMessage] = Incoming()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolved, with the reason, by the registry alone."""
        self.overflowed = False
        self._outgoing = Outgoing(pb.RouterMessage, OUTGOING_LIMIT)

    @property
    def awake(self) -> bool:
        """It can be given work, or could if it were not draining."""
        return self.slumber.awake

    def send(self, message: pb.RouterMessage) -> bool:
        """Put a message in line; never waits.

        Returns:
            Whether there was room. Where there was none, the worker must be given up.
        """
        if self._outgoing.put(message):
            return True
        self.overflowed = True
        return False

    async def next_outgoing(self) -> pb.RouterMessage | None:
        """What is to be written next: one message, or a batch of those in line."""
        return await self._outgoing.next()

    def dispatch(self, sequence_id: int, tokens: int) -> None:
        """Account for a sequence that was just submitted."""
        blocks = blocks_needed(tokens, self.block_size)
        self.pending.dispatch(sequence_id, blocks=blocks, tokens=tokens)
        self.attempts.add(sequence_id)

    def leave(self, sequence_id: int) -> None:
        """The attempt is over."""
        self.pending.gone(sequence_id)
        self.attempts.discard(sequence_id)

    def report(self, load: pb.Load, *, now: float) -> None:
        if load.computed_tokens > self.load.computed_tokens or not load.backlog_tokens:
            self.progress_at = now
        self.load = load
        self.pending.reported()

    @property
    def block_size(self) -> int:
        return max(1, self.kv_layout.block_size)

    def state(self, *, quiet_since: float = -math.inf) -> WorkerState:
        """What placement needs to know, as of now. Quiet is who was last heard before that moment."""
        load = self.load
        return WorkerState(
            name=self.name,
            role=self.role,
            block_size=self.block_size,
            total_blocks=load.total_blocks,
            available_blocks=load.free_blocks + load.cached_blocks,
            running=load.running,
            waiting=load.waiting,
            backlog_tokens=load.backlog_tokens,
            tokens_per_second=load.prefill_tokens_per_second,
            pending_blocks=self.pending.blocks,
            pending_tokens=self.pending.tokens,
            ungranted=self.pending.ungranted,
            draining=self.draining or self.overflowed,
            quiet=self.last_seen < quiet_since,
        )
