"""The engine thread: what runs in which order, and how it ends."""

import threading

import pytest

from kvrelay_engine.batch import Batch, SequenceSlice, StepResult
from kvrelay_engine.runtime.step_loop import LoadSnapshot, StepLoop

BATCH = Batch((SequenceSlice(1, (5,), 0, (0,), None),))
NOTHING = LoadSnapshot(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Script:
    """A scheduler that has one batch per entry of `work`, and writes down who was called."""

    def __init__(self):
        self.calls, self.work = [], []
        self.idle = threading.Event()

    def schedule(self):
        self.calls.append("schedule")
        return self.work.pop() if self.work else None

    def commit(self, batch, result):
        self.calls.append("commit")

    def take_events(self):
        return [self.calls[-1]]

    def load(self):
        return NOTHING

    def check_integrity(self):
        self.calls.append("idle")
        self.idle.set()


class Loop:
    """A step loop over a script, and what came out of it."""

    def __init__(self, step=lambda _: StepResult({})):
        self.script, self.events, self.failures = Script(), [], []

        def called(batch):
            self.script.calls.append("step")
            return step(batch)

        self.thread = StepLoop(
            self.script, called, on_events=self.events.extend, on_failure=self.failures.append
        )

    def __enter__(self):
        self.thread.start()
        assert self.script.idle.wait(5)
        return self

    def __exit__(self, *_):
        self.thread.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()

    def give(self, *work):
        """Hand work over the way another thread does, and wait until it is done."""
        self.script.idle.clear()
        self.thread.post(lambda: self.script.work.extend(work))
        assert self.script.idle.wait(5)


def test_admissions_are_told_before_the_step_that_computes_them():
    with Loop() as loop:
        loop.events.clear()
        loop.give(BATCH)
        assert loop.events == ["schedule", "commit", "schedule"]


def test_commands_run_in_order_between_steps_never_within_one():
    seen = []

    def step(_):
        loop.thread.post(lambda: seen.append(tuple(loop.script.calls[-2:])))
        loop.thread.post(lambda: seen.append("second"))
        return StepResult({})

    loop = Loop(step)
    with loop:
        loop.give(BATCH)
    assert seen == [("step", "commit"), "second"]


def test_integrity_is_checked_whenever_there_is_nothing_to_do():
    with Loop() as loop:
        loop.give()
        assert loop.script.calls == ["schedule", "idle"] * 2


def test_what_was_posted_before_the_stop_still_runs():
    ran = []
    with Loop() as loop:
        loop.thread.post(lambda: ran.append(1))
        loop.thread.stop()
        loop.thread.post(lambda: ran.append(2))
        loop.thread.join(5)
    assert ran[:1] == [1]


@pytest.mark.parametrize("where", ["step", "command"])
def test_a_defect_ends_the_loop_and_is_reported_once(where):
    def fail(*_):
        raise ZeroDivisionError(where)

    with Loop(fail) as loop:
        if where == "step":
            loop.thread.post(lambda: loop.script.work.append(BATCH))
        else:
            loop.thread.post(fail)
        loop.thread.join(5)
        assert [str(e) for e in loop.failures] == [where]
        assert "commit" not in loop.script.calls
