"""The line in front of a Join stream: order, company, bounds."""

import asyncio

import pytest

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import outgoing as module
from kvrelay_protocol.outgoing import Outgoing, each


def urgent(number: int) -> pb.RouterMessage:
    return pb.RouterMessage(cancel=pb.Cancel(sequence_id=number))


def patient(number: int) -> pb.RouterMessage:
    return pb.RouterMessage(release_kv=pb.ReleaseKv(sequence_id=number))


def resend(count: int) -> pb.RouterMessage:
    return pb.RouterMessage(resend_kv=pb.ResendKv(sequence_id=count, messages=range(count)))


def number(message: pb.RouterMessage) -> int:
    return getattr(message, message.WhichOneof("message")).sequence_id


def numbers(message: pb.RouterMessage) -> list[int]:
    found: list[int] = []
    each(message, lambda part: found.append(number(part)))
    return found


@pytest.fixture
def line() -> Outgoing[pb.RouterMessage]:
    return Outgoing(pb.RouterMessage, 100)


async def test_a_message_alone_leaves_as_it_is(line) -> None:
    line.put(urgent(1))
    message = await line.next()
    assert (message.WhichOneof("message"), number(message)) == ("cancel", 1)


async def test_what_leaves_is_numbered_and_a_batch_has_one_number(line) -> None:
    for at in range(3):
        line.put(urgent(at))
    batch = await line.next()
    line.put(urgent(3))
    assert (batch.number, (await line.next()).number) == (1, 2)
    assert [part.number for part in batch.batch.messages] == [0, 0, 0]


async def test_what_waits_leaves_as_one_message_in_order(line) -> None:
    for at in range(10):
        line.put(urgent(at) if at % 3 == 0 else patient(at))
    assert numbers(await line.next()) == list(range(10))
    assert len(line) == 0


async def test_a_batch_survives_the_wire(line) -> None:
    for at in range(3):
        line.put(urgent(at))
    message = await line.next()
    assert numbers(pb.RouterMessage.FromString(message.SerializeToString())) == [0, 1, 2]


async def test_a_patient_message_waits_for_the_next_urgent_one(line, monkeypatch) -> None:
    monkeypatch.setattr(module, "LINGER_S", 60.0)
    line.put(patient(1))
    reading = asyncio.create_task(line.next())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reading.done()
    line.put(urgent(2))
    assert numbers(await reading) == [1, 2]


@pytest.mark.parametrize("round_", [0, 1])
async def test_a_patient_message_leaves_by_itself_again_and_again(line, round_) -> None:
    for at in range(round_ + 1):
        line.put(patient(at))
        assert numbers(await asyncio.wait_for(line.next(), 10)) == [at]


async def test_nothing_is_read_twice_and_an_empty_line_waits(line) -> None:
    line.put(patient(1))
    line.put(urgent(2))
    await line.next()
    reading = asyncio.create_task(line.next())
    await asyncio.sleep(2 * module.LINGER_S)  # the first one's time is over; it has left already
    assert not reading.done()
    line.put(urgent(3))
    assert numbers(await reading) == [3]


async def test_a_batch_has_a_size_and_what_is_larger_goes_alone(line, monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1000)
    sizes = [100, 200, 300, 2000, 5, 2000, 400, 300]
    for size in sizes:
        line.put(resend(size))
    read = []
    while len(line):
        message = await line.next()
        read.append(numbers(message))
        assert len(read[-1]) == 1 or message.ByteSize() < 1100
    assert [size for some in read for size in some] == sizes
    assert len(read) < len(sizes)


async def test_the_limit_counts_messages(line) -> None:
    assert all(line.put(patient(at)) for at in range(100))
    assert not line.put(urgent(100))
    assert len(numbers(await line.next())) == 100
    assert line.put(urgent(100))


async def test_close_lets_everything_out_first(line, monkeypatch) -> None:
    monkeypatch.setattr(module, "LINGER_S", 60.0)
    line.put(patient(1))
    line.close()
    assert numbers(await line.next()) == [1]
    assert await line.next() is None
    assert await line.next() is None


def test_a_message_that_fails_costs_no_neighbour_and_is_not_forgotten() -> None:
    handled = []

    def handle(message: pb.RouterMessage) -> None:
        handled.append(number(message))
        if handled[-1] % 2:
            raise ValueError(handled[-1])

    batch = pb.RouterMessage()
    batch.batch.messages.extend([urgent(at) for at in range(5)])
    with pytest.raises(ValueError, match="1"):
        each(batch, handle)
    assert handled == [0, 1, 2, 3, 4]


def test_an_empty_batch_is_nothing() -> None:
    assert numbers(pb.RouterMessage(batch=pb.RouterBatch())) == []
