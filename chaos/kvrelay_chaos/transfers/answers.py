"""Flipped bits under real answers: one router, a prefill and a decode worker in this process.

Every transfer loses one bit of one of its messages, and every answer is compared with one whose prompt the
decode worker computed itself, under another tenant's salt so that the two share no block.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from kvrelay_decode.main import serve as serve_decode
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.startup import Phases, start_engine
from kvrelay_prefill.main import serve as serve_prefill
from kvrelay_protocol.errors import EngineFailed
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_router.config import RouterConfig
from kvrelay_router.requests.core import RouterCore
from kvrelay_router.requests.types import Finished, PathKind, Tokens, ValidRequest
from kvrelay_transfer.inproc import InprocTransport
from kvrelay_transfer.transport import Buffer, readable_bytes, register_transport

_AT_ONCE = 4
_NEW_TOKENS = 8
_VOCABULARY = 256
_START_S = 120.0
_REPORT_S = 10.0
"""For the decode worker's last heartbeat to come; one that never counts is given up after this."""


@dataclass(slots=True)
class AnswerReport:
    """What became of the answers."""

    requests: int = 0
    flips: int = 0
    detected: int = 0
    """Frames that the decode worker counted as corrupt."""
    exact: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether every flip was detected and every answer right."""
        return self.detected == self.flips and self.exact == self.requests and not self.failures


class FlippingTransport(InprocTransport):
    """Flips one bit of the first or second message of every transfer; the second may be the record."""

    scheme = "flips"
    dice = random.Random(0)
    flips = 0

    def __init__(self) -> None:
        super().__init__()
        self._spare: dict[int, int] = {}

    async def send(self, peer: bytes, tag: int, buffer: Buffer) -> None:
        left = self._spare.setdefault(tag, self.dice.randrange(2))
        self._spare[tag] = left - 1
        if left == 0:
            data = bytearray(readable_bytes(buffer))
            bit = self.dice.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            FlippingTransport.flips += 1
            buffer = data
        await super().send(peer, tag, buffer)


async def compare_answers(count: int, seed: int, model_dir: Path) -> AnswerReport:
    """`count` requests over damaged transfers, greedy and sampled by turns."""
    report = AnswerReport(requests=count)
    dice = FlippingTransport.dice = random.Random(seed)
    FlippingTransport.flips = 0
    begun = time.monotonic()
    async with _stack(model_dir) as core:
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(number: int) -> None:
            prompt = tuple(dice.choices(range(_VOCABULARY), k=dice.randrange(3, 200)))
            sampling = SamplingParams(temperature=number % 2 * 0.8, seed=number)
            async with room:
                found = await _ask(core, prompt, sampling, None, b"damaged")
                right = await _ask(core, prompt, sampling, PathKind.LOCAL, b"whole")
            report.exact += found == right and isinstance(found, tuple)
            if isinstance(found, str):
                report.failures.append(found)

        await asyncio.gather(*(one(number) for number in range(count)))
        report.flips = FlippingTransport.flips
        report.detected = await _reported(core, report.flips)
    report.seconds = time.monotonic() - begun
    return report


async def _ask(
    core: RouterCore,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    path: PathKind | None,
    salt: bytes,
) -> tuple[int, ...] | str:
    """The tokens of an answer, or what went wrong."""
    request = ValidRequest(
        request_id=secrets.token_hex(8),
        model="chaos",
        prompt_tokens=prompt,
        sampling=sampling,
        max_tokens=_NEW_TOKENS,
        stop_token_ids=frozenset(),
        deadline_s=120.0,
        cache_salt=salt,
        force_path=path,
    )
    events = [event async for event in core.service.submit(request)]
    if not isinstance(events[-1], Finished):
        return str(events[-1])
    return tuple(i for event in events if isinstance(event, Tokens) for i in event.ids)


async def _reported(core: RouterCore, flips: int) -> int:
    """Corrupt frames by the decode worker's reports, which come a little later."""
    (decode,) = [link for link in core.registry.links if link.name == "decode"]
    waited = 0.0
    while decode.load.corrupt_frames < flips and waited < _REPORT_S:
        await asyncio.sleep(_REPORT_S / 100)
        waited += _REPORT_S / 100
    return int(decode.load.corrupt_frames)


@contextlib.asynccontextmanager
async def _stack(model_dir: Path) -> AsyncIterator[RouterCore]:
    register_transport(FlippingTransport.scheme, __name__, FlippingTransport.__name__)
    telemetry = Telemetry("kvrelay-chaos", instance="chaos")
    config = RouterConfig(model_dir=model_dir, model_name="chaos", join_port=0, heartbeat_s=0.1)
    core = RouterCore(config, telemetry)
    await core.start()
    over = asyncio.Event()
    workers: list[asyncio.Task[None]] = []
    try:
        for name, serve in (("prefill", serve_prefill), ("decode", serve_decode)):
            settings = WorkerConfig(
                name=name,
                model_dir=model_dir,
                model_name="chaos",
                router=f"127.0.0.1:{core.join_port}",
                dtype="float32",
                kv_memory_bytes=16 * 2**20,
                max_batch_tokens=64,
                threads=1,
                transport=FlippingTransport.scheme,
                heartbeat_s=0.1,
            )
            phases = Phases()
            engine = await asyncio.to_thread(start_engine, settings, phases)
            workers.append(asyncio.create_task(serve(settings, engine, phases, over)))
        await _until_ready(core, workers)
        yield core
    finally:
        over.set()
        await asyncio.gather(*workers, return_exceptions=True)
        await core.stop()
        telemetry.shutdown()


async def _until_ready(core: RouterCore, workers: list[asyncio.Task[None]]) -> None:
    async with asyncio.timeout(_START_S):
        while len(core.registry.links) < len(workers):
            if any(worker.done() for worker in workers):
                raise EngineFailed("a worker ended before it had joined")
            await asyncio.sleep(0.02)
