"""The request machine: every path as an exact list of actions."""

from dataclasses import dataclass

import pytest

from kvrelay_protocol import errors
from kvrelay_protocol.fleet_pb2 import Lease
from kvrelay_router.requests import actions as act
from kvrelay_router.requests import events as ev
from kvrelay_router.requests import machine as m
from kvrelay_router.requests.machine import State
from kvrelay_router.requests.types import (
    Failed,
    Finished,
    FinishReason,
    Path,
    PathKind,
    Placed,
    Queued,
    RequestStats,
    Resumed,
    Started,
    Tokens,
)

from .conftest import a_request

SPLIT = Path(PathKind.DISAGGREGATED, "least_loaded", "P", "D")
LOCAL = Path(PathKind.LOCAL, "no_prefill_worker", None, "D")
REPLAY = Path(PathKind.DISAGGREGATED, "replay", "P", "E")
LEASE = Lease(lease_id=b"l" * 16, epoch=9)
PROMPT = (11, 12, 13)


@dataclass(frozen=True)
class Failure:
    """Stands for `Emit(Failed(error))`, which compares by identity."""

    kind: type
    words: str = ""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, act.Emit)
            and isinstance(other.event, Failed)
            and type(other.event.error) is self.kind
            and self.words in other.event.error.message
        )

    __hash__ = None


def make(**options: object) -> m.RequestMachine:
    settings = {"max_replays": 2, "queue_timeout_s": 30.0, "replay_wait_s": 2.0, "received_at": 0.0}
    settings |= {k: options.pop(k) for k in tuple(options) if k in settings}
    request = a_request(**({"prompt_tokens": PROMPT, "max_tokens": 4, "deadline_s": 9.0} | options))
    return m.RequestMachine(request, **settings)


def placed(path: Path = SPLIT, **options: object) -> m.RequestMachine:
    machine = make(**options)
    machine.handle(ev.Admitted(0.0))
    machine.handle(ev.PlaceFound(1.0, 7, path))
    return machine


def attempt(**changes: object) -> act.Attempt:
    fields = {
        "sequence_id": 7,
        "tokens": PROMPT,
        "output_offset": 0,
        "max_tokens": 4,
        "deadline_s": 8.0,
    }
    return act.Attempt(**(fields | changes))


def tokens(worker: str, first: int, *ids: int, at: float = 2.0, finish=None, sid: int = 7):
    return ev.TokensArrived(at, sid, worker, first, ids, finish)


def received(sid: int = 7, at: float = 3.0) -> ev.KvReceived:
    return ev.KvReceived(at, sid, "D", 640, 0.25, 0.125, "tcp")


def sent(sid: int = 7) -> ev.KvSent:
    return ev.KvSent(2.5, sid, "P", 640, 0.25, 0.5, "tcp")


def failed(worker: str, error: errors.KvrelayError, sid: int = 7) -> ev.SequenceFailed:
    return ev.SequenceFailed(3.0, sid, worker, error)


FIND_AGAIN = act.FindPlace(1, 2.0, cause="worker_lost")
CANCEL_BOTH = [act.Cancel("D", 7, "finished"), act.Cancel("P", 7, "finished")]


def cancel(worker: str, reason: str, sid: int = 7) -> act.Cancel:
    return act.Cancel(worker, sid, reason)


