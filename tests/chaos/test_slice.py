"""A slice of `kvrelay chaos`: real processes, real UCX, faults of every kind, nothing that comes of them."""

import pytest

from kvrelay_chaos.faults import KINDS
from kvrelay_chaos.ledger import Ledger
from kvrelay_chaos.plan import draw_plan
from kvrelay_chaos.report import problems
from kvrelay_chaos.run import Settings, carry_out, settle_flags
from kvrelay_chaos.shape import Shape
from kvrelay_chaos.verdict import Verdict

SHAPE = Shape(prefill=2, decode=2, routers=2)
FAULTS = 120
SEED = 4
SECONDS = 12.0
"""For the plan on a machine that keeps up; on another the same faults take longer."""


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    plan = draw_plan(KINDS, SHAPE, count=FAULTS, seed=SEED, duration_s=SECONDS)
    settings = Settings(
        values=settle_flags(SHAPE, deadline_s=60.0),
        users=6,
        questions=16,
        deadline_s=60.0,
    )
    return carry_out(plan, settings, say=print)


def test_nothing_is_wrong_hung_or_leaked(ledger):
    assert problems(ledger) == []
    assert ledger.passed
    assert ledger.count(Verdict.EXACT) > 0


def test_every_fault_hit_something(ledger):
    fired = ledger.fired_by_kind
    assert fired == ledger.planned
    assert fired.keys() == {kind.name for kind in KINDS}


def test_killed_processes_came_back(ledger):
    fired = ledger.fired_by_kind
    ends = ("kill_worker", "kill_router", "restart_worker", "full_disk")
    # A process that is killed while it starts counts once for both.
    assert 0 < sum(ledger.restarts.values()) <= sum(fired[kind] for kind in ends)
