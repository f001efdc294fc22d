"""KEDA's protocol with everything behind it: requests park in a real router, a double of KEDA hears of it and has
the supervisor start real workers. KEDA's clock is virtual; the requests' is not.
"""

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from keda_double import KedaDouble, ScaledObject
from ports import free_ports
from tiny_models import reference_chat, tiny_model

from kvrelay import AsyncClient
from kvrelay.cli.stack import defaults, plan_stack
from kvrelay_infra.console import Console
from kvrelay_infra.local import LocalFleet, LocalStack
from kvrelay_infra.providers import Pool, PoolStatus
from kvrelay_infra.scale_socket import SocketProvider

QUESTION = "the answer in another one"
MOST = 2


@dataclass
class Supervised:
    """The Deployments' part: what it is told goes to the supervisor."""

    socket: SocketProvider
    told: dict[Pool, int] = field(default_factory=lambda: dict.fromkeys(Pool, 0))

    async def scale(self, pool: Pool, replicas: int) -> None:
        await self.socket.scale(pool.value, replicas)
        self.told[pool] = replicas

    async def describe(self) -> dict[Pool, PoolStatus]:
        return {pool: PoolStatus(count, count, 0) for pool, count in self.told.items()}

    async def close(self) -> None:
        pass


def fleet_for_keda(scaler_port: int) -> LocalFleet:
    """What `kvrelay up --min 0` starts, with KEDA in the place of the supervisor's own socket."""
    values = defaults(
        model=str(tiny_model("llama3")),
        served_model_name="tiny",
        port=0,
        join_port=0,
        min=0,
        idle=1.0,
        prefill=MOST,
        decode=MOST,
        dtype="float32",
        kv_memory=2**20,
        threads=1,
    )
    fleet = plan_stack(values).fleet
    command = [a for a in fleet.router.command if not a.startswith("--provider=")]
    router = replace(fleet.router, command=[*command, f"--scaler-port={scaler_port}"])
    return replace(fleet, router=router)


def workers(url: str) -> list[dict]:
    return httpx.get(f"{url}/health?verbose").json()["workers"]


async def until(condition) -> None:
    async with asyncio.timeout(120):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


async def test_requests_take_both_pools_from_zero_to_one_to_many_and_back():
    (scaler_port,) = free_ports(1)
    fleet = fleet_for_keda(scaler_port)
    assert isinstance(fleet.scale_socket, Path)
    provider = Supervised(SocketProvider(str(fleet.scale_socket)))
    address = (f"127.0.0.1:{scaler_port}",)
    objects = [ScaledObject(pool, address, "tiny", max_replicas=MOST) for pool in Pool]
    with LocalStack(fleet, Console(relay=False)) as stack:
        url = stack.base_url
        assert workers(url) == []
        async with KedaDouble(provider, *objects).running() as keda, AsyncClient(url) as client:
            options = {"temperature": 0, "extra": {"ignore_eos": True}}
            first = asyncio.create_task(client.chat(QUESTION, max_tokens=12, **options))
            await keda.until_scaled(Pool.DECODE, 1)
            expected = reference_chat(tiny_model("llama3"), QUESTION, 12)[1]
            assert (await first).text == expected

            # More than one worker's pool holds, until the HPA's next sync has asked for the second.
            async def keep_asking(question: str) -> list[str]:
                answers = []
                while not answers or provider.told[Pool.DECODE] < MOST:
                    answer = await client.chat(question, max_tokens=100, **options)
                    answers.append(answer.text)
                return answers

            asked = [f"{n} the other one" for n in range(48)]
            many = [asyncio.create_task(keep_asking(question)) for question in asked]
            async with asyncio.timeout(120):
                while provider.told[Pool.DECODE] < MOST:
                    await asyncio.sleep(0.2)
                    await keda.advance(15)
            answers = await asyncio.gather(*many)
            model = tiny_model("llama3")
            for question, found in list(zip(asked, answers, strict=True))[::12]:
                assert set(found) == {reference_chat(model, question, 100)[1]}

            async with asyncio.timeout(120):
                while any(provider.told.values()):
                    await asyncio.sleep(0.2)
                    await keda.advance(60)
            await until(lambda: workers(url) == [])
