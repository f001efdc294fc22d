"""The supervisor's decisions as lists of actions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_infra.supervisor_machine import (
    Announce,
    Begin,
    Exited,
    Finish,
    GraceOver,
    Health,
    Kill,
    Phase,
    RouterListening,
    Spawn,
    StartGrace,
    StopRequested,
    SupervisorMachine,
    Terminate,
    Wake,
    WakeDue,
    backoff_s,
)

WORKERS = ("prefill-0", "decode-0")


def started() -> SupervisorMachine:
    machine = SupervisorMachine("router", WORKERS)
    machine.handle(Begin())
    machine.handle(RouterListening())
    return machine


def serving() -> SupervisorMachine:
    machine = started()
    machine.handle(healthy(at=1.0))
    return machine


def healthy(*, at: float, connected=WORKERS, ready=True) -> Health:
    return Health(ready, frozenset(connected), at)


def test_everything_starts_together_so_that_workers_load_while_the_router_starts():
    machine = SupervisorMachine("router", WORKERS)
    assert machine.handle(Begin()) == [Spawn("router"), Spawn("prefill-0"), Spawn("decode-0")]
    assert machine.handle(RouterListening()) == [Announce(Phase.WORKERS)]


def test_serving_begins_when_every_worker_has_joined():
    machine = started()
    assert machine.handle(healthy(at=1, connected=["decode-0"])) == []
    assert machine.missing() == ["prefill-0"]
    assert machine.handle(healthy(at=2, ready=False)) == []
    assert machine.handle(healthy(at=3)) == [Announce(Phase.SERVING)]
    assert machine.handle(healthy(at=4)) == []


def test_a_health_page_without_names_counts_for_all():
    machine = started()
    assert machine.handle(healthy(at=1, connected=[])) == [Announce(Phase.SERVING)]


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_that_ends_before_it_was_ready_stops_everything(name):
    machine = started()
    left = [child for child in ("router", *WORKERS) if child != name]
    assert machine.handle(Exited(name, 1, 2.0)) == [
        Announce(Phase.CLOSING),
        StartGrace(Phase.CLOSING),
        *(Terminate(child) for child in left),
    ]
    assert machine.handle(Exited(left[0], 0, 2.1)) == []
    assert machine.handle(Exited(left[1], 0, 2.2)) == [Finish(failed=name, killed=False)]


def test_a_router_that_ends_before_it_listens_is_a_failed_start():
    machine = SupervisorMachine("router", WORKERS)
    machine.handle(Begin())
    assert machine.handle(Exited("router", 5, 0.1)) == [
        Announce(Phase.CLOSING),
        StartGrace(Phase.CLOSING),
        Terminate("prefill-0"),
        Terminate("decode-0"),
    ]
    machine.handle(Exited("prefill-0", -15, 0.2))
    assert machine.handle(Exited("decode-0", -15, 0.2)) == [Finish(failed="router", killed=False)]


def test_a_dead_worker_starts_again_at_once_then_with_growing_pauses():
    machine = serving()
    assert machine.handle(Exited("decode-0", -9, 2.0)) == [Spawn("decode-0")]
    assert machine.handle(Exited("decode-0", 1, 2.1)) == [Wake("decode-0", 1.0)]
    assert machine.handle(WakeDue("decode-0")) == [Spawn("decode-0")]
    assert machine.handle(Exited("decode-0", 1, 3.5)) == [Wake("decode-0", 2.0)]
    assert machine.alive() == ["router", "prefill-0"]


def test_a_stable_stretch_resets_the_pauses():
    machine = serving()
    machine.handle(Exited("decode-0", -9, 2.0))
    machine.handle(healthy(at=3.0))
    assert machine.handle(Exited("decode-0", -9, 40.0)) == [Spawn("decode-0")]


def test_a_dead_router_starts_again_and_workers_are_left_alone():
    machine = serving()
    assert machine.handle(Exited("router", -11, 5.0)) == [Spawn("router")]
    assert machine.alive() == ["router", *WORKERS]


def test_stopping_drains_the_router_before_its_workers():
    machine = serving()
    assert machine.handle(StopRequested()) == [
        Announce(Phase.DRAINING),
        StartGrace(Phase.DRAINING),
        Terminate("router"),
    ]
    assert machine.handle(Exited("router", 0, 9.0)) == [
        Announce(Phase.CLOSING),
        StartGrace(Phase.CLOSING),
        Terminate("prefill-0"),
        Terminate("decode-0"),
    ]
    assert machine.handle(Exited("decode-0", 0, 9.1)) == []
    assert machine.handle(Exited("prefill-0", 0, 9.2)) == [Finish(failed=None, killed=False)]
    assert machine.phase is Phase.DONE


def test_a_worker_that_dies_while_draining_is_not_started_again():
    machine = serving()
    machine.handle(StopRequested())
    assert machine.handle(Exited("decode-0", -9, 9.0)) == []
    assert machine.handle(WakeDue("decode-0")) == []


@pytest.mark.parametrize("second", [StopRequested(), GraceOver()])
def test_stopping_twice_or_too_long_kills(second):
    machine = serving()
    machine.handle(StopRequested())
    assert machine.handle(second) == [
        Announce(Phase.KILLING),
        Kill("router"),
        Kill("prefill-0"),
        Kill("decode-0"),
    ]
    machine.handle(Exited("router", -9, 9.0))
    machine.handle(Exited("decode-0", -9, 9.0))
    assert machine.handle(Exited("prefill-0", -9, 9.0)) == [Finish(failed=None, killed=True)]


def test_stopping_during_a_pause_starts_nothing_any_more():
    machine = serving()
    machine.handle(Exited("decode-0", -9, 2.0))
    machine.handle(Exited("decode-0", 1, 2.1))
    machine.handle(StopRequested())
    assert machine.handle(WakeDue("decode-0")) == []


def test_stopping_before_anything_serves_ends_all_children():
    machine = started()
    assert machine.handle(StopRequested())[2:] == [
        Terminate("router"),
        Terminate("prefill-0"),
        Terminate("decode-0"),
    ]


def test_pauses_double_up_to_half_a_minute():
    assert [backoff_s(n) for n in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]


EVENTS = st.one_of(
    st.just(RouterListening()),
    st.just(StopRequested()),
    st.just(GraceOver()),
    st.builds(WakeDue, st.sampled_from(WORKERS)),
    st.builds(Health, st.booleans(), st.frozensets(st.sampled_from(WORKERS)), st.just(1.0)),
    st.sampled_from(["router", *WORKERS]),  # that child ends, if it runs
)


@given(st.lists(EVENTS, max_size=40))
def test_any_history_ends_with_no_child_left_and_one_finish(events):
    machine = SupervisorMachine("router", WORKERS)
    running: set[str] = set()
    finishes = 0

    def apply(event):
        nonlocal finishes
        for action in machine.handle(event):
            match action:
                case Spawn(name):
                    assert name not in running
                    running.add(name)
                case Terminate(name) | Kill(name):
                    assert name in running
                case Finish():
                    assert not running
                    finishes += 1

    apply(Begin())
    for event in events:
        if finishes:
            break
        if isinstance(event, str):
            if event not in running:
                continue
            running.discard(event)
            event = Exited(event, 1, 2.0)  # noqa: PLW2901
        apply(event)
    for event in (StopRequested(), StopRequested()):
        if not finishes:
            apply(event)
    while running:
        name = running.pop()
        apply(Exited(name, -9, 3.0))
    assert finishes == 1
