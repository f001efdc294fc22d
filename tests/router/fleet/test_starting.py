"""Which words of a worker that starts count, without the gRPC in between."""

from pathlib import Path

import pytest

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import InvalidRequest, LayoutMismatch, Unauthorized
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry

CONFIG = RouterConfig(Path("unused"), "demo", join_token="open sesame")
FITTING = {
    "protocol_version": JOIN_VERSION,
    "worker_name": "d0",
    "role": pb.ROLE_DECODE,
    "model": "demo",
    "join_token": "open sesame",
}


CALL = object()


@pytest.mark.parametrize(
    ("odd", "error", "words"),
    [
        ({"join_token": "x"}, Unauthorized, "join_token"),
        ({"worker_name": ""}, InvalidRequest, "worker_name"),
        ({"role": 0}, InvalidRequest, "role"),
        ({"model": "other"}, LayoutMismatch, "model.*'other'.*'demo'"),
        ({"protocol_version": 1}, LayoutMismatch, "protocol_version.*1"),
    ],
)
async def test_one_that_could_not_join_is_refused_and_not_noted(odd, error, words):
    registry = WorkerRegistry(CONFIG)
    with pytest.raises(error, match=words):
        registry.starts(pb.Starting(**FITTING | odd), CALL)
    assert registry.starting == ()


async def test_the_last_word_counts_until_its_call_ends():
    registry = WorkerRegistry(CONFIG)
    registry.starts(pb.Starting(**FITTING, phase="import"), CALL)
    registry.starts(pb.Starting(**FITTING, phase="load_weights", done=3, total=9), CALL)
    assert [(w.phase, w.done, w.total) for w in registry.starting] == [("load_weights", 3, 9)]
    registry.starts_no_more("d0", CALL)
    registry.starts_no_more("d0", CALL)
    assert registry.starting == ()


async def test_the_end_of_an_earlier_process_leaves_the_one_after_it():
    registry, later = WorkerRegistry(CONFIG), object()
    registry.starts(pb.Starting(**FITTING, phase="warm_up"), CALL)
    registry.starts(pb.Starting(**FITTING, phase="import"), later)
    registry.starts_no_more("d0", CALL)
    assert [worker.phase for worker in registry.starting] == ["import"]
    registry.starts_no_more("d0", later)
    assert registry.starting == ()


async def test_a_word_of_one_that_has_joined_is_ignored():
    registry = WorkerRegistry(CONFIG)
    registry.starts(pb.Starting(**FITTING), CALL)
    registry.join(pb.Hello(**FITTING))
    assert registry.starting == ()
    registry.starts(pb.Starting(**FITTING), CALL)
    assert registry.starting == ()
