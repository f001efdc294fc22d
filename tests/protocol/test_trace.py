import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvrelay_protocol.telemetry import Telemetry, context_of, export_enabled
from kvrelay_protocol.trace import PACKED_SIZE, TraceContext

VALID = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@given(
    st.binary(min_size=16, max_size=16).filter(any),
    st.binary(min_size=8, max_size=8).filter(any),
    st.integers(0, 255),
)
def test_both_forms_carry_the_same_context(trace_id, span_id, flags):
    context = TraceContext(trace_id, span_id, flags)
    assert TraceContext.parse(context.traceparent) == context
    assert len(context.pack()) == PACKED_SIZE
    assert TraceContext.unpack(context.pack()) == context


@pytest.mark.parametrize(
    "value",
    [None, "", "00", VALID.upper(), VALID[:-1], VALID + "0", VALID.replace("0af7", "zzzz"),
     "00-" + "0" * 32 + "-b7ad6b7169203331-01", "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01"],
)  # fmt: skip
def test_a_malformed_header_is_no_context(value):
    assert TraceContext.parse(value) is None


def test_a_packed_context_has_one_size():
    with pytest.raises(ValueError, match="25 bytes"):
        TraceContext.unpack(b"short")


def test_a_child_span_has_the_callers_trace_and_parent():
    exporter = InMemorySpanExporter()
    telemetry = Telemetry("t", instance="i", processors=[SimpleSpanProcessor(exporter)])
    caller = TraceContext.parse(VALID)
    link = TraceContext.new()
    child = telemetry.start_span("child", parent=caller, links=[link])
    grandchild = telemetry.start_span("grandchild", parent=context_of(child))
    root = telemetry.start_span("root", parent=None)
    for span in (grandchild, child, root):
        span.end()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans["child"].context.trace_id == int.from_bytes(caller.trace_id, "big")
    assert spans["child"].parent.span_id == int.from_bytes(caller.span_id, "big")
    assert spans["child"].links[0].context.span_id == int.from_bytes(link.span_id, "big")
    assert spans["grandchild"].parent.span_id == spans["child"].context.span_id
    assert spans["root"].parent is None
    telemetry.shutdown()


def test_spans_are_exported_only_where_the_environment_names_a_collector():
    assert not export_enabled({})
    assert export_enabled({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
    assert export_enabled({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"})
    disabled = {"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_SDK_DISABLED": "true"}
    assert not export_enabled(disabled)