def test_undisturbed_disaggregated_request() -> None:
    machine = make()
    assert machine.state is State.RECEIVED
    assert machine.handle(ev.Admitted(0.0)) == [act.FindPlace(0, 30.0)]
    assert machine.handle(ev.PlaceFound(1.0, 7, SPLIT)) == [
        act.Emit(Placed(SPLIT, 0)),
        act.SubmitPrefill("P", attempt()),
        act.SubmitDecode("D", attempt(), expect_kv=True),
    ]
    assert machine.state is State.PLACED
    assert machine.handle(ev.SequenceStarted(1.5, 7, "P", 2, 0.25)) == [act.Emit(Started(2))]
    assert machine.state is State.PREFILLING
    assert machine.handle(ev.LeaseGranted(1.6, 7, "D", LEASE)) == [act.OpenTransfer("P", 7, LEASE)]
    assert machine.handle(tokens("P", 0, 50)) == [act.Emit(Tokens((50,)))]
    assert machine.state is State.TRANSFERRING
    assert machine.handle(sent()) == [act.AllSent("D", 7)]
    assert machine.handle(received()) == [act.ReleaseKv("P", 7)]
    assert machine.handle(sent()) == []
    assert machine.state is State.DECODING
    assert machine.handle(tokens("D", 1, 51, 52, at=4.0)) == [act.Emit(Tokens((51, 52)))]
    stats = RequestStats(
        path=SPLIT,
        prompt_tokens=3,
        completion_tokens=4,
        cached_tokens=2,
        queue_s=1.0,
        prefill_s=0.5,
        kv_transfer_s=0.25,
        kv_exposed_s=0.125,
        decode_s=3.0,
        time_to_first_token_s=2.0,
        kv_bytes=640,
        kv_transport="tcp",
    )
    assert machine.handle(tokens("D", 3, 53, at=5.0, finish=FinishReason.LENGTH)) == [
        act.Emit(Tokens((53,))),
        act.Emit(Finished(FinishReason.LENGTH, stats)),
    ]
    assert machine.state is State.FINISHED


def test_undisturbed_local_request() -> None:
    machine = make()
    machine.handle(ev.Admitted(0.0))
    assert machine.handle(ev.PlaceFound(1.0, 7, LOCAL)) == [
        act.Emit(Placed(LOCAL, 0)),
        act.SubmitDecode("D", attempt(), expect_kv=False),
    ]
    assert machine.handle(ev.SequenceStarted(1.5, 7, "D", 0, 0.25)) == [act.Emit(Started(0))]
    assert machine.handle(ev.LeaseGranted(1.6, 7, "D", LEASE)) == []
    assert machine.handle(received()) == []
    assert machine.handle(tokens("D", 0, 50)) == [act.Emit(Tokens((50,)))]
    assert machine.state is State.DECODING
    stats = RequestStats(LOCAL, 3, 2, 0, 1.0, 0.75, decode_s=1.0, time_to_first_token_s=2.0)
    assert machine.handle(tokens("D", 1, 51, at=3.0, finish=FinishReason.STOP)) == [
        act.Emit(Tokens((51,))),
        act.Emit(Finished(FinishReason.STOP, stats)),
    ]


def test_waiting_is_told_and_ends_in_a_place() -> None:
    machine = make()
    machine.handle(ev.Admitted(0.0))
    assert machine.handle(ev.NoPlace(0.0, 3, 1.5, parked=False)) == [act.Emit(Queued(3, 1.5))]
    assert machine.state is State.QUEUED
    assert machine.handle(ev.NoPlace(0.0, 3, None, parked=True)) == [act.Emit(Queued(3, None))]
    assert machine.state is State.PARKED
    assert len(machine.handle(ev.PlaceFound(1.0, 7, SPLIT))) == 3
    assert machine.handle(ev.NoPlace(1.0, 1, None, parked=True)) == []
    assert machine.handle(ev.PlaceFound(1.0, 8, SPLIT)) == []
    assert machine.handle(ev.PlaceTimedOut(30.0, 0, 1.0)) == []


def test_nobody_takes_it_in_time() -> None:
    machine = make()
    machine.handle(ev.Admitted(0.0))
    machine.handle(ev.NoPlace(0.0, 1, None, parked=True))
    (action,) = machine.handle(ev.PlaceTimedOut(30.0, 0, 4.0))
    assert action == Failure(errors.NoCapacity, "30 s")
    assert action.event.error.retry_after_s == 4.0
    assert machine.state is State.FAILED


