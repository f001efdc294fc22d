"""Placement: who gets the next attempt, and why."""

from dataclasses import replace

import pytest

from kvrelay_router.requests.placement import (
    MAX_WAITING,
    Demand,
    Role,
    WorkerState,
    blocks_needed,
    place,
)
from kvrelay_router.requests.types import Path, PathKind

from .conftest import CONFIG

D0 = WorkerState("d0", Role.DECODE, 16, 100, 100)
D1 = replace(D0, name="d1")
P0 = WorkerState("p0", Role.PREFILL, 16, 100, 100, tokens_per_second=1000.0)
P1 = replace(P0, name="p1")
DEMAND = Demand(tokens=40)


def test_no_decode_worker_is_no_place() -> None:
    assert place(DEMAND, [], CONFIG) is None
    assert place(DEMAND, [P0], CONFIG) is None
    assert place(DEMAND, [P0, replace(D0, draining=True)], CONFIG) is None


def test_both_pools() -> None:
    assert place(DEMAND, [P0, D0], CONFIG) == Path(
        PathKind.DISAGGREGATED,
        "least_loaded",
        "p0",
        "d0",
    )


@pytest.mark.parametrize("workers", [[D0], [D0, replace(P0, draining=True)]])
def test_no_prefill_worker(workers: list[WorkerState]) -> None:
    assert place(DEMAND, workers, CONFIG) == Path(PathKind.LOCAL, "no_prefill_worker", None, "d0")


def test_short_prompts_stay_local() -> None:
    config = replace(CONFIG, local_prefill_max_tokens=40)
    assert place(DEMAND, [P0, D0], config) == Path(PathKind.LOCAL, "short_prompt", None, "d0")
    assert place(Demand(tokens=41), [P0, D0], config).kind is PathKind.DISAGGREGATED


def test_replays_say_so() -> None:
    again = replace(DEMAND, replay=True)
    assert place(again, [P0, D0], CONFIG) == Path(PathKind.DISAGGREGATED, "replay", "p0", "d0")
    assert place(again, [D0], CONFIG) == Path(PathKind.LOCAL, "replay", None, "d0")
    local = replace(again, local_only=True)
    assert place(local, [P0, D0], CONFIG) == Path(PathKind.LOCAL, "replay", None, "d0")


def test_forced_paths() -> None:
    local = replace(DEMAND, force_path=PathKind.LOCAL)
    assert place(local, [P0, D0], CONFIG) == Path(PathKind.LOCAL, "forced", None, "d0")
    split = replace(DEMAND, force_path=PathKind.DISAGGREGATED, local_only=True, replay=True)
    assert place(split, [P0, D0], CONFIG) == Path(PathKind.DISAGGREGATED, "forced", "p0", "d0")
    assert place(split, [D0], CONFIG) is None


@pytest.mark.parametrize(
    "busy",
    [
        {"available_blocks": 50},
        {"pending_blocks": 50},
        {"running": 1},
        {"waiting": 1},
        {"available_blocks": 2},
    ],
)
def test_least_loaded_decode_worker(busy: dict[str, int]) -> None:
    for workers in ([replace(D0, **busy), D1], [D1, replace(D0, **busy)]):
        assert place(DEMAND, workers, CONFIG).decode_worker == "d1"


def test_larger_worker_is_compared_by_share() -> None:
    large = replace(D0, total_blocks=1000, available_blocks=500)
    assert place(DEMAND, [large, replace(D1, available_blocks=60)], CONFIG).decode_worker == "d1"


def test_fitting_at_once_beats_an_idle_worker_without_room() -> None:
    full = replace(D0, available_blocks=1)
    busy = replace(D1, waiting=3, running=9, available_blocks=10)
    assert place(DEMAND, [full, busy], CONFIG).decode_worker == "d1"


