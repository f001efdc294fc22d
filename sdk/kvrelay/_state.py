"""What one stream has said so far. Written by its flow, read by its caller; does no I/O."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from kvrelay._errors import APITimeoutError, KvrelayClientError, Phase, StreamInterrupted
from kvrelay._events import Event, Finished, Resumed, Started, TextDelta, Usage
from kvrelay._exchange import Head
from kvrelay._types import Final, Timeout, Timings
from kvrelay._wire import ServerError, ServerTimings, with_request_id


@dataclass(frozen=True, slots=True)
class Limits:
    """`Timeout` as points on the monotonic clock; what has no limit lies at infinity."""

    started_at: float
    connect_s: float | None
    first_token_at: float
    idle_s: float
    total_at: float

    @classmethod
    def since(cls, started_at: float, timeout: Timeout) -> "Limits":
        """The limits of a request that starts now."""
        return cls(
            started_at,
            timeout.connect,
            started_at + (timeout.first_token or math.inf),
            timeout.idle or math.inf,
            started_at + (timeout.total or math.inf),
        )

    def answer_by(self, within: Phase, now: float) -> float:
        """Until when an answer must arrive if `within` is what bounds it."""
        first = self.first_token_at if within == "first_token" else math.inf
        idle = now + self.idle_s if within == "idle" else math.inf
        return min(first, idle, self.total_at)

    def passed(
        self, phase: Phase, *, partial: str = "", request_id: str | None = None, to: str = ""
    ) -> APITimeoutError:
        """The error for a limit that passed; `to` names the server where it matters."""
        seconds = {
            "connect": self.connect_s or 0.0,
            "first_token": self.first_token_at - self.started_at,
            "idle": self.idle_s,
            "total": self.total_at - self.started_at,
        }[phase]
        waited_for = f"{_WAITED_FOR[phase]} to {to}" if to else _WAITED_FOR[phase]
        message = f"{waited_for} within {seconds:g} s (Timeout.{phase})"
        return APITimeoutError(with_request_id(message, request_id), phase=phase, partial=partial)


_WAITED_FOR: Mapping[Phase, str] = {
    "connect": "no connection",
    "first_token": "no text arrived",
    "idle": "the server fell silent: no bytes",
    "total": "the answer was not complete",
}


class StreamState:
    """Folds a stream's events into its snapshot, timings and result."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.request_id: str | None = None
        self.trace_id: str | None = None
        self.retries = 0
        self.cancelled = False
        self._opened = False
        self.emitted = False
        """Whether the caller has seen an event: from then on nothing is sent again."""
        self.error: KvrelayClientError | None = None
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self._text: list[str] = []
        self._snapshot = ""
        self._arrivals: list[float] = []  # of text, monotonic seconds
        self._started: Started | None = None
        self._resumed = 0
        self._server: Mapping[str, Any] = {}
        self._path: str | None = None  # from the response header

    # --- written by the flow ---

    def opened(self, head: Head) -> bool:
        """Take what the response headers say; True the first time."""
        first, self._opened = not self._opened, True
        self.request_id = head.headers.get("x-request-id")
        self.trace_id = head.headers.get("x-trace-id")
        path = head.headers.get("x-kvrelay-path", "pending").partition(";")[0].strip()
        self._path = None if path == "pending" else path
        return first

    def take(self, event: Event, at: float) -> Event:
        """Fold one event in; returns it as the caller should see it."""
        self.emitted = True
        match event:
            case TextDelta(text=text):
                self._snapshot += text
                self._arrivals.append(at)
                return replace(event, snapshot=self._snapshot)
            case Started():
                self._started = event
            case Resumed():
                self._resumed += 1
            case Usage():
                self.usage = event
            case Finished(reason=reason):
                self.finish_reason = reason
            case _:
                pass
        return event

    def take_timings(self, timings: ServerTimings) -> None:
        """Keep what the server measured."""
        self._server = timings.fields

    # --- what the flow decides by ---

    @property
    def started_answering(self) -> bool:
        """Whether the limit for the first token is met."""
        return bool(self._arrivals) or self.finish_reason is not None

    def read_deadline(self, now: float) -> float:
        """Until when the next bytes must arrive."""
        first = math.inf if self.started_answering else self.limits.first_token_at
        return min(now + self.limits.idle_s, first, self.limits.total_at)

    def overdue(self, now: float) -> Phase | None:
        """The limit that passed although bytes keep coming."""
        if now >= self.limits.total_at:
            return "total"
        if not self.started_answering and now >= self.limits.first_token_at:
            return "first_token"
        return None

    # --- failures ---

    def timed_out(self, now: float) -> APITimeoutError:
        """The error after waiting in vain until now."""
        phase = self.overdue(now) or "idle"
        return self.limits.passed(phase, partial=self._snapshot, request_id=self.request_id)

    def interrupted(self, reason: str, error: ServerError | None = None) -> StreamInterrupted:
        """The error for an answer that broke off."""
        return StreamInterrupted(
            with_request_id(reason, self.request_id),
            partial=self._snapshot,
            code=error.code if error else None,
            type=error.type if error else None,
            param=error.param if error else None,
            request_id=self.request_id,
        )

    # --- read by the caller ---

    @property
    def snapshot(self) -> str:
        """The answer so far."""
        return self._snapshot

    def timings(self) -> Timings:
        """What is known by now."""
        limits, arrivals = self.limits, self._arrivals
        gaps = sorted(b - a for a, b in pairwise(arrivals))
        found = timings_of(self._server, self._started)
        return replace(
            found,
            client_ttft_ms=(arrivals[0] - limits.started_at) * 1e3 if arrivals else None,
            client_itl_p50_ms=_percentile_ms(gaps, 0.50),
            client_itl_p95_ms=_percentile_ms(gaps, 0.95),
            tokens_per_s=found.tokens_per_s or self._measured_rate(),
            path=found.path or self._path,
            replays=max(found.replays, self._resumed),
            retries=self.retries,
        )

    def _measured_rate(self) -> float | None:
        """Tokens per second between first and last text, where the server sent no rate."""
        if self.usage is None or len(self._arrivals) < 2:
            return None
        took = self._arrivals[-1] - self._arrivals[0]
        return (self.usage.completion_tokens - 1) / took if took > 0 else None

    def final(self) -> Final:
        """The complete answer, or the error that says why there is none."""
        if self.error is not None:
            raise self.error
        if self.finish_reason is None:
            raise self.interrupted("the stream was left before the end of the answer")
        return Final(
            text=self._snapshot,
            finish_reason=self.finish_reason,
            usage=self.usage,
            timings=self.timings(),
            trace_id=self.trace_id,
            request_id=self.request_id,
        )


