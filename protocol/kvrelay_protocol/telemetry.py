"""OpenTelemetry set-up shared by the router and the workers.

Spans are exported over OTLP only where the standard environment variables name an endpoint
(`OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) and `OTEL_SDK_DISABLED` is
not true; otherwise they are created (ids travel) and dropped.
"""

import os
import threading
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.util.types import AttributeValue

from kvrelay_protocol.trace import TraceContext

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def export_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment names a collector."""
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and any(environ.get(name) for name in _ENDPOINTS)


class _Ids(RandomIdGenerator):
    """Random ids, but for a span whose identity was given out before it is made."""

    def __init__(self) -> None:
        self._next = threading.local()

    def use(self, identity: TraceContext) -> None:
        """The next span of this thread is this one."""
        self._next.identity = identity

    def generate_span_id(self) -> int:
        identity = self._take()
        return int.from_bytes(identity.span_id, "big") if identity else super().generate_span_id()

    def generate_trace_id(self) -> int:
        # Asked for first, and only for spans without a parent.
        identity: TraceContext | None = getattr(self._next, "identity", None)
        return int.from_bytes(identity.trace_id, "big") if identity else super().generate_trace_id()

    def _take(self) -> TraceContext | None:
        identity: TraceContext | None = getattr(self._next, "identity", None)
        self._next.identity = None
        return identity


class Telemetry:
    """The tracer of one process. Owns its provider; `shutdown` flushes what is pending."""

    def __init__(
        self,
        service: str,
        *,
        instance: str,
        processors: Sequence[SpanProcessor] = (),
    ) -> None:
        resource = Resource.create(
            {
                "service.namespace": "kvrelay",
                "service.name": service,
                "service.instance.id": instance,
            },
        )
        self._ids = _Ids()
        self._provider = TracerProvider(
            resource=resource, shutdown_on_exit=False, id_generator=self._ids
        )
        self.recording = bool(processors) or export_enabled()
        """Whether anybody gets to see the spans."""
        for processor in processors:
            self._provider.add_span_processor(processor)
        if export_enabled():
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            self._provider.add_span_processor(
                BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=500),
            )
        self.tracer = self._provider.get_tracer("kvrelay")

    def identify(self, name: str, parent: TraceContext | None) -> TraceContext:
        """The identity of a span to be made later, when what is in it is known.

        Whether it is sampled is decided here, as its children elsewhere begin earlier than it is made.
        """
        new = TraceContext.new()
        trace_id, flags = (parent.trace_id, parent.flags) if parent else (new.trace_id, new.flags)
        if self.recording:
            decision = self._provider.sampler.should_sample(
                _parent_context(parent), int.from_bytes(trace_id, "big"), name
            ).decision
            flags = (flags & ~1) | (decision is Decision.RECORD_AND_SAMPLE)
        return TraceContext(trace_id, new.span_id, flags)

    def start_span(
        self,
        name: str,
        *,
        parent: TraceContext | None,
        identity: TraceContext | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        start_ns: int | None = None,
        links: Sequence[TraceContext] = (),
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> Span:
        """Begin a span as a child of `parent` (a root where there is none).

        Args:
            identity: what `identify` gave; a new one by default.
            start_ns: wall clock in nanoseconds since the epoch; now by default.
            links: spans this one follows from without being their child.
        """
        if identity is not None:
            self._ids.use(identity)
        return self.tracer.start_span(
            name,
            context=_parent_context(parent),
            kind=kind,
            start_time=start_ns,
            links=[Link(_otel_context(link)) for link in links],
            attributes=attributes,
        )

    def shutdown(self) -> None:
        """Export what is pending, then stop; bounded by the exporter's own timeout."""
        self._provider.shutdown()


def context_of(span: Span) -> TraceContext:
    """The span as a parent for others."""
    context = span.get_span_context()
    return TraceContext(
        context.trace_id.to_bytes(16, "big"),
        context.span_id.to_bytes(8, "big"),
        int(context.trace_flags),
    )


def _parent_context(parent: TraceContext | None) -> Context | None:
    return trace.set_span_in_context(NonRecordingSpan(_otel_context(parent))) if parent else None


def _otel_context(context: TraceContext) -> SpanContext:
    return SpanContext(
        int.from_bytes(context.trace_id, "big"),
        int.from_bytes(context.span_id, "big"),
        is_remote=True,
        trace_flags=TraceFlags(context.flags),
    )
