"""The reference cases of vllm#52234, by a sender that knows everything a prefill worker knows of a lease.

The victim's prefill worker is held back before its first message; meanwhile the adversary's frames arrive in
the victim's transfer. Whatever they are, the victim's and a bystander's answers are exact, the frames are
counted, and nobody reads another prompt's KV: blocks hold only what the right worker sent, or are not read.
"""

import asyncio
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
from local_stack import Stack, local_stack
from tiny_models import random_prompt, reference_generate, tiny_model

import kvrelay_transfer.setup
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_prefill.sender import KvSender
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import TransferCancelled
from kvrelay_router.requests.types import PathKind
from kvrelay_transfer.frames import HEADER_SIZE, FrameHeader, FrameKind, seal
from kvrelay_transfer.inproc import InprocTransport
from kvrelay_transfer.layout import DTYPE_CODES, Piece, WireFormat
from kvrelay_transfer.lease import OpenLease
from kvrelay_transfer.ticket import frame_key, new_ticket
from kvrelay_transfer.transport import readable_bytes

NEW_TOKENS = 10
PROMPT = random_prompt(100, seed=1)
OTHER = random_prompt(100, seed=2)
SETTINGS = {"max_batch_tokens": 32}
"""Four chunks, so four KV messages and the record."""
WAIT_S = 60.0
A_PIECE = Piece(0, 3, 0, 16)
"""The first block in all layers; long enough for its sender to learn what became of it."""


@dataclass
class Tap:
    """Between the prefill worker and its transport: what it knows, what it sent, and a gate."""

    leases: list[tuple[SequenceSpec, OpenLease]] = field(default_factory=list)
    sent: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    """Address, tag and message."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing leaves while it is not set."""

    async def lease(self, number: int) -> OpenLease:
        async with asyncio.timeout(WAIT_S):
            while len(self.leases) <= number:
                await asyncio.sleep(0.01)
        return self.leases[number][1]

    def sent_into(self, lease: OpenLease) -> list[bytes]:
        return [message for _, tag, message in self.sent if tag == lease.tag]


class TappedTransport(InprocTransport):
    tap: ClassVar[Tap]

    async def send(self, peer, tag, buffer):
        await self.tap.gate.wait()
        self.tap.sent.append((peer, tag, bytes(readable_bytes(buffer))))
        await super().send(peer, tag, buffer)


@pytest.fixture
def tap(monkeypatch) -> Tap:
    """Of every worker's transport; only prefill workers send."""
    TappedTransport.tap = found = Tap()
    monkeypatch.setattr(kvrelay_transfer.setup, "create_transport", lambda _: TappedTransport())
    opened = KvSender.open

    def opening(self: KvSender, lease: OpenLease) -> None:
        found.leases.append((self._spec, lease))
        opened(self, lease)

    monkeypatch.setattr(KvSender, "open", opening)
    return found


@pytest.fixture
async def adversary():
    """A transport that belongs to no worker."""
    transport = InprocTransport()
    await transport.start()
    yield transport
    await transport.abort()


def a_stack(**settings: object):
    return local_stack(
        tiny_model("llama3"), prefill_settings=SETTINGS, decode_settings=SETTINGS, **settings
    )


async def expected(stack: Stack, *prompts: list[int]) -> list[list[int]]:
    return await asyncio.to_thread(reference_generate, stack.model_dir, list(prompts), NEW_TOKENS)


def victim_of(stack: Stack, prompt: list[int] = PROMPT, **options: object):
    return asyncio.create_task(stack.answer(prompt, NEW_TOKENS, **options))


async def check_exact(stack: Stack, victim, tap: Tap, *, prompt: list[int] = PROMPT) -> None:
    """Open the gate: the victim and somebody who comes after it get their answers over KV transfers."""
    right, bystander = await expected(stack, prompt, OTHER)
    tap.gate.set()
    answer = await asyncio.wait_for(victim, WAIT_S)
    assert answer.tokens == right, answer.end
    assert answer.finished().stats.path.kind is PathKind.DISAGGREGATED
    assert answer.finished().stats.replays == 0
    other = await stack.answer(OTHER, NEW_TOKENS, path=PathKind.DISAGGREGATED)
    assert other.tokens == bystander
    await stack.idle_pools()


async def counted(stack: Stack, name: str, count: int) -> None:
    """The router's metric says so; it comes with the decode worker's next report."""
    async with asyncio.timeout(WAIT_S):
        while True:
            registry = stack.core.metrics.registry
            found = registry.get_sample_value(f"kvrelay_kv_{name}_frames_total")
            if found == count:
                return
            assert (found or 0) < count, found
            await asyncio.sleep(0.02)