def test_first_token_that_ends_the_answer_cancels_both() -> None:
    machine = placed()
    machine.handle(ev.SequenceStarted(1.5, 7, "P", 0, 0.25))
    actions = machine.handle(tokens("P", 0, 2, finish=FinishReason.STOP))
    assert actions[:3] == [act.Emit(Tokens((2,))), *CANCEL_BOTH]
    assert actions[3].event.reason is FinishReason.STOP
    assert len(actions) == 4


def test_length_is_enforced_where_the_worker_forgets_to_finish() -> None:
    machine = placed(max_tokens=1)
    machine.handle(ev.SequenceStarted(1.5, 7, "P", 0, 0.25))
    actions = machine.handle(tokens("P", 0, 50))
    assert actions[:3] == [act.Emit(Tokens((50,))), *CANCEL_BOTH]
    assert actions[3].event.reason is FinishReason.LENGTH


def test_tokens_before_any_start_message_start_the_stream() -> None:
    machine = placed()
    assert machine.handle(tokens("P", 0, 50)) == [
        act.Emit(Started(0)),
        act.Emit(Tokens((50,))),
    ]
    assert machine.handle(ev.SequenceStarted(3.0, 7, "P", 2, 0.25)) == []


def test_duplicates_are_dropped_and_overlaps_trimmed() -> None:
    machine = placed()
    machine.handle(tokens("P", 0, 50))
    assert machine.handle(tokens("P", 0, 50)) == []
    assert machine.handle(tokens("D", 0, 50)) == []
    assert machine.handle(tokens("D", 0, 50, 51)) == [act.Emit(Tokens((51,)))]
    assert machine.handle(tokens("D", 0, 50, finish=FinishReason.STOP)) == []
    assert machine.emitted == [50, 51]


def test_finish_without_a_new_token_counts() -> None:
    machine = placed(LOCAL)
    machine.handle(tokens("D", 0, 50))
    (action,) = machine.handle(tokens("D", 1, finish=FinishReason.STOP))
    assert action.event.reason is FinishReason.STOP


def out_of_step(words: str, *cancels: act.Cancel) -> list[act.Action]:
    avoid = frozenset({"D"})
    find = act.FindPlace(1, 2.0, avoid=avoid, cause="worker_lost")
    return [act.OutOfStep("D", words), *cancels, find]


REPLACE_BOTH = (cancel("D", "replaced"), cancel("P", "replaced"))


def test_a_gap_among_tokens_is_replayed_from_what_the_client_has() -> None:
    machine = placed()
    machine.handle(tokens("P", 0, 50))
    what = "sent token 2 where 1 was due"
    assert machine.handle(tokens("D", 2, 52)) == out_of_step(what, *REPLACE_BOTH)
    actions = machine.handle(ev.PlaceFound(4.0, 8, REPLAY))
    assert actions[1].attempt.tokens == (*PROMPT, 50)
    assert machine.handle(tokens("D", 1, 99)) == []  # of the attempt that is over
    assert machine.lost_at == 2.0
    machine.handle(tokens("P", 1, 51, sid=8, at=5.0))
    assert machine.emitted == [50, 51]
    assert machine.lost_at is None


def test_more_tokens_than_asked_for_are_replayed_and_none_of_them_shown() -> None:
    machine = placed(LOCAL)
    what = "sent more than 4 tokens"
    assert machine.handle(tokens("D", 0, 1, 2, 3, 4, 5)) == out_of_step(
        what, cancel("D", "replaced")
    )
    assert machine.emitted == []


def test_an_end_before_the_last_token_is_no_end() -> None:
    machine = placed(LOCAL)
    machine.handle(tokens("D", 0, 50))
    actions = machine.handle(tokens("D", 1, 51, finish=FinishReason.LENGTH))
    assert actions == out_of_step("ended at token 2 of 4", cancel("D", "replaced"))


@pytest.mark.parametrize("repeat", [(51,), (51, 52), (50, 52, 53)])
def test_a_repeat_that_differs_from_what_the_client_has_is_replayed(repeat) -> None:
    machine = placed(LOCAL)
    machine.handle(tokens("D", 0, 50))
    machine.handle(tokens("D", 1, 51))
    actions = machine.handle(tokens("D", 0, *repeat))
    what = "sent another token 0 than the client has"
    assert actions == out_of_step(what, cancel("D", "replaced"))


