"""Who hears of whose weights: workers of the fleet alone, the same bytes alone, each pair by a ticket of its own."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from fake_worker import FakeWorker

from kvrelay_engine.runtime.find_weights import WeightSearch
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc as rpc
from kvrelay_protocol.errors import Unauthorized
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.servicer import FleetServer, create_fleet_server

CONFIG = RouterConfig(Path("unused"), "demo", join_port=0, join_token="open sesame")


@pytest.fixture
async def fleet() -> AsyncIterator[tuple[FleetServer, WorkerRegistry]]:
    registry = WorkerRegistry(CONFIG)
    server = await create_fleet_server(CONFIG, registry, router_id="r")
    yield server, registry
    await server.stop()


def wanted(**changes: object) -> pb.WeightsWanted:
    fields = {"protocol_version": JOIN_VERSION, "worker_name": "d9", "role": pb.ROLE_DECODE,
              "model": "demo", "join_token": "open sesame", "weights_id": "w",
              "transport": "inproc"}  # fmt: skip
    return pb.WeightsWanted(**(fields | changes))


async def ask(server: FleetServer, **changes: object) -> pb.WeightsFound:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        return await rpc.FleetStub(channel).FindWeights(wanted(**changes), timeout=30)


def worker(server: FleetServer, name: str, weights_id: str = "w", **changes: object) -> FakeWorker:
    def change(hello: pb.Hello) -> None:
        hello.join_token, hello.weights_id = "open sesame", weights_id
        for field, value in changes.items():
            setattr(hello, field, value)

    return FakeWorker(server.port, name, "decode", heartbeat_s=0.05, change_hello=change)


async def offers(server_side: FakeWorker, count: int = 1) -> list[pb.OfferWeights]:
    async with asyncio.timeout(60):
        while True:
            found = [m for m in server_side.seen if m.WhichOneof("message") == "offer_weights"]
            if len(found) >= count:
                return [message.offer_weights for message in found]
            await asyncio.sleep(0.01)


async def test_both_sides_get_the_same_ticket_and_nobody_else_one(fleet):
    server, _ = fleet
    async with worker(server, "d0") as d0, worker(server, "d1", "others") as d1:
        found = await ask(server, transport_address=b"mine")
        (offer,) = await offers(d0)
        assert (found.worker_name, found.transport_address) == ("d0", b"d0")
        assert (offer.worker_name, offer.transport_address) == ("d9", b"mine")
        assert (found.ticket, found.tag) == (offer.ticket, offer.tag)
        assert (len(found.ticket), offer.weights_id, offer.seconds) == (32, "w", found.seconds)
        assert not [m for m in d1.seen if m.WhichOneof("message") == "offer_weights"]


async def test_a_question_without_an_address_gets_a_name_and_no_ticket(fleet):
    server, _ = fleet
    async with worker(server, "d0") as d0:
        assert await ask(server) == pb.WeightsFound(worker_name="d0")
        await ask(server, transport_address=b"mine")
        assert len(await offers(d0)) == 1


async def test_readers_are_spread_over_the_workers_that_have_them(fleet):
    server, _ = fleet
    async with worker(server, "d0"), worker(server, "d1"):
        names = [(await ask(server, transport_address=b"mine")).worker_name for _ in range(4)]
        assert sorted(names) == ["d0", "d0", "d1", "d1"]


@pytest.mark.parametrize(
    "changes",
    [{"weights_id": "x"}, {"transport": "ucx"}, {"worker_name": "d0"}],
)
async def test_nobody_has_them(fleet, changes):
    server, _ = fleet
    async with worker(server, "d0"):
        assert await ask(server, transport_address=b"mine", **changes) == pb.WeightsFound()


async def test_a_worker_that_drains_is_not_asked(fleet):
    server, registry = fleet
    async with worker(server, "d0"):
        registry.get("d0").draining = True
        assert await ask(server) == pb.WeightsFound()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"join_token": "guess"}, "invalid_api_key", "join_token"),
        ({"worker_name": ""}, "invalid_value", "worker_name"),
        ({"role": 0}, "invalid_value", "role"),
        ({"model": "another"}, "layout_mismatch", "'another'"),
        ({"weights_id": ""}, "invalid_value", "weights_id: needs 1 to 128 characters, has 0"),
        ({"transport_address": bytes(5000)}, "invalid_value", "5000 bytes; at most 4096"),
    ],
)
async def test_who_could_not_join_hears_nothing(fleet, caplog, changes, code, words):
    server, _ = fleet
    async with worker(server, "d0") as d0:
        found = await ask(server, **({"transport_address": b"mine"} | changes))
        assert (found.error.code, found.worker_name, found.ticket) == (code, "", b"")
        assert words in found.error.message
        assert "may not ask for weights" in caplog.text
        assert not [m for m in d0.seen if m.WhichOneof("message") == "offer_weights"]


def search(*ports: int, join_token: str = CONFIG.join_token) -> WeightSearch:
    routers = tuple(f"127.0.0.1:{port}" for port in ports)
    return WeightSearch(routers, None, name="d9", role=pb.ROLE_DECODE, model="demo",
                        join_token=join_token, transport="inproc")  # fmt: skip


async def test_a_worker_asks_one_router_after_the_other(fleet):
    server, registry = fleet
    second = await create_fleet_server(
        replace(CONFIG), other := WorkerRegistry(CONFIG), router_id="s"
    )
    assert other is not registry
    async with worker(second, "d0"):
        found = await asyncio.to_thread(search(1, server.port, second.port).ask, "w", b"mine")
        assert found is not None
        assert found.worker_name == "d0"
        assert await asyncio.to_thread(search(1, server.port).ask, "w") is None
    await second.stop()


async def test_a_worker_that_a_router_does_not_know_learns_why(fleet):
    server, _ = fleet
    with pytest.raises(Unauthorized, match="join_token"):
        await asyncio.to_thread(search(server.port, join_token="guess").ask, "w")
