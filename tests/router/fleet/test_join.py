"""The Join stream: who is let in, who is given up, and who hears of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
import pytest
from fake_worker import FakeWorker

from kvrelay_protocol import errors, fleet_pb2_grpc
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet import registry as registry_module
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.servicer import FleetServer, create_fleet_server
from kvrelay_router.fleet.worker_link import OUTGOING_LIMIT, PendingWork, WorkerLink

CONFIG = RouterConfig(Path("unused"), "demo", join_port=0, heartbeat_s=0.1)


@dataclass
class Recorder:
    joined: list[str] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    repeated: int = 0
    missing: int = 0

    def worker_joined(self, link: WorkerLink) -> None:
        self.joined.append(link.name)

    def worker_lost(self, link: WorkerLink, why: str) -> None:
        self.lost.append((link.name, why))

    def worker_message(self, link: WorkerLink, message: pb.WorkerMessage) -> None:
        self.messages.append(message.WhichOneof("message"))

    def message_repeated(self, link: WorkerLink) -> None:
        self.repeated += 1

    def message_missing(self, link: WorkerLink) -> None:
        self.missing += 1


@dataclass
class Fleet:
    registry: WorkerRegistry
    server: FleetServer
    heard: Recorder

    def worker(self, name: str, role: str = "decode", **options: object) -> FakeWorker:
        return FakeWorker(self.server.port, name, role, heartbeat_s=0.05, **options)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    registry = WorkerRegistry(replace(CONFIG, join_token="open sesame"))
    registry.listener = heard = Recorder()
    server = await create_fleet_server(CONFIG, registry, router_id="r")
    yield Fleet(registry, server, heard)
    await server.stop()


def token(hello: pb.Hello) -> None:
    hello.join_token = "open sesame"


async def test_hello_is_welcomed_with_the_heartbeat_to_keep(fleet) -> None:
    async with fleet.worker("d0", change_hello=token) as worker:
        assert worker.seen[0].welcome.heartbeat_seconds == pytest.approx(0.1)
        link = fleet.registry.get("d0")
        assert (link.role, link.device, link.transport_address) == ("decode", "fake", b"d0")
        worker.report(free_blocks=7)
        await fleet.until(lambda: link.load.free_blocks == 7)
    await fleet.until(lambda: fleet.registry.get("d0") is None)
    assert (fleet.heard.joined, [name for name, _ in fleet.heard.lost]) == (["d0"], ["d0"])


def _set(**fields: object) -> Callable[[pb.Hello], None]:
    def change(hello: pb.Hello) -> None:
        token(hello)
        for name, value in fields.items():
            target = hello.kv_layout if name.startswith("kv_") else hello
            setattr(target, name.removeprefix("kv_"), value)

    return change


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda hello: None, "invalid_api_key", ["join_token"]),
        (_set(join_token="open sesamE"), "invalid_api_key", ["join_token"]),
        (_set(join_token="ünïcode"), "invalid_api_key", ["join_token"]),
        (_set(protocol_version=1), "layout_mismatch", ["protocol_version", "1", str(JOIN_VERSION)]),
        (_set(model="other"), "layout_mismatch", ["model", "'other'", "'demo'"]),
        (_set(transport="ucx"), "layout_mismatch", ["transport", "'ucx'", "'inproc'", "d0"]),
        (_set(kv_num_layers=9), "layout_mismatch", ["kv_layout.num_layers", "9", "2", "d0"]),
        (_set(kv_protocol_version=2), "layout_mismatch", ["kv_layout.protocol_version", "2", "1"]),
        (_set(kv_model_fingerprint="x"), "layout_mismatch", ["model_fingerprint", "'x'", "'fake'"]),
        (_set(worker_name=""), "invalid_value", ["worker_name"]),
        (_set(worker_name="n" * 129), "invalid_value", ["worker_name"]),
        (_set(role=0), "invalid_value", ["role"]),
        (_set(role=9), "invalid_value", ["role"]),
    ],
)
async def test_unfit_worker_is_refused_with_the_field_and_both_values(
    fleet,
    change,
    code,
    words,
) -> None:
    async with fleet.worker("d0", change_hello=token):
        odd = fleet.worker("p1", "prefill", change_hello=change)
        async with odd:
            assert odd.refused.code == code
            assert all(word in odd.refused.message for word in words), odd.refused.message
            assert "sesame" not in odd.refused.message
            await asyncio.wait_for(odd.closed.wait(), 60)
        assert [link.name for link in fleet.registry.links] == ["d0"]


async def test_workers_of_other_blocks_and_dtypes_are_let_in_and_the_dtypes_are_noted(
    fleet, caplog
) -> None:
    async with fleet.worker("d0", change_hello=token):
        async with fleet.worker("p0", "prefill", change_hello=_set(kv_block_size=32)) as worker:
            assert worker.refused is None
        assert not [r for r in caplog.records if "not exact" in r.message]
        async with fleet.worker("p1", "prefill", change_hello=_set(kv_dtype="bfloat16")) as worker:
            assert worker.refused is None
    (noted,) = [r.message for r in caplog.records if "not exact" in r.message]
    assert "p1 computes in bfloat16, d0 in float32" in noted


async def test_layout_may_change_once_everybody_has_left(fleet) -> None:
    async with fleet.worker("d0", change_hello=token):
        pass
    await fleet.until(lambda: not fleet.registry.links)
    async with fleet.worker("d0", change_hello=_set(kv_block_size=32)) as worker:
        assert worker.refused is None


async def test_new_incarnation_replaces_the_old_link(fleet) -> None:
    async with (
        fleet.worker("d0", change_hello=token) as old,
        fleet.worker("d0", change_hello=token) as new,
    ):
        await asyncio.wait_for(old.closed.wait(), 60)
        assert fleet.registry.get("d0").incarnation == new.hello.incarnation
        ((name, why),) = fleet.heard.lost
        assert name == "d0"
        assert "replaced by incarnation" in why
        await asyncio.sleep(0.1)
        assert fleet.registry.get("d0") is not None


async def test_silent_worker_is_given_up(fleet, monkeypatch) -> None:
    monkeypatch.setattr(registry_module, "MIN_SILENCE_S", 1.0)
    async with (
        fleet.worker("d0", change_hello=token) as frozen,
        fleet.worker("d1", change_hello=token),
    ):
        frozen.freeze()
        await fleet.until(lambda: bool(fleet.heard.lost))
        assert "no sign of life" in fleet.heard.lost[0][1]
        await asyncio.wait_for(frozen.closed.wait(), 60)
        assert [link.name for link in fleet.registry.links] == ["d1"]


@pytest.mark.parametrize(
    ("heartbeat_s", "alone", "witnessed"), [(0.25, 3.0, 1.2), (0.5, 3.0, 2.0), (2.0, 6.0, 6.0)]
)
async def test_limits_of_silence(heartbeat_s, alone, witnessed) -> None:
    registry = WorkerRegistry(replace(CONFIG, heartbeat_s=heartbeat_s))
    assert registry.silence_limit_s == alone
    assert registry.witnessed_limit_s == witnessed


def _hello(name: str, role: pb.Role.ValueType = pb.ROLE_DECODE) -> pb.Hello:
    return pb.Hello(protocol_version=JOIN_VERSION, worker_name=name, role=role, model="demo")


async def test_a_silent_worker_is_given_up_sooner_while_another_of_its_role_is_heard() -> None:
    now = 0.0
    registry = WorkerRegistry(replace(CONFIG, heartbeat_s=0.25), clock=lambda: now)
    d0, d1 = registry.join(_hello("d0")), registry.join(_hello("d1"))
    p0 = registry.join(_hello("p0", pb.ROLE_PREFILL))
    lost = {}
    while now < 4.0:
        now = round(now + 0.1, 1)
        # d1 speaks until 2.0, so that d0 has a witness; p0 has none of its role.
        if now <= 2.0:
            registry.received(d1, pb.WorkerMessage(heartbeat=pb.Heartbeat()))
        registry.sweep()
        lost |= {
            link.name: now for link in (d0, d1, p0) if link.lost.done() and link.name not in lost
        }
    assert lost == {"d0": 1.3, "p0": 3.1}
    assert registry.get("d1") is not None


async def test_a_quiet_worker_is_known_to_placement_before_it_is_given_up() -> None:
    now = 0.0
    registry = WorkerRegistry(replace(CONFIG, heartbeat_s=0.25), clock=lambda: now)
    registry.join(_hello("d0"))
    d1 = registry.join(_hello("d1"))
    now = 0.9
    registry.received(d1, pb.WorkerMessage(heartbeat=pb.Heartbeat()))
    assert {state.name: state.quiet for state in registry.states()} == {"d0": True, "d1": False}


async def test_router_that_slept_does_not_blame_its_workers() -> None:
    now = 0.0
    registry = WorkerRegistry(CONFIG, clock=lambda: now)
    hello = pb.Hello(
        protocol_version=JOIN_VERSION, worker_name="d0", role=pb.ROLE_DECODE, model="demo"
    )
    registry.join(hello)
    now = 60.0
    registry.sweep()
    assert registry.get("d0") is not None
    for _ in range(20):
        now += 0.25
        registry.sweep()
    assert registry.get("d0") is None


async def test_worker_that_does_not_read_is_given_up_and_never_waited_for() -> None:
    registry = WorkerRegistry(CONFIG)
    registry.listener = heard = Recorder()
    hello = pb.Hello(
        protocol_version=JOIN_VERSION, worker_name="d0", role=pb.ROLE_DECODE, model="demo"
    )
    link = registry.join(hello)
    for _ in range(OUTGOING_LIMIT + 2):
        registry.send("d0", pb.RouterMessage(cancel=pb.Cancel(sequence_id=1)))
    assert link.state().draining  # no more work, from this moment
    assert heard.lost == []  # but not from within the sender's own call
    await asyncio.sleep(0)
    assert heard.lost == [("d0", "it does not read its messages")]


async def test_room_that_comes_free_does_not_bring_a_given_up_worker_back() -> None:
    hello = pb.Hello(worker_name="d0", role=pb.ROLE_DECODE)
    link = WorkerLink(hello, now=0.0)
    message = pb.RouterMessage(cancel=pb.Cancel(sequence_id=1))
    while link.send(message):
        pass
    await link.next_outgoing()
    link.send(message)
    assert link.state().draining  # one message is missing from its line for good


async def test_drained_worker_gets_nothing_more(fleet) -> None:
    async with fleet.worker("d0", change_hello=token) as worker:
        worker.send(pb.WorkerMessage(drained=pb.Drained()))
        await fleet.until(lambda: fleet.registry.get("d0").draining)


async def test_odd_batches_cost_no_neighbour(fleet) -> None:
    hello = fleet.worker("d0", change_hello=token).hello
    drained, nested = pb.WorkerMessage(drained=pb.Drained()), pb.WorkerMessage()
    nested.batch.messages.add().heartbeat.load.running = 5
    odd = pb.WorkerMessage(batch=pb.WorkerBatch(messages=[nested, pb.WorkerMessage(), drained]))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.server.port}") as channel:
        call = fleet_pb2_grpc.FleetStub(channel).Join()
        empty = pb.WorkerMessage(batch=pb.WorkerBatch())
        for number, message in enumerate((pb.WorkerMessage(hello=hello), empty, odd)):
            message.number = number
            await call.write(message)
        await fleet.until(lambda: "drained" in fleet.heard.messages)
        assert fleet.registry.get("d0").load.running == 0


async def test_what_is_queued_together_comes_in_order(fleet) -> None:
    async with fleet.worker("d0", change_hello=token) as worker:
        for number in range(1, 101):
            fleet.registry.send("d0", pb.RouterMessage(cancel=pb.Cancel(sequence_id=number)))
            fleet.registry.send("d0", pb.RouterMessage(release_kv=pb.ReleaseKv(sequence_id=number)))
        await worker.until(lambda: len(worker.kinds()) == 200)
        assert worker.kinds() == ["cancel", "release_kv"] * 100
        assert [c.sequence_id for c in worker.messages("cancel")] == list(range(1, 101))


async def test_a_message_that_breaks_the_listener_ends_the_link_after_its_neighbours(fleet) -> None:
    def break_on_drained(_link: WorkerLink, message: pb.WorkerMessage) -> None:
        fleet.heard.messages.append(message.WhichOneof("message"))
        if message.HasField("drained"):
            raise RuntimeError("a defect")

    async with fleet.worker("d0", change_hello=token) as worker:
        fleet.registry.listener.worker_message = break_on_drained
        messages = [pb.WorkerMessage(drained=pb.Drained()), pb.WorkerMessage(kv_sent=pb.KvSent())]
        worker.send(pb.WorkerMessage(batch=pb.WorkerBatch(messages=messages)))
        await fleet.until(lambda: fleet.heard.lost == [("d0", "its stream ended")])
        assert fleet.heard.messages[-1] == "kv_sent"


def _drained(number: int) -> pb.WorkerMessage:
    return pb.WorkerMessage(drained=pb.Drained(), number=number)


async def _say(fleet: Fleet, *numbers: int) -> str:
    """Messages of these numbers from a worker; returns why it was given up, if it was."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.server.port}") as channel:
        call = fleet_pb2_grpc.FleetStub(channel).Join()
        hello = fleet.worker("d0", change_hello=token).hello
        for message in (pb.WorkerMessage(hello=hello), *map(_drained, numbers)):
            await call.write(message)
        await call.done_writing()
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        await fleet.until(lambda: bool(fleet.heard.lost))
    return fleet.heard.lost[0][1]


