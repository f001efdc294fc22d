"""A receiver that is cancelled again while its first cancel is being confirmed."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from kvrelay_decode.receiver import KvReceiver
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_transfer.lease import LeaseId
from kvrelay_transfer.staging import StagingBuffers

TAG = 5


class SlowReceive:
    """A message is being written; whoever cancels has to wait until that stops."""

    def __init__(self) -> None:
        self.asked, self.confirmed = asyncio.Event(), asyncio.Event()
        self.done = False

    async def wait(self) -> int:
        return await asyncio.get_running_loop().create_future()

    async def cancel(self) -> bool:
        self.asked.set()
        await self.confirmed.wait()
        return True


async def test_two_cancels_still_end_the_tag_and_wait_for_the_confirmation():
    receive, ended = SlowReceive(), []
    staging = StagingBuffers(1, 4096)
    transport = SimpleNamespace(receive=lambda tag, view: receive, end=ended.append)
    layout = SimpleNamespace(model_fingerprint="model")
    receiver = KvReceiver(
        LeaseId(bytes(16), 7, 3),
        ticket=bytes(32),
        tag=TAG,
        spec=SequenceSpec(1, "r", (1, 2), 0, 1, frozenset(), SamplingParams(), 60.0),
        prompt_blocks=(0,),
        first_block=0,
        kit=SimpleNamespace(layout=layout, staging=staging, transport=transport),
        pool=SimpleNamespace(num_layers=1, block_size=4, heads=range(1)),
        lease_s=10.0,
        deadline=time.monotonic() + 60,
        on_posted=lambda: None,
        on_missing=lambda numbers: None,
    )
    task = asyncio.create_task(receiver.run())
    await asyncio.sleep(0)
    task.cancel()
    await receive.asked.wait()
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert (task.done(), ended, staging.held) == (False, [], 1)
    receive.confirmed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (ended, staging.held) == ([TAG], 0)
