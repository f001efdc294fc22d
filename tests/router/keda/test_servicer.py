"""What a ScaledObject may ask, and what it is told when it asks wrongly."""

import asyncio

import grpc
import grpc.aio
import pytest
from scaling_doubles import MODEL

from kvrelay_protocol import externalscaler_pb2 as pb
from kvrelay_protocol.errors import PortInUse
from kvrelay_protocol.externalscaler_pb2_grpc import ExternalScalerStub
from kvrelay_router.keda import create_scaler_server


@pytest.fixture
async def scaler(server):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield ExternalScalerStub(channel)


def ref(pool: str = "decode", model: str = MODEL) -> pb.ScaledObjectRef:
    metadata = {"pool": pool, "model": model, "scalerAddress": "router:8002"}
    return pb.ScaledObjectRef(name="decode", namespace="llm", scalerMetadata=metadata)


def test_the_wire_is_kedas():
    # Encoded by hand after KEDA's proto: field numbers and types, not our stubs, are the contract.
    [entry] = [b"\x0a\x04pool\x12\x06decode"]
    wire = b"\x0a\x03obj\x12\x02ns\x1a" + bytes([len(entry)]) + entry
    parsed = pb.ScaledObjectRef.FromString(wire)
    assert (parsed.name, parsed.namespace, dict(parsed.scalerMetadata)) == (
        "obj",
        "ns",
        {"pool": "decode"},
    )
    assert pb.IsActiveResponse(result=True).SerializeToString() == b"\x08\x01"
    two = b"\x11\x00\x00\x00\x00\x00\x00\x00\x40"[1:]
    value = pb.MetricValue(metricName="m", metricValue=2, metricValueFloat=2.0)
    assert value.SerializeToString() == b"\x0a\x01m\x10\x02\x19" + two
    spec = pb.MetricSpec(metricName="m", targetSize=2, targetSizeFloat=2.0)
    assert spec.SerializeToString() == b"\x0a\x01m\x10\x02\x19" + two
    request = pb.GetMetricsRequest(scaledObjectRef=pb.ScaledObjectRef(name="o"), metricName="m")
    assert request.SerializeToString() == b"\x0a\x03\x0a\x01o\x12\x01m"
    methods = pb.DESCRIPTOR.services_by_name["ExternalScaler"]
    assert methods.full_name == "externalscaler.ExternalScaler"
    assert [(m.name, m.server_streaming) for m in methods.methods] == [
        ("IsActive", False),
        ("StreamIsActive", True),
        ("GetMetricSpec", False),
        ("GetMetrics", False),
    ]


async def test_the_metric_is_the_target_and_one_worker_is_worth_one(scaler, source):
    source.want(decode=3, prefill=0)
    [spec] = (await scaler.GetMetricSpec(ref())).metricSpecs
    assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == (
        "kvrelay-decode-replicas",
        1,
        1.0,
    )
    for pool, wanted in (("decode", 3), ("prefill", 0)):
        request = pb.GetMetricsRequest(
            scaledObjectRef=ref(pool), metricName=f"kvrelay-{pool}-replicas"
        )
        [value] = (await scaler.GetMetrics(request)).metricValues
        assert (value.metricValue, value.metricValueFloat) == (wanted, float(wanted))
        assert (await scaler.IsActive(ref(pool))).result is (wanted > 0)


async def test_a_stream_tells_the_state_at_once_and_then_every_change(scaler, source):
    stream = scaler.StreamIsActive(ref())
    assert not (await stream.read()).result
    for active in (True, False, True):
        source.want(decode=int(active))
        assert (await stream.read()).result is active
    source.want(decode=2)  # active already
    source.want(decode=0)
    assert not (await stream.read()).result
    stream.cancel()


async def test_a_stream_that_ends_leaves_nobody_waiting(scaler, source):
    stream = scaler.StreamIsActive(ref())
    await stream.read()
    async with asyncio.timeout(60):
        while not source._waiting:
            await asyncio.sleep(0)
        stream.cancel()
        while source._waiting:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("asked", "code", "text"),
    [
        (ref(pool="gpu"), grpc.StatusCode.INVALID_ARGUMENT,
         "ScaledObject llm/decode: metadata.pool is 'gpu', must be prefill or decode"),
        (ref(model="other"), grpc.StatusCode.NOT_FOUND,
         "ScaledObject llm/decode: metadata.model is 'other', this router serves 'demo'"),
    ],
)  # fmt: skip
async def test_metadata_that_fits_nothing_is_told_so_by_every_call(scaler, asked, code, text):
    request = pb.GetMetricsRequest(scaledObjectRef=asked, metricName="kvrelay-decode-replicas")
    calls = [scaler.IsActive(asked), scaler.GetMetricSpec(asked), scaler.GetMetrics(request),
             scaler.StreamIsActive(asked).read()]  # fmt: skip
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert (caught.value.code(), caught.value.details()) == (code, text)


async def test_without_a_model_in_the_metadata_any_will_do(scaler):
    assert not (await scaler.IsActive(ref(model=""))).result


async def test_another_metric_is_refused(scaler):
    request = pb.GetMetricsRequest(scaledObjectRef=ref(), metricName="kvrelay-prefill-replicas")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await scaler.GetMetrics(request)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_taken_port_is_named(server, source):
    with pytest.raises(PortInUse, match=f"can't serve KEDA on 127.0.0.1:{server.port}"):
        await create_scaler_server(source, model=MODEL, host="127.0.0.1", port=server.port)