def a_frame(
    lease: OpenLease,
    key: bytes,
    piece: Piece = A_PIECE,
    *,
    number: int = 0,
    fill: int = 0x41,
    **changes: object,
) -> bytearray:
    """A whole frame of KV that nobody computed, under the names of a lease."""
    layout = lease.layout
    wire = WireFormat.between(layout, layout)
    nbytes = wire.payload_bytes(piece)
    buffer = bytearray(HEADER_SIZE) + bytes([fill]) * nbytes
    header = FrameHeader(
        kind=FrameKind.KV_GROUP,
        lease_id=lease.identity.lease_id,
        epoch=lease.identity.epoch,
        generation=lease.identity.generation,
        sequence=number,
        layer_start=piece.layer_start,
        layer_count=piece.layer_count,
        token_start=piece.token_start,
        token_count=piece.token_count,
        head_start=wire.heads.start,
        head_count=len(wire.heads),
        block_tokens=wire.block_tokens,
        dtype_code=DTYPE_CODES[wire.dtype],
    )
    seal(buffer, replace(header, **changes), nbytes, key)
    return buffer


def key_of(lease: OpenLease, tokens: list[int] = PROMPT, salt: bytes = b"") -> bytes:
    model = lease.layout.model_fingerprint
    return frame_key(lease.ticket, model=model, salt=salt, tokens=tokens)


# ---- 1: out of range


OUT_OF_RANGE = {
    "tokens behind the prompt": {"token_start": 112},
    "tokens far away": {"token_start": 2**31},
    "more tokens than there are": {"token_count": 4096},
    "no token": {"token_count": 0},
    "layers behind the last": {"layer_start": 3},
    "more layers than there are": {"layer_count": 200},
    "heads of nobody": {"head_start": 40},
    "blocks of another size": {"block_tokens": 64},
    "numbers of another kind": {"dtype_code": 3},
}


@pytest.mark.parametrize("changes", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE.keys())
async def test_a_frame_that_names_what_the_lease_does_not_have_is_not_written(
    tap, adversary, changes
):
    async with a_stack() as stack:
        victim = victim_of(stack)
        lease = await tap.lease(0)
        frame = a_frame(lease, key_of(lease), **changes)
        await adversary.send(lease.address, lease.tag, frame)
        await check_exact(stack, victim, tap)
        await counted(stack, "foreign", 1)


async def test_kv_in_front_of_the_lease_is_another_prompts_and_stays_as_it_is(tap, adversary):
    async with a_stack() as stack:
        tap.gate.set()
        await stack.answer(PROMPT, NEW_TOKENS, path=PathKind.DISAGGREGATED)
        tap.gate.clear()
        longer = PROMPT + OTHER
        victim = victim_of(stack, longer)
        lease = await tap.lease(1)
        assert lease.first_block > 0, "the decode worker holds the first prompt's blocks"
        await adversary.send(lease.address, lease.tag, a_frame(lease, key_of(lease, longer)))
        await check_exact(stack, victim, tap, prompt=longer)
        (right,) = await expected(stack, PROMPT)
        assert (await stack.answer(PROMPT, NEW_TOKENS, path=PathKind.LOCAL)).tokens == right
        await counted(stack, "foreign", 1)


async def test_a_part_that_comes_twice_does_not_stand_in_for_one_that_never_came(
    tap, adversary, monkeypatch
):
    """Even who holds the key can't make the victim read blocks as somebody before it left them."""
    pool = {**SETTINGS, "num_blocks": 8}
    async with local_stack(
        tiny_model("llama3"), prefill_settings=SETTINGS, decode_settings=pool
    ) as stack:
        tap.gate.set()
        await stack.answer(OTHER, NEW_TOKENS, path=PathKind.DISAGGREGATED)
        tap.gate.clear()
        verdict = said_of_kv(stack, monkeypatch)
        victim = stack.submit(PROMPT, NEW_TOKENS)
        events = asyncio.create_task(collect(victim))
        lease = await tap.lease(1)
        key, layers = key_of(lease), lease.layout.num_layers
        for number, tokens in enumerate((48, 48, len(PROMPT) - 96)):
            frame = a_frame(lease, key, Piece(0, layers, 0, tokens), number=number)
            await adversary.send(lease.address, lease.tag, frame)
        await adversary.send(lease.address, lease.tag, a_record(lease, key, 3))
        assert await asyncio.wait_for(verdict, WAIT_S) == "kv_missing"
        victim.cancel("it has seen enough")
        await events
        tap.gate.set()
        await stack.idle_pools()
        await counted(stack, "foreign", 2)


