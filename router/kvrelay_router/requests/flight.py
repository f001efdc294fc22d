"""One admitted request, from its admission to its terminal event."""

import asyncio

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_router.fleet.worker_link import WorkerLink
from kvrelay_router.requests import actions
from kvrelay_router.requests.machine import RequestMachine
from kvrelay_router.requests.stream import EventStream
from kvrelay_router.requests.tracing import RequestTrace
from kvrelay_router.requests.types import ValidRequest


class Flight:
    """What the service and the placing of requests keep of one."""

    __slots__ = (
        "deadline",
        "find",
        "last_token_at",
        "links",
        "machine",
        "place_timer",
        "received_at",
        "request",
        "search_ns",
        "sequence",
        "sequence_id",
        "stream",
        "trace",
        "traceparent",
        "wait_s",
    )

    def __init__(
        self,
        request: ValidRequest,
        machine: RequestMachine,
        trace: RequestTrace,
        *,
        received_at: float,
    ) -> None:
        self.request = request
        self.machine = machine
        self.trace = trace
        self.traceparent = trace.context.traceparent
        self.received_at = received_at
        self.last_token_at: float | None = None
        self.sequence_id = 0
        """Of the current attempt; 0 between attempts."""
        self.sequence: pb.Sequence | None = None
        """What the workers of the latest attempt were told."""
        self.links: tuple[WorkerLink, ...] = ()
        """Workers of the current attempt."""
        self.find: actions.FindPlace | None = None
        """The search in progress."""
        self.search_ns = 0
        self.deadline: asyncio.TimerHandle | None = None
        self.place_timer: asyncio.TimerHandle | None = None
        self.wait_s = 0.0
        """What that timer was set to."""
        self.stream: EventStream
