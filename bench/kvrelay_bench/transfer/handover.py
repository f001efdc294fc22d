"""The whole hand-over as the workers do it: `KvSender` in one process, `KvReceiver` in another.

`python -m kvrelay_bench.transfer.handover` reads an order and prints a result, both JSON. The KV of a
prompt is there already, so nothing hides the transfer: gather, digest, send, receive, verify, scatter,
message after message, until the receiver has the record.
"""

import asyncio
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from xxhash import xxh3_128_hexdigest

from kvrelay_bench.transfer.pieces import BLOCK_SIZE, LAYOUT, make_pool, shuffled_blocks
from kvrelay_decode.receiver import KvReceiver
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_prefill.sender import FirstOutput, KvSender, Sent
from kvrelay_protocol.errors import TransferError
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.lease import LeaseId, OpenLease
from kvrelay_transfer.staging import StagingBuffers
from kvrelay_transfer.ticket import new_ticket
from kvrelay_transfer.transport import create_transport

_DEADLINE_S = 150.0
_TRACE = TraceContext(b"\1" * 16, b"\1" * 8, 0)


def blocks_of(tokens: int) -> int:
    """Blocks of a prompt."""
    return -(-tokens // BLOCK_SIZE)


def digest_of(pool: KVPool, blocks: tuple[int, ...]) -> str:
    """Of the content of these blocks in all layers, in their order."""
    import torch

    content = pool.tensor.index_select(2, torch.tensor(blocks)).view(torch.int16)
    return str(xxh3_128_hexdigest(content.numpy().data))


async def _make_kit(order: dict[str, Any], layout: KvLayout) -> TransferKit:
    transport = create_transport(order["uri"])
    await transport.start()
    return TransferKit(
        transport, StagingBuffers(order["staging_buffers"], order["staging_bytes"]), layout
    )


async def _send(order: dict[str, Any]) -> dict[str, Any]:
    """The parent: order the child to receive each prompt, send it, time it."""
    kit = await _make_kit(order, LAYOUT)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvrelay_bench.transfer.handover", "--child",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        longest = max(map(blocks_of, order["prompts"]))
        pool = make_pool(longest, seed=1)
        await _tell(child, order)
        results = []
        for number, tokens in enumerate([order["prompts"][0], *order["prompts"]]):
            found = await _hand_over(kit, pool, child, tokens)
            if number:  # the first one connects
                results.append(found)
        return {"prompts": results}
    finally:
        child.kill()
        await child.wait()


async def _hand_over(
    kit: TransferKit, pool: KVPool, child: asyncio.subprocess.Process, tokens: int
) -> dict[str, Any]:
    count = blocks_of(tokens)
    blocks = shuffled_blocks(count, pool.num_blocks, seed=tokens)
    sent: list[Sent] = []
    spec = _spec_of(count)
    sender = KvSender(spec, kit, pool, lease_s=_DEADLINE_S, on_sent=sent.append)
    sender.admitted(blocks, count, _TRACE)
    sender.computed(FirstOutput(token=1, cached_tokens=0))
    await _tell(child, {"tokens": tokens})
    granted = await _hear(child)
    identity = LeaseId(bytes.fromhex(granted["lease_id"]), granted["epoch"], granted["generation"])
    lease = OpenLease(identity, granted["tag"], bytes.fromhex(granted["address"]), 0,
                      kit.staging.nbytes, LAYOUT, bytes.fromhex(granted["ticket"]))  # fmt: skip
    began, cpu = time.perf_counter(), time.process_time()
    sender.open(lease)
    running = asyncio.create_task(sender.run())
    answer = await _hear(child)
    seconds, busy = time.perf_counter() - began, time.process_time() - cpu
    sender.release()
    await running
    (report,) = sent or [Sent(0, 0, 0.0, "")]
    return {
        "tokens": tokens,
        "bytes": answer["bytes"],
        "messages": answer["messages"],
        "seconds": seconds,
        "gb_per_s": answer["bytes"] / seconds / 1e9,
        "sending_s": report.seconds,
        "sender_cpu_s": busy,
        "receiver_cpu_s": answer["cpu_s"],
        "transport": report.transport,
        "exact": (await _hear(child))["digest"] == digest_of(pool, blocks),
    }


def _spec_of(blocks: int) -> SequenceSpec:
    """A prompt of whole blocks, so that both digests cover the same."""
    prompt = tuple(range(blocks * BLOCK_SIZE))
    return SequenceSpec(1, "bench", prompt, 0, 1, frozenset(), SamplingParams(), _DEADLINE_S)


async def _tell(child: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    if child.stdin is None:
        raise TransferError("the receiving process has no pipes")
    child.stdin.write(json.dumps(message).encode() + b"\n")
    await child.stdin.drain()


async def _hear(child: asyncio.subprocess.Process) -> dict[str, Any]:
    if child.stdout is None:
        raise TransferError("the receiving process has no pipes")
    line = await asyncio.wait_for(child.stdout.readline(), _DEADLINE_S)
    if not line:
        raise TransferError("the receiving process ended")
    heard: dict[str, Any] = json.loads(line)
    return heard


async def _receive_all(lines: "asyncio.Queue[str]") -> None:
    """The child: one receiver after the other, as its parent orders."""
    order = json.loads(await lines.get())
    kit = await _make_kit(order, LAYOUT)
    pool = make_pool(max(map(blocks_of, order["prompts"])))
    epoch = secrets.randbits(63)
    for generation in range(len(order["prompts"]) + 1):
        tokens = json.loads(await lines.get())["tokens"]
        count = blocks_of(tokens)
        blocks = shuffled_blocks(count, pool.num_blocks, seed=tokens + 1)
        identity = LeaseId(secrets.token_bytes(16), epoch, generation)
        tag, ticket = secrets.randbits(63), new_ticket()

        def granted(identity: LeaseId = identity, tag: int = tag, ticket: bytes = ticket) -> None:
            _print(
                {
                    "lease_id": identity.lease_id.hex(),
                    "epoch": identity.epoch,
                    "generation": identity.generation,
                    "tag": tag,
                    "ticket": ticket.hex(),
                    "address": kit.transport.address.hex(),
                }
            )

        receiver = KvReceiver(
            identity,
            ticket=ticket,
            tag=tag,
            spec=_spec_of(count),
            prompt_blocks=blocks,
            first_block=0,
            kit=kit,
            pool=pool,
            lease_s=_DEADLINE_S,
            deadline=time.monotonic() + _DEADLINE_S,
            on_posted=granted,
            on_missing=lambda _numbers: None,
        )
        cpu = time.process_time()
        received = await receiver.run()
        _print(
            {
                "bytes": received.bytes,
                "messages": received.messages,
                "cpu_s": time.process_time() - cpu,
            }
        )
        _print({"digest": digest_of(pool, blocks)})
        pool.tensor.zero_()


def _print(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def _child() -> None:
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def follow_parent() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line)
        os._exit(0)  # the parent is gone, however it ended

    threading.Thread(target=follow_parent, daemon=True).start()
    await _receive_all(lines)
    await asyncio.Event().wait()  # the parent has the last word


def main(arguments: Sequence[str]) -> int:
    """Run one side; torch on one thread, as copies get in a worker."""
    import torch

    torch.set_num_threads(1)
    status = 1
    try:
        if list(arguments) == ["--child"]:
            asyncio.run(_child())
        else:
            _print(asyncio.run(_send(json.loads(sys.stdin.readline()))))
        status = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