def said_of_kv(stack: Stack, monkeypatch) -> asyncio.Future[str]:
    """What the decode worker says first of the transfer's end: that it has all of it, or misses some."""
    verdict = asyncio.get_running_loop().create_future()
    received = stack.core.registry.received

    def listening(link, message: pb.WorkerMessage) -> None:
        kind = message.WhichOneof("message")
        if kind in ("kv_missing", "kv_received") and not verdict.done():
            verdict.set_result(kind)
        received(link, message)

    monkeypatch.setattr(stack.core.registry, "received", listening)
    return verdict


async def collect(stream) -> list:
    return [event async for event in stream]


def a_record(lease: OpenLease, key: bytes, messages: int) -> bytearray:
    """The hand-over record that would end a transfer of so many messages."""
    record = pb.Handover(first_token=5, prompt_tokens=len(PROMPT)).SerializeToString()
    buffer = bytearray(HEADER_SIZE) + record
    header = FrameHeader(
        FrameKind.HANDOVER,
        lease.identity.lease_id,
        lease.identity.epoch,
        lease.identity.generation,
        messages,
        total_messages=messages + 1,
    )
    seal(buffer, header, len(record), key)
    return buffer


# ---- 2: consumed


async def test_a_consumed_lease_takes_nothing_more(tap, adversary):
    async with a_stack() as stack:
        tap.gate.set()
        await stack.answer(PROMPT, NEW_TOKENS, path=PathKind.DISAGGREGATED)
        used = await tap.lease(0)
        recorded = tap.sent_into(used)
        assert len(recorded) > 2
        await stack.idle_pools()
        pool = stack.workers["decode-0"].engine.runner.pool.tensor
        before = pool.clone()
        for message in recorded:
            if len(message) > 8000:
                with pytest.raises(TransferCancelled, match="over"):
                    await adversary.send(used.address, used.tag, message)
            else:
                await adversary.send(used.address, used.tag, message)
        assert pool.equal(before)
        tap.gate.clear()
        victim = victim_of(stack, [*OTHER, 7])
        await tap.lease(1)
        await check_exact(stack, victim, tap, prompt=[*OTHER, 7])


async def test_a_consumed_transfer_replayed_into_another_one_is_foreign(tap, adversary):
    async with a_stack() as stack:
        tap.gate.set()
        await stack.answer(OTHER, NEW_TOKENS, path=PathKind.DISAGGREGATED)
        recorded = tap.sent_into(await tap.lease(0))
        tap.gate.clear()
        victim = victim_of(stack)
        lease = await tap.lease(1)
        for message in recorded:
            await adversary.send(lease.address, lease.tag, message)
        await check_exact(stack, victim, tap)
        await counted(stack, "foreign", len(recorded))


async def test_what_was_sent_once_may_come_again_in_its_own_transfer(tap, adversary):
    """A repeat is no damage: it changes nothing."""
    async with a_stack() as stack:
        victim = victim_of(stack)
        lease = await tap.lease(0)
        tap.gate.set()
        async with asyncio.timeout(WAIT_S):
            while not tap.sent_into(lease):
                await asyncio.sleep(0)
        first = tap.sent_into(lease)[0]
        repeat = asyncio.create_task(adversary.send(lease.address, lease.tag, first))
        await check_exact(stack, victim, tap)
        await asyncio.gather(repeat, return_exceptions=True)


# ---- 3: stale after its blocks were given to somebody else


async def test_a_stale_lease_does_not_reach_the_one_that_has_its_blocks_now(tap, adversary):
    pool = {**SETTINGS, "num_blocks": 8}
    async with local_stack(
        tiny_model("llama3"), prefill_settings=SETTINGS, decode_settings=pool
    ) as stack:
        first = stack.submit(OTHER, NEW_TOKENS, path=PathKind.DISAGGREGATED)
        events = [event async for event in _until_lease(first, tap)]
        assert events
        stale = await tap.lease(0)
        first.cancel("the client leaves")
        await stack.idle_pools()
        victim = victim_of(stack)
        lease = await tap.lease(1)
        assert lease.identity.generation > stale.identity.generation
        for key in (key_of(stale, OTHER), key_of(stale)):
            frame = a_frame(stale, key)
            with pytest.raises(TransferCancelled, match="over"):
                await adversary.send(stale.address, stale.tag, frame)
            await adversary.send(lease.address, lease.tag, frame)
            # The victim's lease by name, but for the allocation.
            generation = stale.identity.generation
            renamed = a_frame(lease, key, generation=generation)
            await adversary.send(lease.address, lease.tag, renamed)
        await check_exact(stack, victim, tap)
        await counted(stack, "foreign", 4)


