import json
import random

import pytest

from kvrelay_chaos.faults import BY_NAME, KINDS
from kvrelay_chaos.plan import Plan, draw_plan
from kvrelay_chaos.shape import Shape
from kvrelay_protocol.errors import UsageError

SHAPE = Shape(prefill=2, decode=2, routers=2)


def _plan(count: int = 200, seed: int = 7, **options: object) -> Plan:
    return draw_plan(KINDS, SHAPE, count=count, seed=seed, **options)


def test_the_same_seed_gives_the_same_plan_whatever_was_drawn_before():
    first = _plan()
    random.seed(1)
    random.random()
    assert _plan() == first
    assert _plan(seed=8) != first


def test_a_longer_plan_begins_with_every_kind_once():
    plan = _plan(count=len(KINDS))
    assert set(plan.counts().values()) == {1}
    assert plan.counts().keys() == BY_NAME.keys()


def test_times_rise_and_targets_exist():
    plan = _plan(count=500)
    times = [fault.at_s for fault in plan.faults]
    assert times == sorted(times)
    assert [fault.number for fault in plan.faults] == list(range(500))
    for fault in plan.faults:
        assert fault.target in BY_NAME[fault.kind].targets(SHAPE)


def test_a_duration_spreads_the_same_faults():
    plan, spread = _plan(), _plan(duration_s=1800.0)
    assert [(f.kind, f.target, f.parameters) for f in plan.faults] == [
        (f.kind, f.target, f.parameters) for f in spread.faults
    ]
    assert 1000 < spread.faults[-1].at_s <= 1800


def test_weights_decide_how_often_a_kind_is_drawn():
    counts = _plan(count=10_000).counts()
    total = sum(kind.weight for kind in KINDS)
    for kind in KINDS:
        assert counts[kind.name] == pytest.approx(10_000 * kind.weight / total, rel=0.5, abs=15)


def test_ten_thousand_faults_are_planned_for_less_than_25_minutes():
    assert _plan(count=10_000).faults[-1].at_s < 1500


def test_a_saved_plan_is_the_plan(tmp_path):
    path = tmp_path / "plan.json"
    plan = _plan()
    plan.save(path)
    assert Plan.load(path, BY_NAME) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99, not 1"),
        ({"faults": [{"kind": "no number"}]}, "is no plan"),
        ({"shape": {"moons": 3}}, "is no plan"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, change, message):
    path = tmp_path / "plan.json"
    _plan(count=3).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=message):
        Plan.load(path, BY_NAME)


def test_a_kind_that_is_not_known_is_named(tmp_path):
    path = tmp_path / "plan.json"
    _plan().save(path)
    with pytest.raises(UsageError, match="unknown here: kill_router"):
        Plan.load(path, BY_NAME.keys() - {"kill_router"})


def test_every_fault_is_one_line():
    for fault in _plan().faults:
        assert "\n" not in str(fault)
        assert fault.kind in str(fault)


@pytest.mark.parametrize(
    ("target", "rivals"),
    [
        ("prefill-1", ("prefill-0",)),
        ("decode-0/router-1", ("decode-1",)),
        ("router-0", ()),
        ("clients", ()),
    ],
)
def test_rivals_are_the_other_workers_of_a_pool(target, rivals):
    assert SHAPE.rivals(target) == rivals