def test_worker_without_room_takes_a_few_and_then_none() -> None:
    full = replace(D0, available_blocks=0)
    assert place(DEMAND, [full], CONFIG) is not None
    assert place(DEMAND, [replace(full, ungranted=MAX_WAITING - 1)], CONFIG) is not None
    assert place(DEMAND, [replace(full, ungranted=MAX_WAITING)], CONFIG) is None
    assert place(DEMAND, [replace(full, waiting=MAX_WAITING)], CONFIG) is None


def test_replay_is_taken_in_spite_of_a_full_line() -> None:
    full = replace(D0, available_blocks=0, waiting=MAX_WAITING, ungranted=MAX_WAITING)
    assert place(replace(DEMAND, replay=True), [full], CONFIG).decode_worker == "d0"


def test_burst_is_limited_by_blocks_and_not_by_count() -> None:
    placed = replace(D0, ungranted=30, pending_blocks=90)
    assert place(DEMAND, [placed], CONFIG) is not None
    assert place(DEMAND, [replace(placed, pending_blocks=98)], CONFIG) is None


def test_worker_that_reports_waiting_ones_gets_nothing_for_its_free_blocks() -> None:
    # Blocks are free, but those who wait there come first.
    assert place(DEMAND, [replace(D0, waiting=MAX_WAITING)], CONFIG) is None


@pytest.mark.parametrize("busy", [{"backlog_tokens": 10}, {"pending_tokens": 10}, {"running": 1}])
def test_least_loaded_prefill_worker(busy: dict[str, int]) -> None:
    for workers in ([replace(P0, **busy), P1, D0], [D0, P1, replace(P0, **busy)]):
        assert place(DEMAND, workers, CONFIG).prefill_worker == "p1"


def test_backlog_counts_in_seconds() -> None:
    fast = replace(P0, backlog_tokens=2000, tokens_per_second=10_000.0)
    slow = replace(P1, backlog_tokens=500, tokens_per_second=1000.0)
    assert place(DEMAND, [slow, fast, D0], CONFIG).prefill_worker == "p0"


def test_unmeasured_prefill_worker_is_tried() -> None:
    fresh = replace(P1, tokens_per_second=0.0)
    assert place(DEMAND, [replace(P0, backlog_tokens=1), fresh, D0], CONFIG).prefill_worker == "p1"


def test_workers_to_avoid_are_the_last_choice() -> None:
    demand = replace(DEMAND, avoid=frozenset({"d0", "p0"}))
    busy = [replace(D1, running=9), replace(P1, backlog_tokens=999)]
    path = place(demand, [D0, P0, *busy], CONFIG)
    assert (path.prefill_worker, path.decode_worker) == ("p1", "d1")
    path = place(demand, [D0, P0], CONFIG)
    assert (path.prefill_worker, path.decode_worker) == ("p0", "d0")


def test_a_quiet_worker_is_the_last_choice() -> None:
    quiet = [replace(D0, quiet=True), replace(P0, quiet=True)]
    others = [replace(D1, running=50, available_blocks=1), replace(P1, backlog_tokens=10**6)]
    for avoid in (frozenset(), frozenset({"d1", "p1"})):
        path = place(replace(DEMAND, avoid=avoid), [*quiet, *others], CONFIG)
        assert (path.prefill_worker, path.decode_worker) == ("p1", "d1")


def test_a_quiet_decode_worker_alone_still_gets_work() -> None:
    assert place(DEMAND, [replace(D0, quiet=True), P0], CONFIG).decode_worker == "d0"


def test_nothing_waits_for_a_quiet_prefill_worker_unless_told_to() -> None:
    quiet = replace(P0, quiet=True)
    local = Path(PathKind.LOCAL, "prefill_quiet", None, "d0")
    assert place(DEMAND, [quiet, D0], CONFIG) == local
    forced = replace(DEMAND, force_path=PathKind.DISAGGREGATED)
    assert place(forced, [quiet, D0], CONFIG).prefill_worker == "p0"


def test_blocks_needed_include_the_next_token() -> None:
    assert [blocks_needed(n, 16) for n in (1, 15, 16, 31, 32)] == [1, 1, 2, 2, 3]