async def test_a_message_that_comes_again_is_dropped_and_counted(fleet) -> None:
    assert await _say(fleet, 1, 2, 2, 1, 3) == "its stream ended"
    assert fleet.heard.messages == ["drained"] * 3
    assert (fleet.heard.repeated, fleet.heard.missing) == (2, 0)


@pytest.mark.parametrize("numbers", [(1, 3), (1, 3, 2), (1, 2**64 - 1)])
async def test_a_message_that_is_missing_ends_the_stream_before_the_next_is_read(
    fleet, numbers
) -> None:
    why = await _say(fleet, *numbers)
    assert why == f"message 2 is missing ({numbers[1]} came)"
    assert fleet.heard.messages == ["drained"]
    assert fleet.heard.missing == 1


async def test_the_first_message_may_be_missing_too(fleet) -> None:
    assert await _say(fleet, 2) == "message 1 is missing (2 came)"


async def test_first_message_must_be_hello(fleet) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.server.port}") as channel:
        call = fleet_pb2_grpc.FleetStub(channel).Join()
        await call.write(pb.WorkerMessage(drained=pb.Drained()))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_port_in_use_is_a_typed_error(fleet) -> None:
    config = replace(CONFIG, join_port=fleet.server.port)
    with pytest.raises(errors.PortInUse, match=str(fleet.server.port)):
        await create_fleet_server(config, WorkerRegistry(config), router_id="r")


