"""Who may read a worker's weights, what it says to everybody else, and how it lets go of a reader."""

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Callable

import pytest

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import WeightsRefused
from kvrelay_transfer.transport import KVTransport
from kvrelay_transfer.weights import server as module
from kvrelay_transfer.weights.server import WeightServer
from kvrelay_transfer.weights.wire import (
    MAX_ANSWER_BYTES,
    MESSAGE_BYTES,
    OpenedRequest,
    Request,
    Verdict,
    pack_answer,
    unpack_answer,
    weights_key,
)

UNIT = 10 * 1024
"""More than the in-process transport copies at once: a send of it waits for a receive."""
IDENTITY = "f" * 32
CONTENT = random.Random(3).randbytes(3 * UNIT + 17)


class Content:
    """Weights of one file; `identity` is what they are now."""

    def __init__(self) -> None:
        self.identity = IDENTITY
        self.reads = 0

    def has(self, file: str, start: int, end: int) -> bool:
        return file == "m" and 0 <= start < end <= len(CONTENT)

    def read(self, file: str, start: int, into: memoryview) -> None:
        self.reads += 1
        into[:] = CONTENT[start : start + len(into)]


class Reader:
    """The other side, by hand."""

    def __init__(self, transport: KVTransport, server: bytes, offer: pb.OfferWeights) -> None:
        self.transport, self.server = transport, server
        self.tag, self.key = offer.tag, weights_key(offer.ticket)
        self.number = 0

    async def ask(self, start=0, nbytes=100, *, file="m", identity=IDENTITY, number=None, key=None):
        """The verdict, and the data's buffer where it is a yes."""
        self.number = self.number + 1 if number is None else number
        answer, data = secrets.randbits(64), secrets.randbits(64)
        request = Request(self.number, file, start, nbytes, answer, data, identity, UNIT)
        got, into = bytearray(MAX_ANSWER_BYTES), bytearray(nbytes)
        waiting = self.transport.receive(answer, got)
        pieces = [
            self.transport.receive(data, memoryview(into)[at : at + UNIT])
            for at in range(0, nbytes, UNIT)
        ]
        await self.transport.send(self.server, self.tag, request.pack(key or self.key))
        size = await asyncio.wait_for(waiting.wait(), 60)
        verdict = unpack_answer(bytes(got[:size]), self.number, self.key)
        for piece in pieces:
            if verdict is Verdict.YES:
                await asyncio.wait_for(piece.wait(), 60)
            else:
                await piece.cancel()
        return verdict, bytes(into)


@pytest.fixture
def scheme() -> str:
    """Without processes; tests/weights/test_peer_processes.py has real ones and UCX."""
    return "inproc"


@pytest.fixture
async def serving(pair):
    """A server, its weights, and a way to be offered them."""
    ours, theirs = pair
    weights, readers = Content(), []
    server = WeightServer(ours, weights, busy=lambda: False)

    def offer(**changes: object) -> Reader:
        message = pb.OfferWeights(
            worker_name="decode-1",
            weights_id=IDENTITY,
            transport_address=theirs.address,
            tag=secrets.randbits(64),
            ticket=secrets.token_bytes(32),
            seconds=60.0,
        )
        for name, value in changes.items():
            setattr(message, name, value)
        server.offer(message)
        readers.append(Reader(theirs, ours.address, message))
        return readers[-1]

    yield server, weights, offer
    await server.close()


async def test_a_reader_with_a_ticket_gets_every_byte(serving):
    _, _, offer = serving
    reader = offer()
    for start, nbytes in ((0, len(CONTENT)), (5, 1), (UNIT - 1, UNIT + 2)):
        verdict, found = await reader.ask(start, nbytes)
        assert verdict is Verdict.YES
        assert found == CONTENT[start : start + nbytes]


