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
    ScaleTo,
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
    assert machine.handle(Health(ready=True, connected=None, at=1)) == [Announce(Phase.SERVING)]


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


def to(*names: str) -> ScaleTo:
    return ScaleTo(frozenset(names))


def at_zero() -> SupervisorMachine:
    """Serves with no worker at all."""
    machine = SupervisorMachine("router", WORKERS, wanted=())
    assert machine.handle(Begin()) == [Spawn("router")]
    machine.handle(RouterListening())
    assert machine.handle(healthy(at=1.0, connected=())) == [Announce(Phase.SERVING)]
    return machine


def test_only_workers_wanted_from_the_start_run_and_are_waited_for():
    machine = SupervisorMachine("router", WORKERS, wanted={"decode-0"})
    assert machine.handle(Begin()) == [Spawn("router"), Spawn("decode-0")]
    machine.handle(RouterListening())
    assert machine.missing() == ["decode-0"]
    assert machine.handle(healthy(at=1, connected=())) == []
    assert machine.handle(healthy(at=2, connected=["decode-0"])) == [Announce(Phase.SERVING)]


def test_with_none_wanted_serving_begins_when_the_router_says_it_is_ready():
    machine = SupervisorMachine("router", WORKERS, wanted=())
    machine.handle(Begin())
    machine.handle(RouterListening())
    assert machine.handle(healthy(at=1, connected=(), ready=False)) == []
    assert machine.handle(healthy(at=2, connected=())) == [Announce(Phase.SERVING)]


def test_a_wanted_worker_starts_once_however_often_it_is_said():
    machine = at_zero()
    assert machine.handle(to("decode-0")) == [Spawn("decode-0")]
    assert machine.handle(to("decode-0")) == []
    assert machine.missing() == ["decode-0"]
    machine.handle(healthy(at=2.0, connected=["decode-0"]))
    assert machine.missing() == []
    assert machine.handle(to(*WORKERS)) == [Spawn("prefill-0")]


def test_an_unwanted_worker_is_told_to_end_once_and_does_not_come_back():
    machine = serving()
    assert machine.handle(to("decode-0")) == [Terminate("prefill-0")]
    assert machine.handle(to("decode-0")) == []
    assert machine.handle(to()) == [Terminate("decode-0")]
    assert machine.handle(Exited("prefill-0", 0, 2.0)) == []
    assert machine.handle(Exited("decode-0", -9, 2.0)) == []
    assert machine.alive() == ["router"]
    assert machine.missing() == []
    assert machine.phase is Phase.SERVING


def test_a_worker_wanted_again_while_it_ends_starts_when_it_has_ended():
    machine = serving()
    machine.handle(to("prefill-0"))
    assert machine.handle(to(*WORKERS)) == []
    assert machine.handle(Exited("decode-0", 0, 2.0)) == [Spawn("decode-0")]
    assert machine.missing() == ["decode-0"]


def test_a_worker_unwanted_again_while_it_ends_is_not_told_twice():
    machine = serving()
    for wanted in (to("prefill-0"), to(*WORKERS)):
        machine.handle(wanted)
    assert machine.handle(to("prefill-0")) == []
    assert machine.handle(Exited("decode-0", 0, 2.0)) == []


def test_a_woken_worker_that_dies_starts_again_with_growing_pauses():
    machine = at_zero()
    machine.handle(to("decode-0"))
    machine.handle(healthy(at=2.0, connected=["decode-0"]))
    assert machine.handle(Exited("decode-0", -9, 3.0)) == [Spawn("decode-0")]
    assert machine.handle(Exited("decode-0", -9, 3.1)) == [Wake("decode-0", 1.0)]


def test_a_woken_worker_whose_start_fails_is_tried_again_and_closes_nothing():
    machine = at_zero()
    machine.handle(to("decode-0"))
    assert machine.handle(Exited("decode-0", 3, 2.0)) == [Spawn("decode-0")]
    assert machine.handle(Exited("decode-0", 3, 2.1)) == [Wake("decode-0", 1.0)]
    assert machine.phase is Phase.SERVING


def test_a_worker_unwanted_during_its_pause_stays_away_until_it_is_wanted_anew():
    machine = at_zero()
    machine.handle(to("decode-0"))
    for at in (2.0, 2.1):
        machine.handle(Exited("decode-0", 3, at))
    assert machine.handle(to()) == []
    assert machine.handle(WakeDue("decode-0")) == []
    assert machine.handle(to("decode-0")) == [Spawn("decode-0")]
    # Who asks anew does not wait for the failures of the last time.
    assert machine.handle(Exited("decode-0", 3, 9.0)) == [Spawn("decode-0")]


def test_a_pause_that_ends_after_the_worker_was_asked_for_anew_starts_no_second_one():
    machine = at_zero()
    machine.handle(to("decode-0"))
    for at in (2.0, 2.1):
        machine.handle(Exited("decode-0", 3, at))
    machine.handle(to())
    machine.handle(to("decode-0"))
    assert machine.handle(WakeDue("decode-0")) == []