def test_pending_work_counts_until_a_report_can_contain_it() -> None:
    pending = PendingWork()
    pending.dispatch(1, blocks=3, tokens=40)
    pending.dispatch(2, blocks=1, tokens=10)
    pending.reported()  # nothing was granted yet: the report can't contain it
    assert (pending.blocks, pending.tokens, pending.ungranted) == (4, 50, 2)
    assert pending.grant(1)
    assert not pending.grant(1)
    assert (pending.blocks, pending.ungranted) == (4, 1)
    pending.reported()
    assert (pending.blocks, pending.tokens) == (1, 10)
    pending.gone(1)
    pending.gone(2)
    pending.gone(2)
    assert (pending.blocks, pending.tokens, pending.ungranted) == (0, 0, 0)


def test_a_refused_worker_exits_with_a_code_of_its_own() -> None:
    refusals = {errors.LayoutMismatch.exit_code, errors.Unauthorized.exit_code}
    others = {cls.exit_code for cls in errors.StartupError.__subclasses__()}
    assert refusals == {10}
    assert not refusals & (others | {errors.TransportMisconfigured.exit_code})


async def test_a_lost_worker_is_named_and_is_no_news_when_the_router_ends(fleet, caplog) -> None:
    async with fleet.worker("gone", change_hello=token):
        await fleet.until(lambda: fleet.heard.joined == ["gone"])
    await fleet.until(lambda: len(fleet.heard.lost) == 1)
    assert [r.getMessage() for r in caplog.records] == ["worker gone lost: its stream ended"]
    caplog.clear()
    async with fleet.worker("stays", change_hello=token):
        await fleet.until(lambda: fleet.heard.joined == ["gone", "stays"])
        await fleet.server.stop()
        await fleet.until(lambda: len(fleet.heard.lost) == 2)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
