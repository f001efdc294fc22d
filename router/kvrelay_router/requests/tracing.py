"""The router's spans of one request: a root, `queue`, and one `place` per attempt.

Workers get the root's context, so their spans are its children whatever becomes of other workers.
Attribute names follow OpenTelemetry's GenAI conventions where those have one. No prompt text.
"""

from opentelemetry.trace import SpanKind, StatusCode

from kvrelay_protocol.errors import KvrelayError
from kvrelay_protocol.telemetry import Telemetry, context_of
from kvrelay_protocol.trace import TraceContext
from kvrelay_router.requests.types import FinishReason, Path, RequestStats, ValidRequest

PROVIDER = "kvrelay"


class RequestTrace:
    """Open from submission to the terminal event."""

    def __init__(self, telemetry: Telemetry, request: ValidRequest) -> None:
        self._telemetry = telemetry
        self._root = telemetry.start_span(
            f"{request.operation} {request.model}",
            parent=TraceContext.parse(request.traceparent),
            kind=SpanKind.SERVER,
            attributes={
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
            },
        )
        self.context = context_of(self._root)
        self._queue = telemetry.start_span("queue", parent=self.context)
        self._queued = True

    @property
    def trace_id(self) -> str:
        return self.context.trace_id.hex()

    def placed(self, path: Path, attempt: int, *, started_ns: int) -> None:
        """Workers were chosen; the search began at `started_ns`."""
        self._leave_queue()
        attributes = _path_attributes(path)
        span = self._telemetry.start_span(
            "place",
            parent=self.context,
            start_ns=started_ns,
            attributes={**attributes, "kvrelay.attempt": attempt},
        )
        span.end()
        self._root.set_attributes(attributes)

    def replaying(self, cause: str, attempt: int, emitted: int) -> None:
        self._root.add_event(
            "replay",
            {"error.type": cause, "kvrelay.attempt": attempt, "kvrelay.emitted_tokens": emitted},
        )

    def finished(self, reason: FinishReason, stats: RequestStats) -> None:
        self._root.set_attributes(
            {
                "gen_ai.response.finish_reasons": (reason.value,),
                "gen_ai.response.time_to_first_chunk": stats.time_to_first_token_s,
                "gen_ai.usage.output_tokens": stats.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": stats.cached_tokens,
                "kvrelay.kv.bytes": stats.kv_bytes,
                "kvrelay.kv.transport": stats.kv_transport,
                "kvrelay.replays": stats.replays,
            },
        )
        self._end()

    def failed(self, error: KvrelayError, emitted: int) -> None:
        self._root.set_attributes(
            {"error.type": error.code, "gen_ai.usage.output_tokens": emitted},
        )
        self._root.set_status(StatusCode.ERROR, error.message)
        self._end()

    def _leave_queue(self) -> None:
        if self._queued:
            self._queued = False
            self._queue.end()

    def _end(self) -> None:
        self._leave_queue()
        self._root.end()


def _path_attributes(path: Path) -> dict[str, str]:
    attributes = {
        "kvrelay.path": path.kind.value,
        "kvrelay.path.reason": path.reason,
        "kvrelay.decode_worker": path.decode_worker,
    }
    if path.prefill_worker is not None:
        attributes["kvrelay.prefill_worker"] = path.prefill_worker
    return attributes