def test_a_worker_out_of_step_too_often_ends_in_a_typed_error() -> None:
    machine = placed(LOCAL, max_replays=0)
    assert machine.handle(tokens("D", 3, 53)) == [
        act.OutOfStep("D", "sent token 3 where 0 was due"),
        cancel("D", "failed"),
        Failure(errors.WorkerLost, "worker D was out of step: it sent token 3 where 0 was due"),
    ]
    assert machine.lost_at == 2.0


def test_kv_that_is_said_to_have_come_twice_is_counted_once() -> None:
    machine = placed()
    assert machine.awaits_kv
    machine.handle(received())
    assert not machine.awaits_kv
    assert machine.handle(received()) == []
    assert machine._measured.kv_bytes == 640


def test_who_holds_the_attempt() -> None:
    machine = placed()
    assert (machine.holds("P"), machine.holds("D"), machine.holds("E")) == (True, True, False)
    machine.handle(received())
    assert (machine.holds("P"), machine.holds("D")) == (False, True)
    machine.handle(failed("D", errors.LeaseLost("x")))
    assert not machine.holds("D")
    assert not make().holds("D")


def test_decode_tokens_that_overtake_the_first_one_wait_for_it() -> None:
    machine = placed()
    machine.handle(ev.LeaseGranted(1.6, 7, "D", LEASE))
    assert machine.handle(received()) == [act.ReleaseKv("P", 7)]
    assert machine.handle(tokens("D", 1, 51)) == []
    assert machine.handle(tokens("D", 1, 51)) == []
    assert machine.handle(tokens("D", 2, 52)) == []
    assert machine.handle(tokens("P", 0, 50)) == [
        act.Emit(Started(0)),
        act.Emit(Tokens((50,))),
        act.Emit(Tokens((51, 52))),
    ]
    assert machine.handle(tokens("D", 3, 53))[0] == act.Emit(Tokens((53,)))


def test_finish_that_overtakes_the_first_token_waits_too() -> None:
    machine = placed()
    assert machine.handle(tokens("D", 1, 51, finish=FinishReason.STOP)) == []
    actions = machine.handle(tokens("P", 0, 50))
    assert actions[1:3] == [act.Emit(Tokens((50,))), act.Emit(Tokens((51,)))]
    assert actions[3] == cancel("P", "finished")
    assert actions[4].event.reason is FinishReason.STOP
    assert machine.emitted == [50, 51]


@pytest.mark.parametrize("second", [3, 9])
def test_a_gap_among_overtaking_tokens_is_replayed(second: int) -> None:
    machine = placed()
    machine.handle(tokens("D", 1, 51))
    what = f"sent token {second} where 0 was due"
    assert machine.handle(tokens("D", second, 53)) == out_of_step(what, *REPLACE_BOTH)


def test_overtaking_tokens_are_bounded() -> None:
    machine = placed()
    actions = machine.handle(tokens("D", 1, 1, 2, 3, 4))
    assert actions == out_of_step("sent more than 4 tokens", *REPLACE_BOTH)


def test_prefill_lost_while_decode_waits_for_its_token_is_replayed() -> None:
    machine = placed()
    machine.handle(received())
    machine.handle(tokens("D", 1, 51))
    actions = machine.handle(ev.WorkerGone(4.0, "P", "cut"))
    assert actions == [cancel("D", "replaced"), FIND_AGAIN]
    assert machine.emitted == []


@pytest.mark.parametrize("progress", ["placed", "started", "first token", "sent"])
def test_prefill_lost_before_decode_has_everything_is_replayed(progress: str) -> None:
    machine = placed()
    steps = {
        "started": ev.SequenceStarted(1.5, 7, "P", 0, 0.25),
        "first token": tokens("P", 0, 50),
        "sent": sent(),
    }
    for name, event in steps.items():
        if progress in {name, "sent"}:
            machine.handle(event)
    assert machine.handle(ev.WorkerGone(3.0, "P", "cut")) == [
        cancel("D", "replaced"),
        FIND_AGAIN,
    ]
    assert machine.state is State.REPLAYING