async def _until_lease(stream, tap: Tap):
    async for event in stream:
        yield event
        if tap.leases:
            return


# ---- 4: wrong engine


async def test_frames_for_an_earlier_process_of_the_same_name_are_foreign(tap, adversary):
    async with a_stack() as stack:
        tap.gate.set()
        await stack.answer(OTHER, NEW_TOKENS, path=PathKind.DISAGGREGATED)
        earlier = await tap.lease(0)
        await stack.workers.pop("decode-0").stop()
        await stack.add_worker("decode", "decode-0", **SETTINGS)
        tap.gate.clear()
        victim = victim_of(stack)
        lease = await tap.lease(1)
        assert lease.identity.epoch != earlier.identity.epoch
        renamed = a_frame(lease, key_of(lease), epoch=earlier.identity.epoch)
        await adversary.send(lease.address, lease.tag, renamed)
        await adversary.send(lease.address, lease.tag, tap.sent_into(earlier)[0])
        await check_exact(stack, victim, tap)
        await counted(stack, "foreign", 2)


@pytest.mark.parametrize("how", ["drained", "killed"])
async def test_a_prefill_worker_that_comes_back_under_its_name_is_another_one(tap, how):
    async with a_stack() as stack:
        victim = victim_of(stack)
        await tap.lease(0)
        lost = stack.workers.pop("prefill-0")
        if how == "killed":
            lost.task.cancel()
            await asyncio.gather(lost.task, return_exceptions=True)
        back = asyncio.create_task(stack.add_worker("prefill", "prefill-0", **SETTINGS))
        tap.gate.set()
        (right,) = await expected(stack, PROMPT)
        assert (await asyncio.wait_for(victim, WAIT_S)).tokens == right
        await back
        if how == "drained":
            await lost.stop()
        again = await stack.answer([*PROMPT, 3], NEW_TOKENS)
        assert again.tokens == (await expected(stack, [*PROMPT, 3]))[0]
        await stack.idle_pools()


# ---- 5: foreign tenant


async def test_another_tenants_kv_of_the_same_prompt_is_foreign(tap, adversary):
    async with a_stack() as stack:
        victim = victim_of(stack, salt=b"tenant a")
        lease = await tap.lease(0)
        wrong = [key_of(lease, salt=b"tenant b"), key_of(lease), key_of(lease, OTHER, b"tenant a")]
        wrong.append(key_of(replace(lease, ticket=new_ticket()), salt=b"tenant a"))
        for key in wrong:
            await adversary.send(lease.address, lease.tag, a_frame(lease, key))
        await check_exact(stack, victim, tap)
        await counted(stack, "foreign", len(wrong))


async def test_tenants_share_no_block_of_the_same_prompt(tap):
    async with a_stack() as stack:
        tap.gate.set()
        (right,) = await expected(stack, PROMPT)
        for salt in (b"tenant a", b"tenant b", b""):
            answer = await stack.answer(PROMPT, NEW_TOKENS, salt=salt)
            assert answer.tokens == right
            assert answer.finished().stats.cached_tokens == 0
        leases = [lease for _, lease in tap.leases]
        assert [lease.first_block for lease in leases] == [0, 0, 0]
        assert len({lease.ticket for lease in leases}) == 3
        again = await stack.answer(PROMPT, NEW_TOKENS, salt=b"tenant a")
        assert again.tokens == right
        assert again.finished().stats.cached_tokens > 0


# ---- repeated ids


async def test_a_submit_that_comes_twice_is_one_sequence(tap, monkeypatch):
    async with a_stack() as stack:
        registry = stack.core.registry
        send = registry.send

        def twice(name: str, message: pb.RouterMessage) -> None:
            send(name, message)
            if (message.WhichOneof("message") or "").startswith("submit"):
                again = pb.RouterMessage()
                again.CopyFrom(message)
                send(name, again)

        monkeypatch.setattr(registry, "send", twice)
        tap.gate.set()
        prompts = [PROMPT, OTHER, [*OTHER, 9]]
        right = await expected(stack, *prompts)
        answers = await asyncio.gather(*(stack.answer(p, NEW_TOKENS) for p in prompts))
        assert [answer.tokens for answer in answers] == right
        await stack.idle_pools()
