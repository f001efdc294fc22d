"""The stack's end of the agents, with agents that only speak the protocol."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from kvrelay_chaos.agents import AgentLost, Agents
from kvrelay_chaos.kv_plane import KvOrder

ORDER = KvOrder("corrupt", at=0.5)


class FakeAgent:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def dial(cls, agents: Agents, name: str, pid: int) -> "FakeAgent":
        agent = cls(*await asyncio.open_unix_connection(agents.socket))
        agent.say(name=name, pid=pid)
        return agent

    def say(self, **message: object) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def hear(self) -> dict[str, object]:
        async with asyncio.timeout(30):
            message: dict[str, object] = json.loads(await self._reader.readline())
        return message

    def die(self) -> None:
        self._writer.close()


@pytest.fixture
async def agents(tmp_path) -> AsyncIterator[Agents]:
    agents = Agents(tmp_path / "agents")
    await agents.start()
    yield agents
    await agents.stop()


async def _known(agents: Agents, name: str, pid: int | None) -> None:
    async with asyncio.timeout(30):
        while agents.pid(name) != pid:
            await asyncio.sleep(0.01)


async def test_an_answer_reaches_who_asked(agents):
    agent = await FakeAgent.dial(agents, "decode-0", 7)
    await _known(agents, "decode-0", 7)
    asked = [asyncio.create_task(agents.ask("decode-0", "counts", n=n)) for n in range(2)]
    heard = [await agent.hear() for _ in asked]
    for request in reversed(heard):
        agent.say(id=request["id"], result=request["n"])
    assert await asyncio.gather(*asked) == [0, 1]
    agent.die()


async def test_what_an_agent_cannot_do_is_an_error_that_says_why(agents):
    agent = await FakeAgent.dial(agents, "decode-0", 7)
    await _known(agents, "decode-0", 7)
    asked = asyncio.create_task(agents.ask("decode-0", "counts"))
    agent.say(id=(await agent.hear())["id"], error="IntegrityError: block 3 is in two states")
    with pytest.raises(RuntimeError, match="decode-0: IntegrityError: block 3"):
        await asked
    agent.die()


async def test_a_worker_that_dies_leaves_nobody_waiting(agents):
    agent = await FakeAgent.dial(agents, "decode-0", 7)
    await _known(agents, "decode-0", 7)
    asked = asyncio.create_task(agents.ask("decode-0", "counts"))
    await agent.hear()
    agent.die()
    with pytest.raises(AgentLost):
        await asked
    await _known(agents, "decode-0", None)
    with pytest.raises(AgentLost, match="no agent now"):
        await agents.ask("decode-0", "counts")


async def test_a_kv_fault_that_found_no_message_is_ordered_from_the_next_process(agents):
    first = await FakeAgent.dial(agents, "prefill-0", 7)
    await _known(agents, "prefill-0", 7)
    fault = asyncio.create_task(agents.kv_fault("prefill-0", ORDER))
    order = await first.hear()
    assert (order["do"], order["fault"], order["at"]) == ("kv", "corrupt", 0.5)
    first.die()
    await _known(agents, "prefill-0", None)
    second = await FakeAgent.dial(agents, "prefill-0", 8)
    again = await second.hear()
    assert again == order
    assert not fault.done()
    second.say(hit=again["number"])
    await fault
    second.die()


async def test_a_kv_fault_waits_for_a_worker_that_is_not_there_yet(agents):
    fault = asyncio.create_task(agents.kv_fault("prefill-0", ORDER))
    await asyncio.sleep(0)
    agent = await FakeAgent.dial(agents, "prefill-0", 7)
    agent.say(hit=(await agent.hear())["number"])
    await fault
    agent.die()