def test_prefill_lost_after_decode_has_everything_is_no_matter() -> None:
    machine = placed()
    machine.handle(tokens("P", 0, 50))
    machine.handle(received())
    assert machine.handle(ev.WorkerGone(3.5, "P", "cut")) == []
    assert machine.handle(failed("P", errors.PeerLost("late"))) == []
    assert machine.handle(tokens("D", 1, 51)) == [act.Emit(Tokens((51,)))]


def test_decode_lost_is_replayed_from_what_was_emitted() -> None:
    machine = placed()
    machine.handle(tokens("P", 0, 50))
    machine.handle(received())
    machine.handle(tokens("D", 1, 51))
    assert machine.handle(ev.WorkerGone(4.0, "D", "cut")) == [FIND_AGAIN]
    assert machine.handle(tokens("D", 2, 52)) == []  # late, of an attempt given up
    again = attempt(
        sequence_id=8,
        tokens=(*PROMPT, 50, 51),
        output_offset=2,
        max_tokens=2,
        deadline_s=4.5,
    )
    assert machine.handle(ev.PlaceFound(4.5, 8, REPLAY)) == [
        act.Emit(Placed(REPLAY, 1)),
        act.SubmitPrefill("P", again),
        act.SubmitDecode("E", again, expect_kv=True),
    ]
    assert machine.handle(ev.SequenceStarted(4.6, 8, "P", 3, 0.25)) == []
    assert machine.handle(tokens("P", 2, 52, at=5.0, sid=8)) == [
        act.Emit(Resumed(1.0, 2)),
        act.Emit(Tokens((52,))),
    ]
    actions = machine.handle(tokens("E", 3, 53, at=6.0, sid=8, finish=FinishReason.LENGTH))
    assert actions[:2] == [act.Emit(Tokens((53,))), cancel("P", "finished", 8)]
    assert actions[2].event.stats.replays == 1
    assert actions[2].event.stats.completion_tokens == 4


def test_decode_lost_before_the_transfer_cancels_prefill() -> None:
    machine = placed()
    assert machine.handle(ev.WorkerGone(3.0, "D", "cut")) == [
        cancel("P", "replaced"),
        FIND_AGAIN,
    ]


def test_replay_of_an_untouched_stream_has_no_gap_to_tell() -> None:
    machine = placed()
    machine.handle(ev.WorkerGone(3.0, "D", "cut"))
    machine.handle(ev.PlaceFound(3.5, 8, REPLAY))
    assert machine.handle(tokens("P", 0, 50, sid=8)) == [
        act.Emit(Started(0)),
        act.Emit(Tokens((50,))),
    ]


def test_gap_counts_from_the_first_of_several_losses() -> None:
    machine = placed(LOCAL)
    machine.handle(tokens("D", 0, 50))
    machine.handle(ev.WorkerGone(3.0, "D", "cut"))
    machine.handle(ev.PlaceFound(3.5, 8, REPLAY))
    machine.handle(ev.WorkerGone(4.0, "E", "cut"))
    machine.handle(ev.PlaceFound(4.5, 9, REPLAY))
    assert machine.handle(tokens("P", 1, 51, at=6.0, sid=9))[0] == act.Emit(Resumed(3.0, 1))


def test_both_workers_lost_at_once() -> None:
    machine = placed()
    assert machine.handle(ev.WorkerGone(3.0, "D", "cut")) == [
        cancel("P", "replaced"),
        FIND_AGAIN,
    ]
    assert machine.handle(ev.WorkerGone(3.0, "P", "cut")) == []


def test_other_workers_are_no_concern() -> None:
    machine = placed()
    assert machine.handle(ev.WorkerGone(3.0, "X", "cut")) == []
    assert machine.handle(tokens("X", 0, 50)) == []
    assert machine.handle(tokens("P", 0, 50, sid=6)) == []
    assert machine.state is State.PLACED


