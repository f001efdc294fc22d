"""How a router hears of a worker that starts: the report's threads against a real Join port."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from certificates import Authority
from fake_worker import FakeWorker
from ports import free_ports

from kvrelay_engine.runtime import start_report
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.start_report import StartReport
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import UsageError
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import StartingWorker, WorkerRegistry
from kvrelay_router.fleet.servicer import create_fleet_server

CONFIG = RouterConfig(Path("unused"), "demo", join_port=0, heartbeat_s=0.1)
WORKER = WorkerConfig(name="d0", model_dir=Path("unused"), model_name="demo", router="unused")


class Router:
    """A registry behind a port, and everything it heard of workers that start."""

    def __init__(self, config: RouterConfig) -> None:
        self.registry = WorkerRegistry(config)
        self.registry.listener = self
        self.heard: list[StartingWorker] = []
        self.calls: list[str] = []
        starts = self.registry.starts

        def note(message: pb.Starting, call: object) -> None:
            self.calls.append(message.phase)
            starts(message, call)

        self.registry.starts = note
        self.port = 0

    def worker_starting(self, starting: StartingWorker) -> None:
        self.heard.append(starting)

    def worker_joined(self, link) -> None:
        pass

    def worker_lost(self, link, why) -> None:
        pass

    def worker_message(self, link, message) -> None:
        pass

    @property
    def phases(self) -> list[str]:
        return [worker.phase for worker in self.heard]

    @property
    def starting(self) -> list[str]:
        return [worker.name for worker in self.registry.starting]


@contextlib.asynccontextmanager
async def router(**settings) -> AsyncIterator[Router]:
    config = dataclasses.replace(CONFIG, **settings)
    made = Router(config)
    server = await create_fleet_server(config, made.registry, router_id="r")
    made.port = server.port
    try:
        yield made
    finally:
        await server.stop()


def report(*ports: int, **settings) -> StartReport:
    routers = ",".join(f"127.0.0.1:{port}" for port in ports)
    config = dataclasses.replace(WORKER, router=routers, **settings)
    return StartReport(config, pb.ROLE_DECODE, begun=time.monotonic() - 3.0)


@contextlib.asynccontextmanager
async def reporting(*ports: int, **settings) -> AsyncIterator[StartReport]:
    with report(*ports, **settings) as told:
        yield told


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def telling() -> bool:
    return any(thread.name == "start report" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
async def no_thread_stays():
    yield
    await until(lambda: not telling())


async def test_phases_and_bytes_reach_the_registry_and_its_listener():
    async with router() as there, reporting(there.port) as told:
        await until(lambda: there.phases == ["import"])
        told.phase("load_weights", 10, 30)
        await until(lambda: there.phases[-1] == "load_weights")
        (worker,) = there.registry.starting
        assert worker == there.heard[-1]
        assert (worker.name, worker.role, worker.done, worker.total) == ("d0", "decode", 10, 30)
        assert worker.elapsed_s >= 3.0
        told.phase("warm_up")
        await until(lambda: there.phases[-1] == "warm_up")
        assert (there.heard[-1].done, there.heard[-1].total) == (0, 0)


async def test_every_router_is_told():
    async with router() as one, router() as other, reporting(one.port, other.port) as told:
        told.phase("warm_up")
        await until(lambda: one.phases[-1:] == other.phases[-1:] == ["warm_up"])


async def test_the_entry_goes_when_the_report_is_closed():
    async with router() as there:
        with report(there.port) as told:
            await until(lambda: there.starting == ["d0"])
            told.close()
            told.close()
            await until(lambda: there.starting == [])
        assert there.calls == ["import"]


async def test_the_entry_goes_when_the_start_fails():
    async with router() as there:
        with pytest.raises(MemoryError), report(there.port):
            await until(lambda: there.starting == ["d0"])
            raise MemoryError
        await until(lambda: there.starting == [])


async def test_the_entry_goes_when_the_worker_joins_and_a_late_word_does_not_bring_it_back():
    async with router() as there, reporting(there.port) as told:
        await until(lambda: there.starting == ["d0"])
        async with FakeWorker(there.port, "d0", "decode", heartbeat_s=0.05):
            assert there.starting == []
            told.phase("late")
            await until(lambda: there.calls[-1] == "late")
            assert there.starting == []
            assert "late" not in there.phases


async def test_what_happens_between_two_messages_is_told_by_the_last_of_it(monkeypatch):
    gate = threading.Event()

    class Clock:
        monotonic = staticmethod(time.monotonic)
        sleep = staticmethod(lambda _seconds: gate.wait(60))

    monkeypatch.setattr(start_report, "time", Clock)
    async with router() as there, reporting(there.port) as told:
        await until(lambda: there.phases == ["import"])
        for done in range(1000):
            told.phase("load_weights", done, 999)
        gate.set()
        await until(lambda: there.heard[-1].done == 999)
        assert there.phases == ["import", "load_weights"]


async def test_a_wrong_token_is_told_once_and_disturbs_nothing():
    async with router(join_token="open sesame") as there, reporting(there.port) as told:
        await until(lambda: not telling())
        assert there.calls == ["import"]
        told.phase("load_weights", 1, 2)
        assert there.heard == []
        assert there.starting == []


async def test_the_right_token_is_let_in():
    async with (
        router(join_token="open sesame") as there,
        reporting(there.port, join_token="open sesame"),
    ):
        await until(lambda: there.starting == ["d0"])


async def test_a_router_that_comes_later_is_told_what_is_then():
    (port,) = free_ports(1)
    with report(port) as told:
        told.phase("load_weights", 5, 9)
        async with router(join_port=port) as there:
            await until(lambda: there.starting == ["d0"])
            assert there.phases == ["load_weights"]


async def test_a_router_that_comes_back_is_told_again():
    (port,) = free_ports(1)
    with report(port) as told:
        async with router(join_port=port) as first:
            told.phase("load_weights", 5, 9)
            await until(lambda: first.phases[-1:] == ["load_weights"])
        async with router(join_port=port) as second:
            await until(lambda: second.starting == ["d0"])
            assert second.phases == ["load_weights"]
            told.phase("warm_up")
            await until(lambda: second.phases[-1] == "warm_up")
        assert first.phases[-1] == "load_weights"


async def test_a_router_that_never_comes_keeps_nobody():
    with report(*free_ports(1)) as told:
        told.phase("load_weights", 5, 9)
    # The fixture waits for the threads.


async def test_it_dials_with_the_certificates_of_the_worker(tmp_path):
    authority = Authority(tmp_path)
    own, worker = authority.issue("router.example"), authority.issue("worker.example")
    async with router(
        join_tls_cert=own.cert, join_tls_key=own.key, join_tls_ca=authority.cert
    ) as there:
        tls = {"router_ca": authority.cert, "router_cert": worker.cert, "router_key": worker.key}
        with report(there.port, **tls, router_name="router.example") as told:
            told.phase("load_weights", 1, 2)
            await until(lambda: there.phases[-1:] == ["load_weights"])


async def test_certificates_that_can_not_be_used_are_an_error_before_the_start(tmp_path):
    odd = tmp_path / "odd.pem"
    odd.write_text("no certificate")
    with pytest.raises(UsageError, match="can't use --router-cert"):
        report(1, router_cert=odd, router_key=odd)
