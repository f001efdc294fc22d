"""OpenTelemetry set-up shared by the router and the workers.

Spans are exported over OTLP only where the standard environment variables name an endpoint
(`OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) and `OTEL_SDK_DISABLED` is
not true; otherwise they are created (ids travel) and dropped.
"""

import os
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.util.types import AttributeValue

from kvrelay_protocol.trace import TraceContext

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def export_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment names a collector."""
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and any(environ.get(name) for name in _ENDPOINTS)


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
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for processor in processors:
            self._provider.add_span_processor(processor)
        if export_enabled():
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            self._provider.add_span_processor(
                BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=500),
            )
        self.tracer = self._provider.get_tracer("kvrelay")

    def start_span(
        self,
        name: str,
        *,
        parent: TraceContext | None,
        kind: SpanKind = SpanKind.INTERNAL,
        start_ns: int | None = None,
        links: Sequence[TraceContext] = (),
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> Span:
        """Begin a span as a child of `parent` (a root where there is none).

        Args:
            start_ns: wall clock in nanoseconds since the epoch; now by default.
            links: spans this one follows from without being their child.
        """
        context = (
            trace.set_span_in_context(NonRecordingSpan(_otel_context(parent))) if parent else None
        )
        return self.tracer.start_span(
            name,
            context=context,
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


def _otel_context(context: TraceContext) -> SpanContext:
    return SpanContext(
        int.from_bytes(context.trace_id, "big"),
        int.from_bytes(context.span_id, "big"),
        is_remote=True,
        trace_flags=TraceFlags(context.flags),
    )