def test_no_place_for_the_replay_is_worker_lost() -> None:
    machine = placed()
    machine.handle(ev.WorkerGone(3.0, "D", "its stream ended"))
    assert machine.handle(ev.PlaceTimedOut(3.1, 0, 1.0)) == []  # of the first search
    assert machine.handle(ev.NoPlace(3.1, 1, None, parked=True)) == []
    assert machine.handle(ev.PlaceTimedOut(5.0, 1, 1.0)) == [
        Failure(errors.WorkerLost, "worker D was lost (its stream ended)"),
    ]


def test_replays_are_counted() -> None:
    machine = placed(LOCAL, max_replays=1)
    machine.handle(ev.WorkerGone(3.0, "D", "cut"))
    machine.handle(ev.PlaceFound(3.5, 8, REPLAY))
    assert machine.handle(ev.WorkerGone(4.0, "P", "cut")) == [
        cancel("E", "failed", 8),
        Failure(errors.WorkerLost, "worker P"),
    ]


def test_hand_overs_of_workers_that_drain_use_up_no_replays() -> None:
    machine = placed(max_replays=1)
    for attempt in range(1, 5):
        gone = ev.WorkerGone(2.0 + attempt, "D", "it drained", drained=True)
        assert isinstance(machine.handle(gone)[-1], act.FindPlace)
        machine.handle(ev.PlaceFound(2.5 + attempt, 10 + attempt, LOCAL))
    assert isinstance(machine.handle(ev.WorkerGone(8.0, "D", "cut"))[-1], act.FindPlace)
    machine.handle(ev.PlaceFound(8.5, 20, LOCAL))
    assert machine.handle(ev.WorkerGone(9.0, "D", "cut")) == [Failure(errors.WorkerLost, "cut")]


def test_corrupt_kv_is_asked_for_a_few_times_and_then_computed_locally() -> None:
    machine = placed()
    machine.handle(ev.LeaseGranted(1.6, 7, "D", LEASE))
    missing = ev.KvMissing(3.0, 7, "D", (1, 4))
    for _ in range(m.MAX_ASKS):
        assert machine.handle(missing) == [act.ResendKv("P", 7, (1, 4))]
    assert machine.handle(missing) == [
        cancel("D", "replaced"),
        cancel("P", "replaced"),
        act.FindPlace(1, 2.0, local_only=True, cause="corrupt_frame"),
    ]
    # Once is enough: every later attempt of this request stays local.
    machine.handle(ev.PlaceFound(3.5, 8, LOCAL))
    (find,) = machine.handle(ev.WorkerGone(4.0, "D", "cut"))
    assert find == act.FindPlace(2, 2.0, local_only=True, cause="worker_lost")


def test_lease_is_opened_once_and_only_while_prefill_is_there() -> None:
    machine = placed()
    granted = ev.LeaseGranted(1.6, 7, "D", LEASE)
    assert machine.handle(ev.LeaseGranted(1.6, 7, "P", LEASE)) == []
    assert machine.handle(granted) == [act.OpenTransfer("P", 7, LEASE)]
    assert machine.handle(granted) == []


@pytest.mark.parametrize(
    ("error", "local", "avoid"),
    [
        (errors.LeaseLost("expired"), True, {"D", "P"}),
        (errors.Draining("bye"), False, {"D"}),
        (errors.PeerLost("gone"), True, {"D", "P"}),
        (errors.CorruptFrame("bad"), True, {"D", "P"}),
        (errors.LayoutMismatch("dtype"), True, {"D", "P"}),
    ],
)
def test_decode_failure_that_is_not_the_requests_fault(error, local, avoid) -> None:
    machine = placed()
    assert machine.handle(failed("D", error)) == [
        cancel("P", "replaced"),
        act.FindPlace(1, 2.0, local, frozenset(avoid), error.code),
    ]