async def test_readers_take_turns(serving):
    _, _, offer = serving
    readers = [offer() for _ in range(3)]
    answers = await asyncio.gather(*(reader.ask(0, len(CONTENT)) for reader in readers))
    assert answers == [(Verdict.YES, CONTENT)] * 3


@pytest.mark.parametrize(
    ("request_of", "verdict"),
    [
        ({"key": bytes(32)}, Verdict.WRONG_TICKET),
        ({"identity": "another"}, Verdict.OTHER_WEIGHTS),
        ({"file": "../../etc/passwd"}, Verdict.NOT_HERE),
        ({"start": len(CONTENT)}, Verdict.NOT_HERE),
        ({"number": 0}, Verdict.REPEATED),
    ],
)
async def test_what_is_not_right_is_refused_and_logged(serving, caplog, request_of, verdict):
    server, weights, offer = serving
    caplog.set_level(logging.WARNING)
    reader = offer()
    assert (await reader.ask(**request_of))[0] is verdict
    assert weights.reads == 0
    assert server.refused == {verdict: 1}
    assert f"in the name of worker decode-1 is refused: {verdict.name.lower()}" in caplog.text
    assert (await reader.ask(number=1))[0] is Verdict.YES


async def test_a_request_works_once(serving):
    _, _, offer = serving
    reader = offer()
    assert (await reader.ask(number=7))[0] is Verdict.YES
    assert (await reader.ask(number=7))[0] is Verdict.REPEATED
    assert (await reader.ask(number=6))[0] is Verdict.REPEATED


async def test_an_offer_for_other_weights_than_these_is_worth_nothing(serving):
    _, weights, offer = serving
    assert (await offer(weights_id="others").ask(identity="others"))[0] is Verdict.OTHER_WEIGHTS
    weights.identity = ""  # such as after the disk was full
    assert (await offer().ask())[0] is Verdict.OTHER_WEIGHTS


async def test_a_late_reader_is_told_so(serving):
    _, _, offer = serving
    assert (await offer(seconds=0.0).ask())[0] is Verdict.EXPIRED


async def test_an_offer_that_nobody_uses_ends(serving, monkeypatch):
    server, _, offer = serving
    monkeypatch.setattr(module, "REFUSE_S", 0.0)
    offer(seconds=0.0)
    async with asyncio.timeout(60):
        while server._offers:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(2048), bytes(5000)])
async def test_bytes_that_are_no_request_are_refused(serving, content):
    server, weights, offer = serving
    reader = offer()
    await reader.transport.send(reader.server, reader.tag, content)
    async with asyncio.timeout(60):
        while Verdict.MALFORMED not in server.refused:
            await asyncio.sleep(0.01)
    assert weights.reads == 0
    assert (await reader.ask())[0] is Verdict.YES


async def test_without_an_offer_nothing_is_answered(serving):
    server, weights, offer = serving
    known = offer()
    stranger = Reader(known.transport, known.server, pb.OfferWeights(tag=1, ticket=bytes(32)))
    asking = asyncio.create_task(stranger.ask())
    assert (await known.ask())[0] is Verdict.YES
    assert not asking.done()
    assert (weights.reads, server.refused) == (1, {})
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


async def test_an_offer_without_a_ticket_is_void(serving, caplog):
    server, _, offer = serving
    with pytest.raises(WeightsRefused, match="a ticket of 3 bytes; it needs 32"):
        offer(ticket=b"abc")
    assert not server._offers
    assert "an offer of weights for decode-1 is void" in caplog.text


async def test_no_more_readers_than_a_few(serving, caplog):
    server, _, offer = serving
    for _ in range(module.MAX_OFFERS + 1):
        offer()
    assert len(server._offers) == module.MAX_OFFERS
    assert "decode-1 waits in vain" in caplog.text