def timings_of(fields: Mapping[str, Any], started: Started | None = None) -> Timings:
    """The server's share of `Timings`; a field of an unexpected type counts as absent."""

    def number(key: str) -> float | None:
        value = fields.get(key)
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if usable and value is not None else None

    def whole(key: str) -> int | None:
        value = number(key)
        return None if value is None or not math.isfinite(value) else int(value)

    def text(key: str) -> str | None:
        value = fields.get(key)
        return value if isinstance(value, str) and value else None

    cached = whole("cached_tokens")
    return Timings(
        queue_ms=number("queue_ms"),
        prefill_ms=number("prefill_ms"),
        kv_transfer_ms=number("kv_transfer_ms"),
        kv_exposed_ms=number("kv_exposed_ms"),
        decode_ms=number("decode_ms"),
        tokens_per_s=number("tokens_per_second"),
        kv_bytes=whole("kv_bytes"),
        kv_transport=text("kv_transport"),
        kv_gbps=number("kv_gbps"),
        path=text("path") or (started.path if started else None),
        reason=text("reason") or (started.reason if started else None),
        prefill_worker=text("prefill_worker") or (started.prefill_worker if started else None),
        decode_worker=text("decode_worker") or (started.decode_worker if started else None),
        cached_tokens=cached
        if cached is not None
        else (started.cached_tokens if started else None),
        replays=whole("replays") or 0,
    )


def _percentile_ms(ordered: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile of sorted seconds, in milliseconds."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1e3


class StreamView:
    """What a stream has said so far. The base of `Stream` and `AsyncStream`."""

    def __init__(self, state: StreamState) -> None:
        self._state = state

    @property
    def snapshot(self) -> str:
        """The answer so far."""
        return self._state.snapshot

    @property
    def timings(self) -> Timings:
        """What is known by now; complete once the stream has ended."""
        return self._state.timings()

    @property
    def request_id(self) -> str | None:
        """The server's name for this request, to quote when something is wrong."""
        return self._state.request_id

    @property
    def trace_id(self) -> str | None:
        """The trace this request is part of."""
        return self._state.trace_id