@pytest.mark.parametrize(
    "error",
    [errors.ContextOverflow("5000 > 4096"), errors.InternalError("x"), errors.NoCapacity("x")],
)
def test_decode_failure_of_the_request_itself(error) -> None:
    machine = placed()
    assert machine.handle(failed("D", error)) == [cancel("P", "failed"), Failure(type(error))]


@pytest.mark.parametrize(
    ("error", "local"),
    [
        (errors.ContextOverflow("this prefill worker holds less"), True),
        (errors.InternalError("x"), True),
        (errors.TransferCancelled("x"), True),
        (errors.Draining("x"), False),
    ],
)
def test_prefill_failure_is_never_the_last_word(error, local) -> None:
    machine = placed()
    (first, find) = machine.handle(failed("P", error))
    assert first == cancel("D", "replaced")
    assert (find.local_only, "P" in find.avoid, find.cause) == (local, True, error.code)


ENDINGS = [
    (
        ev.DeadlineReached(9.0),
        "deadline",
        Failure(errors.DeadlineExceeded, "9 s"),
        State.FAILED,
    ),
    (
        ev.ClientCancelled(2.0, "gone"),
        "client_gone",
        Failure(errors.ClientGone),
        State.CANCELLED,
    ),
    (ev.ShutDown(2.0), "shutdown", Failure(errors.Draining), State.FAILED),
    (ev.Broken(2.0, "oops"), "failed", Failure(errors.InternalError, "oops"), State.FAILED),
]


@pytest.mark.parametrize(("event", "reason", "failure", "state"), ENDINGS)
def test_ending_cancels_what_is_open_and_nothing_else(event, reason, failure, state) -> None:
    waiting = make()
    waiting.handle(ev.Admitted(0.0))
    assert waiting.handle(event) == [failure]

    machine = placed()
    assert machine.handle(event) == [cancel("D", reason), cancel("P", reason), failure]
    assert machine.state is state

    machine = placed()
    machine.handle(received())  # P is released
    assert machine.handle(event) == [cancel("D", reason), failure]

    machine = placed()
    machine.handle(ev.WorkerGone(2.0, "D", "cut"))  # between two attempts
    assert machine.handle(event) == [failure]


def test_stop_string_finishes_with_what_was_emitted() -> None:
    machine = placed(LOCAL)
    machine.handle(tokens("D", 0, 50))
    actions = machine.handle(ev.StoppedEarly(3.0))
    assert actions[0] == cancel("D", "finished")
    assert actions[1].event.reason is FinishReason.STOP
    assert actions[1].event.stats.completion_tokens == 1


def test_stop_string_between_two_attempts() -> None:
    machine = placed(LOCAL)
    machine.handle(tokens("D", 0, 50))
    machine.handle(ev.WorkerGone(3.0, "D", "cut"))
    (action,) = machine.handle(ev.StoppedEarly(3.5))
    assert action.event.reason is FinishReason.STOP


def test_stop_before_any_place_is_a_cancel() -> None:
    machine = make()
    assert machine.handle(ev.StoppedEarly(0.0)) == [Failure(errors.ClientGone)]


@pytest.mark.parametrize("ending", [event for event, *_ in ENDINGS])
def test_nothing_follows_the_terminal_event(ending) -> None:
    machine = placed()
    machine.handle(ending)
    late = [
        ev.Admitted(3.0),
        ev.PlaceFound(3.0, 8, SPLIT),
        ev.PlaceTimedOut(3.0, 0, 1.0),
        ev.SequenceStarted(3.0, 7, "P", 0, 0.25),
        ev.LeaseGranted(3.0, 7, "D", LEASE),
        tokens("P", 0, 50),
        received(),
        ev.KvMissing(3.0, 7, "D", (1,)),
        failed("D", errors.LeaseLost("x")),
        ev.WorkerGone(3.0, "D", "cut"),
        *(event for event, *_ in ENDINGS),
        ev.StoppedEarly(3.0),
    ]
    assert [machine.handle(event) for event in late] == [[] for _ in late]
