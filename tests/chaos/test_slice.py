"""A slice of `kvrelay chaos`: real processes, real UCX, faults of every kind, nothing that comes of them."""

import pytest

from kvrelay.cli.commands.chaos import CHAOS
from kvrelay.cli.settings import resolve
from kvrelay_chaos.faults import KINDS
from kvrelay_chaos.ledger import Ledger
from kvrelay_chaos.report import problems
from kvrelay_chaos.run import carry_out, make_plan, make_settings
from kvrelay_chaos.verdict import Verdict

FLAGS = {
    "faults": "120",
    "seed": "4",
    "routers": "2",
    "users": "6",
    "questions": "16",
    # On a machine that keeps up with the plan. On another the same faults take longer.
    "duration": "12",
    "deadline": "60",
}


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    values = resolve(CHAOS.flags, FLAGS, environ={})
    plan = make_plan(values)
    return carry_out(plan, make_settings(values, plan.shape), say=print)


def test_nothing_is_wrong_hung_or_leaked(ledger):
    assert problems(ledger) == []
    assert ledger.passed
    assert ledger.count(Verdict.EXACT) > 0


def test_faults_of_every_kind_hit_something(ledger):
    assert ledger.fired_by_kind == ledger.planned
    assert ledger.planned.keys() == {kind.name for kind in KINDS}


def test_killed_processes_came_back(ledger):
    fired = ledger.fired_by_kind
    ends = ("kill_worker", "kill_router", "restart_worker", "full_disk")
    # A process that is killed while it starts counts once for both.
    assert 0 < sum(ledger.restarts.values()) <= sum(fired[kind] for kind in ends)
