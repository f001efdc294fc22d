"""The span of a transfer tells what each of its messages carried, and how long every part of it took."""

import time

import pytest
from bare_worker import bench, open_transfer, release, submit_decode, submit_prefill, until
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvrelay_decode.worker import DecodeWorker
from kvrelay_prefill.worker import PrefillWorker
from kvrelay_protocol.telemetry import Telemetry


@pytest.fixture
async def pair():
    """A prefill and a decode worker, and where the latter's spans go."""
    prefill, decode = await bench(PrefillWorker), await bench(DecodeWorker)
    exporter = InMemorySpanExporter()
    decode.worker.telemetry = Telemetry(
        "test", instance="worker", processors=[SimpleSpanProcessor(exporter)]
    )
    yield prefill, decode, exporter
    for made in (prefill, decode):
        made.worker.drop_all("the test ends")
        await made.stopped()
        await made.close()


async def events_of(pair, length, *, message_bytes=0):
    """One prompt handed over; the span of its transfer, and the events in it."""
    prefill, decode, exporter = pair
    decode.worker.handle(submit_decode(1, length))
    prefill.worker.handle(submit_prefill(1, length))
    decode.turn()
    prefill.turn()
    await until(lambda: decode.host.named("lease_granted"))
    granted = decode.host.named("lease_granted")[-1]
    if message_bytes:
        granted.lease.max_message_bytes = message_bytes
    prefill.worker.handle(open_transfer(granted))
    await until(lambda: decode.host.named("kv_received"))
    prefill.worker.handle(release(1))
    (span,) = [s for s in exporter.get_finished_spans() if s.name == "kv_transfer"]
    return span, [dict(event.attributes or {}) for event in span.events]


async def test_every_message_has_its_layers_blocks_bytes_and_times(pair):
    begun = time.time_ns()
    span, events = await events_of(pair, 6)
    (event,) = events
    assert [e.name for e in span.events] == ["kv_message"]
    assert begun <= span.events[0].timestamp <= time.time_ns()
    assert (event["kvrelay.kv.message"], event["kvrelay.kv.messages"]) == (0, 1)
    assert (event["kvrelay.kv.first_layer"], event["kvrelay.kv.layers"]) == (0, 2)
    assert event["kvrelay.kv.blocks"] == 2
    assert 0 < event["kvrelay.kv.bytes"] < span.attributes["kvrelay.kv.bytes"]
    for name in ("gather_ms", "send_ms", "receive_ms", "gigabytes_per_second"):
        assert event[f"kvrelay.kv.{name}"] > 0


async def test_messages_that_are_cut_smaller_have_an_event_each(pair):
    # One block of one layer a message: 160 bytes of header, 64 of payload.
    span, events = await events_of(pair, 56, message_bytes=160 + 64)
    assert span.attributes["kvrelay.kv.messages"] == 2 * 14 + 1
    assert [e["kvrelay.kv.message"] for e in events] == list(range(28))
    assert {e["kvrelay.kv.first_layer"] for e in events} == {0, 1}
    assert [e["kvrelay.kv.bytes"] for e in events] == [160 + 64] * 28
