"""What a decode worker does with its routers' pulses, and with routers that are gone."""

import pytest
from bare_worker import bench, submit_decode, until

from kvrelay_decode.worker import DecodeWorker
from kvrelay_protocol import fleet_pb2 as pb


@pytest.fixture
async def decode():
    made = await bench(DecodeWorker)
    yield made
    made.worker.drop_all("the test ends")
    await made.stopped()
    await made.close()


def pulse(*live: int, stalled: tuple[int, ...] = ()) -> pb.Pulse:
    return pb.Pulse(live=live, stalled=stalled)


async def leased(decode, *sequence_ids: int, session: int = 0) -> None:
    before = len(decode.host.named("lease_granted"))
    for sequence_id in sequence_ids:
        decode.worker.handle(submit_decode(sequence_id), session)
    decode.turn()
    await until(
        lambda: len(decode.host.named("lease_granted")) == before + len(sequence_ids),
    )


async def test_what_a_pulse_does_not_name_is_let_go_and_counted(decode):
    await leased(decode, 1, 2)
    decode.worker.handle(submit_decode(3, expect_kv=False))
    assert decode.worker.pulse(pulse(2)) == []
    await until(lambda: decode.worker.open_sequences == 1)
    decode.turn()
    assert decode.scheduler.load().leased_blocks == 2
    load = pb.Load()
    decode.worker.add_load(load)
    assert load.let_go == 2
    assert not decode.host.named("sequence_failed"), "nobody is left to be told"


async def test_what_a_pulse_names_and_is_not_here_is_said(decode):
    await leased(decode, 1)
    assert sorted(decode.worker.pulse(pulse(1, 8, 9))) == [8, 9]
    assert decode.worker.open_sequences == 1


async def test_a_sequence_that_is_being_stopped_is_not_let_go_twice(decode):
    await leased(decode, 1)
    for _ in range(2):
        assert decode.worker.pulse(pulse()) == []
    load = pb.Load()
    decode.worker.add_load(load)
    assert load.let_go == 1


async def test_a_pulse_renews_the_leases_of_what_lives_and_is_not_stalled(decode, monkeypatch):
    await leased(decode, 1, 2, 3)
    renewed = []
    for own, sequence in decode.worker._sequences.items():
        monkeypatch.setattr(sequence.receiver, "renew", lambda own=own: renewed.append(own))
    decode.worker.handle(submit_decode(4, expect_kv=False))
    decode.worker.pulse(pulse(1, 3, 4))
    assert sorted(renewed) == [1, 3]
    decode.worker.pulse(pulse(1, 3, 4, stalled=(3,)))
    assert sorted(renewed) == [1, 1, 3]


async def test_a_lease_that_is_stalled_from_the_start_has_an_end_too(decode, monkeypatch):
    await leased(decode, 1)
    renewed = []
    monkeypatch.setattr(decode.worker._sequences[1].receiver, "renew", lambda: renewed.append(1))
    for _ in range(3):
        decode.worker.pulse(pulse(1, stalled=(1,)))
    assert renewed == [1]


async def test_a_stalled_lease_expires_and_gives_its_blocks_back(decode):
    decode.worker.handle(submit_decode(1, lease_s=0.05))
    decode.turn()
    await until(lambda: decode.host.named("lease_granted"))
    decode.worker.pulse(pulse(1, stalled=(1,)))
    await until(lambda: decode.host.named("sequence_failed"))
    assert decode.host.named("sequence_failed")[0].error.code == "lease_lost"
    decode.turn()
    assert decode.scheduler.load().leased_blocks == 0


async def test_a_pulse_of_one_router_says_nothing_of_anothers_sequences(decode):
    await leased(decode, 1, 2, session=0)
    await leased(decode, 1, session=5)
    assert decode.worker.pulse(pulse(2, 3), 5) == [2, 3]
    await until(lambda: decode.worker.open_sequences == 2)
    assert decode.worker.pulse(pulse(1, 2), 0) == []


async def test_sequences_of_two_routers_with_one_id_are_two(decode):
    for session in (0, 5):
        decode.worker.handle(submit_decode(1, expect_kv=False, max_tokens=3), session)
    while decode.turn():
        pass
    for session in (0, 5):
        mine = [
            run
            for message, whose in zip(decode.host.sent, decode.host.sessions, strict=True)
            for run in message.step_output.runs
            if whose == session
        ]
        assert [(run.sequence_id, run.first_index) for run in mine] == [(1, 0), (1, 1), (1, 2)]


async def test_a_lost_router_takes_its_own_sequences_and_no_others(decode):
    await leased(decode, 1, session=0)
    await leased(decode, 1, 2, session=5)
    decode.worker.drop(5, "the router is gone")
    await until(lambda: decode.worker.open_sequences == 1)
    assert decode.worker.pulse(pulse(1), 0) == []
