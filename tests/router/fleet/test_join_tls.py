"""The port that workers dial, behind certificates: who gets in, and what both ends say."""

import asyncio
import contextlib
import dataclasses
from pathlib import Path

import pytest
from certificates import Authority

from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.join import JoinLink
from kvrelay_engine.runtime.join_tls import join_tls
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import UsageError
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.servicer import create_fleet_server
from kvrelay_router.main import anyone_may_join

CONFIG = RouterConfig(Path("unused"), "demo", join_port=0, heartbeat_s=0.1)
WORKER = WorkerConfig(name="d0", model_dir=Path("unused"), model_name="demo", router="unused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ours(folder):
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def theirs(folder):
    return Authority(folder, "theirs")


class Handler:
    def hello(self):
        return pb.Hello(
            protocol_version=JOIN_VERSION, worker_name="d0", role=pb.ROLE_DECODE, model="demo"
        )

    def heartbeat(self, session):
        return pb.Heartbeat()

    def handle(self, message, session):
        pass

    def disconnected(self, session):
        pass


@contextlib.asynccontextmanager
async def router(**settings):
    config = dataclasses.replace(CONFIG, **settings)
    server = await create_fleet_server(config, WorkerRegistry(config), router_id="r")
    yield server.port
    await server.stop()


@contextlib.asynccontextmanager
async def dialling(port, **settings):
    tls = join_tls(dataclasses.replace(WORKER, **settings))
    link = JoinLink(f"127.0.0.1:{port}", Handler(), heartbeat_s=0.1, tls=tls)
    task = asyncio.create_task(link.run(lambda: None))
    yield link
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def joins(port, **settings) -> bool:
    """Whether a worker gets in; one that does not has tried more than once."""
    async with dialling(port, **settings) as link, asyncio.timeout(60):
        while not link.joined.is_set() and link.session < 2:
            await asyncio.sleep(0.01)
        return link.joined.is_set()


async def test_with_an_authority_only_its_workers_get_in(ours, theirs):
    own, worker, stranger = (
        ours.issue("127.0.0.1"),
        ours.issue("worker.example"),
        theirs.issue("worker.example"),
    )
    async with router(join_tls_cert=own.cert, join_tls_key=own.key, join_tls_ca=ours.cert) as port:
        ca = {"router_ca": ours.cert}
        assert await joins(port, **ca, router_cert=worker.cert, router_key=worker.key)
        assert not await joins(port, **ca)
        assert not await joins(port, **ca, router_cert=stranger.cert, router_key=stranger.key)
        assert not await joins(port)


async def test_a_worker_joins_no_router_but_those_of_its_authority_and_name(ours, theirs):
    own, elsewhere = ours.issue("127.0.0.1"), ours.issue("router.example")
    async with router(join_tls_cert=own.cert, join_tls_key=own.key) as port:
        assert await joins(port, router_ca=ours.cert)
        assert not await joins(port, router_ca=theirs.cert)
    async with router(join_tls_cert=elsewhere.cert, join_tls_key=elsewhere.key) as port:
        assert not await joins(port, router_ca=ours.cert)
        assert await joins(port, router_ca=ours.cert, router_name="router.example")


async def test_a_router_without_tls_is_not_joined_by_a_worker_that_asks_for_it(ours):
    async with router() as port:
        assert not await joins(port, router_ca=ours.cert)


async def test_what_can_not_work_is_said_before_anything_starts(ours):
    own, other = ours.issue("127.0.0.1"), ours.issue("other.example")
    with pytest.raises(UsageError, match="--join-tls-ca needs --join-tls-cert"):
        async with router(join_tls_ca=ours.cert):
            pass
    with pytest.raises(UsageError, match=r"can't use --join-tls-cert .* with --join-tls-key"):
        async with router(join_tls_cert=own.cert, join_tls_key=other.key):
            pass
    with pytest.raises(UsageError, match="--router-cert needs --router-ca"):
        join_tls(dataclasses.replace(WORKER, router_cert=own.cert, router_key=own.key))
    with pytest.raises(UsageError, match=r"can't use --router-cert .* with --router-key"):
        join_tls(dataclasses.replace(WORKER, router_cert=own.cert, router_key=other.key))


@pytest.mark.parametrize(
    ("settings", "open_to_all"),
    [
        ({}, False),
        ({"join_host": "localhost"}, False),
        ({"join_host": "::1"}, False),
        ({"join_host": "0.0.0.0"}, True),
        ({"join_host": "router.example"}, True),
        ({"join_host": "0.0.0.0", "join_token": "secret"}, False),
        ({"join_host": "0.0.0.0", "join_tls_ca": Path("ca.pem")}, False),
        ({"join_host": "0.0.0.0", "join_tls_cert": Path("router.pem")}, True),
    ],
)
def test_a_port_that_anyone_may_join_is_known_as_one(settings, open_to_all):
    assert anyone_may_join(dataclasses.replace(CONFIG, **settings)) is open_to_all
