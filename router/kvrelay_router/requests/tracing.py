"""The router's spans of one request: a root, `queue`, and one `place` per attempt.

While the request runs its story is only noted down; the spans are made at its end, and not at all where
nobody would see them. Workers get the root's context, so their spans are its children whatever becomes
of other workers. Attribute names follow OpenTelemetry's GenAI conventions where those have one. No
prompt text.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.util.types import AttributeValue

from kvrelay_protocol.errors import KvrelayError
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_protocol.trace import TraceContext
from kvrelay_router.requests.types import FinishReason, Path, RequestStats, ValidRequest

PROVIDER = "kvrelay"


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    attempt: int
    began_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class _Replay:
    cause: str
    attempt: int
    emitted: int
    at_ns: int


class RequestTrace:
    """Open from submission to the terminal event. Times in nanoseconds of the wall clock."""

    def __init__(self, telemetry: Telemetry, request: ValidRequest) -> None:
        self._telemetry = telemetry
        self._request = request
        self._name = f"{request.operation} {request.model}"
        self._parent = TraceContext.parse(request.traceparent)
        self.context = telemetry.identify(self._name, self._parent)
        self._seen = telemetry.recording and bool(self.context.flags & 1)
        self._began_ns = time.time_ns()
        self._cold_start = ""
        self._places: list[_Place] = []
        self._replays: list[_Replay] = []

    @property
    def trace_id(self) -> str:
        return self.context.trace_id.hex()

    def cold_start(self, phase: str) -> None:
        """It waits for a worker that starts or wakes up; the first phase it heard of counts."""
        self._cold_start = self._cold_start or phase

    def placed(self, path: Path, attempt: int, *, started_ns: int) -> None:
        """Workers were chosen; the search began at `started_ns`."""
        if self._seen:
            self._places.append(_Place(path, attempt, started_ns, time.time_ns()))

    def replaying(self, cause: str, attempt: int, emitted: int) -> None:
        if self._seen:
            self._replays.append(_Replay(cause, attempt, emitted, time.time_ns()))

    def finished(self, reason: FinishReason, stats: RequestStats) -> None:
        if not self._seen:
            return
        end: dict[str, AttributeValue] = {
            "gen_ai.response.finish_reasons": (reason.value,),
            "gen_ai.response.time_to_first_chunk": stats.time_to_first_token_s,
            "gen_ai.usage.output_tokens": stats.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": stats.cached_tokens,
            "kvrelay.kv.bytes": stats.kv_bytes,
            "kvrelay.kv.transport": stats.kv_transport,
            "kvrelay.replays": stats.replays,
        }
        self._make_spans(end)

    def failed(self, error: KvrelayError, emitted: int) -> None:
        if self._seen:
            end: dict[str, AttributeValue] = {
                "error.type": error.code,
                "gen_ai.usage.output_tokens": emitted,
            }
            self._make_spans(end, error.message)

    def _make_spans(self, end: Mapping[str, AttributeValue], failure: str | None = None) -> None:
        ended_ns = time.time_ns()
        root = self._telemetry.start_span(
            self._name,
            parent=self._parent,
            identity=self.context,
            kind=SpanKind.SERVER,
            start_ns=self._began_ns,
            attributes={**self._asked(), **self._last_path(), **end},
        )
        for replay in self._replays:
            root.add_event(
                "replay",
                {
                    "error.type": replay.cause,
                    "kvrelay.attempt": replay.attempt,
                    "kvrelay.emitted_tokens": replay.emitted,
                },
                replay.at_ns,
            )
        if failure is not None:
            root.set_status(StatusCode.ERROR, failure)
        self._make_children(ended_ns)
        root.end(ended_ns)

    def _make_children(self, ended_ns: int) -> None:
        queue = self._telemetry.start_span(
            "queue",
            parent=self.context,
            start_ns=self._began_ns,
            attributes={"kvrelay.cold_start": self._cold_start} if self._cold_start else {},
        )
        queue.end(self._places[0].ended_ns if self._places else ended_ns)
        for place in self._places:
            span = self._telemetry.start_span(
                "place",
                parent=self.context,
                start_ns=place.began_ns,
                attributes={**_path_attributes(place.path), "kvrelay.attempt": place.attempt},
            )
            span.end(place.ended_ns)

    def _asked(self) -> dict[str, AttributeValue]:
        request = self._request
        return {
            "gen_ai.operation.name": request.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": request.model,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": request.sampling.temperature,
            "gen_ai.request.top_p": request.sampling.top_p,
            "gen_ai.request.top_k": request.sampling.top_k,
            "gen_ai.response.id": request.request_id,
            "gen_ai.response.model": request.model,
            "gen_ai.usage.input_tokens": len(request.prompt_tokens),
        }

    def _last_path(self) -> dict[str, str]:
        return _path_attributes(self._places[-1].path) if self._places else {}


def _path_attributes(path: Path) -> dict[str, str]:
    attributes = {
        "kvrelay.path": path.kind.value,
        "kvrelay.path.reason": path.reason,
        "kvrelay.decode_worker": path.decode_worker,
    }
    if path.prefill_worker is not None:
        attributes["kvrelay.prefill_worker"] = path.prefill_worker
    return attributes