def test_a_worker_unwanted_before_it_was_ready_is_no_failed_start():
    machine = started()
    assert machine.handle(to("prefill-0")) == [Terminate("decode-0")]
    assert machine.handle(Exited("decode-0", -15, 1.0)) == []
    assert machine.handle(healthy(at=2.0, connected=["prefill-0"])) == [Announce(Phase.SERVING)]


def test_workers_come_and_go_before_the_router_listens():
    machine = SupervisorMachine("router", WORKERS, wanted={"decode-0"})
    machine.handle(Begin())
    assert machine.handle(to("prefill-0")) == [Spawn("prefill-0"), Terminate("decode-0")]
    assert machine.handle(Exited("decode-0", -15, 0.1)) == []
    assert machine.phase is Phase.ROUTER


@pytest.mark.parametrize("stops", [1, 2])
def test_nothing_is_scaled_while_the_stack_ends(stops):
    machine = at_zero()
    for _ in range(stops):
        machine.handle(StopRequested())
    assert machine.handle(to(*WORKERS)) == []
    machine.handle(Exited("router", 0, 3.0))
    assert machine.phase is Phase.DONE
    assert machine.handle(to(*WORKERS)) == []


def test_a_worker_wanted_again_while_it_ends_does_not_start_when_the_stack_ends():
    machine = serving()
    machine.handle(to("prefill-0"))
    machine.handle(to(*WORKERS))
    machine.handle(StopRequested())
    assert machine.handle(Exited("decode-0", 0, 2.0)) == []
    machine.handle(Exited("router", 0, 3.0))
    assert machine.handle(Exited("prefill-0", 0, 4.0)) == [Finish(failed=None, killed=False)]


EVENTS = st.one_of(
    st.just(RouterListening()),
    st.just(StopRequested()),
    st.just(GraceOver()),
    st.builds(WakeDue, st.sampled_from(WORKERS)),
    st.builds(Health, st.booleans(), st.frozensets(st.sampled_from(WORKERS)), st.just(1.0)),
    st.builds(ScaleTo, st.frozensets(st.sampled_from(WORKERS))),
    st.sampled_from(["router", *WORKERS]),  # that child ends, if it runs
)


@given(st.lists(EVENTS, max_size=40), st.none() | st.frozensets(st.sampled_from(WORKERS)))
def test_any_history_ends_with_no_child_left_and_one_finish(events, wanted):
    machine = SupervisorMachine("router", WORKERS, wanted)
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


class Processes:
    """Plays the processes of a machine that serves: one incarnation of each, told to end once."""

    def __init__(self, machine: SupervisorMachine, running: set[str]) -> None:
        self.machine = machine
        self.running = running
        self.ending: set[str] = set()
        self.pausing: set[str] = set()

    def apply(self, event: Health | Exited | WakeDue | ScaleTo) -> None:
        for action in self.machine.handle(event):
            match action:
                case Spawn(name):
                    assert name not in self.running
                    self.running.add(name)
                case Terminate(name):
                    assert name in self.running - self.ending
                    self.ending.add(name)
                case Wake(name):
                    self.pausing.add(name)
                case _:
                    pytest.fail(f"{action} while nobody stops the stack")

    def end(self, name: str, status: int) -> None:
        if name in self.running:
            self.running.discard(name)
            self.ending.discard(name)
            self.apply(Exited(name, status, 2.0))

    def pause_over(self, name: str) -> None:
        if name in self.pausing:
            self.pausing.discard(name)
            self.apply(WakeDue(name))

    def settle(self) -> None:
        """Everybody who was told to end does, and every pause passes."""
        while self.ending or self.pausing:
            for name in sorted(self.ending):
                self.end(name, 0)
            for name in sorted(self.pausing):
                self.pause_over(name)


CHANGES = st.one_of(
    st.builds(ScaleTo, st.frozensets(st.sampled_from(WORKERS))),
    st.builds(Health, st.booleans(), st.frozensets(st.sampled_from(WORKERS)), st.just(1.0)),
    st.tuples(st.just("ends"), st.sampled_from(["router", *WORKERS])),
    st.tuples(st.just("pause over"), st.sampled_from(["router", *WORKERS])),
)


@given(st.lists(CHANGES, max_size=40))
def test_after_any_history_exactly_the_workers_wanted_last_run(changes):
    processes = Processes(at_zero(), {"router"})
    wanted: frozenset[str] = frozenset()
    for change in changes:
        match change:
            case ("ends", name):
                processes.end(name, -9)
            case ("pause over", name):
                processes.pause_over(name)
            case _:
                wanted = change.workers if isinstance(change, ScaleTo) else wanted
                processes.apply(change)
    processes.settle()
    assert processes.running == {"router", *wanted}
    assert set(processes.machine.alive()) == processes.running