async def test_a_reader_that_goes_frees_the_turn(serving):
    _, _, offer = serving
    reader, other = offer(), offer()
    answer, data = secrets.randbits(64), secrets.randbits(64)
    request = Request(1, "m", 0, len(CONTENT), answer, data, IDENTITY, UNIT)
    received = reader.transport.receive(answer, bytearray(MAX_ANSWER_BYTES))
    await reader.transport.send(reader.server, reader.tag, request.pack(reader.key))
    await asyncio.wait_for(received.wait(), 60)
    asking = asyncio.create_task(other.ask(0, len(CONTENT)))
    reader.transport.end(data)  # it wants nothing of it any more
    assert (await asking)[0] is Verdict.YES
    reader.number = 1
    assert (await reader.ask(0, 10))[0] is Verdict.YES


async def test_a_worker_with_requests_looks_after_every_message(pair):
    ours, theirs = pair
    looks: list[bool] = []

    def busy() -> bool:
        looks.append(True)
        return True

    server = WeightServer(ours, Content(), busy=busy)
    offer = pb.OfferWeights(worker_name="d", weights_id=IDENTITY, seconds=60.0, tag=5,
                            transport_address=theirs.address, ticket=bytes(32))  # fmt: skip
    server.offer(offer)
    reader = Reader(theirs, ours.address, offer)
    assert await reader.ask(0, len(CONTENT)) == (Verdict.YES, CONTENT)
    assert (await reader.ask(0, 10))[0] is Verdict.YES  # the range before it has ended
    assert len(looks) >= 4
    await server.close()


def test_a_busy_worker_sends_a_quarter_of_the_time():
    assert module.pause_s(1.0) / (1.0 + module.pause_s(1.0)) == pytest.approx(0.75)


# ---- the wire


def request(**changes: object) -> Request:
    fields = {"number": 1, "file": "m", "start": 2, "nbytes": 3, "answer_tag": 4, "data_tag": 5}
    return Request(**(fields | {"weights_id": "id"} | changes))


KEY = weights_key(bytes(32))


def test_a_request_comes_out_as_it_went_in():
    opened = OpenedRequest.unpack(request(file="ü" * 100).pack(KEY), KEY)
    assert isinstance(opened, OpenedRequest)
    assert (opened.number, opened.file, opened.start, opened.nbytes) == (1, "ü" * 100, 2, 3)
    assert (opened.answer_tag, opened.data_tag) == (4, 5)


def test_every_flipped_bit_of_a_request_is_noticed():
    sound = request().pack(KEY)
    for bit in range(len(sound) * 8):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        assert isinstance(OpenedRequest.unpack(bytes(damaged), KEY), Verdict), bit


@pytest.mark.parametrize("cut", range(0, 80, 7))
def test_a_short_request_is_malformed(cut):
    assert OpenedRequest.unpack(request().pack(KEY)[:cut], KEY) is Verdict.MALFORMED


@pytest.mark.parametrize(
    "sizes",
    [
        {"nbytes": 0},
        {"nbytes": 1 << 41},
        {"message_bytes": 0},
        {"message_bytes": MESSAGE_BYTES + 1},
    ],
)
def test_a_range_has_some_bytes_and_not_all_the_world(sizes):
    assert OpenedRequest.unpack(request(**sizes).pack(KEY), KEY) is Verdict.MALFORMED


@pytest.mark.parametrize(
    "damage",
    [
        lambda answer: answer[:-1],
        lambda answer: answer[:6] + b"\x03\x00" + answer[8:],
        lambda answer: answer[:-1] + bytes([answer[-1] ^ 1]),
    ],
)
def test_an_answer_is_believed_only_from_the_ticket_holder(damage: Callable[[bytes], bytes]):
    answer = pack_answer(3, Verdict.YES, KEY)
    assert unpack_answer(answer, 3, KEY) is Verdict.YES
    with pytest.raises(WeightsRefused):
        unpack_answer(damage(answer), 3, KEY)
    with pytest.raises(WeightsRefused):
        unpack_answer(answer, 4, KEY)
