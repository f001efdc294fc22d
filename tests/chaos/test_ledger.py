from dataclasses import replace

import pytest

from kvrelay_chaos.ledger import Fired, Leak, Ledger, Spread
from kvrelay_chaos.load import Gap, Outcome
from kvrelay_chaos.plan import Fault
from kvrelay_chaos.verdict import Verdict

FAULT = Fault(0, "kill_worker", "decode-0", 0.0, {})
EXACT = Outcome(1, "router-0", True, Verdict.EXACT, None, "", began=0.0, ended=9.0, last_sign=8.0)
ERROR = replace(EXACT, verdict=Verdict.TYPED_ERROR, code="worker_lost", ended=10.0, last_sign=7.0)


def _ledger(*outcomes: Outcome, breaks: tuple[float, ...] = ()) -> Ledger:
    ledger = Ledger({"kill_worker": len(breaks)}, outcomes=list(outcomes))
    ledger.fired = [Fired(FAULT, at, breaks=True) for at in breaks]
    return ledger


def test_time_to_error_counts_from_the_first_break_after_the_last_sign():
    assert _ledger(ERROR, breaks=(6.0, 8.5, 9.5, 12.0)).time_to_error() == Spread(1, 1.5, 1.5, 1.5)


def test_without_a_break_in_between_time_to_error_counts_from_the_last_sign():
    assert _ledger(ERROR, breaks=(6.0, 12.0)).time_to_error().maximum == 3.0


def test_answers_without_a_stream_have_no_time_to_error():
    assert _ledger(replace(ERROR, streamed=False)).time_to_error().count == 0


def test_gaps_of_all_requests_make_the_recovery_gap():
    gaps = _ledger(
        replace(EXACT, gaps=(Gap(1.0, 0.5), Gap(2.0, 1.0))), replace(ERROR, gaps=(Gap(5.0, 2.0),))
    ).recovery_gap()
    assert (gaps.count, gaps.p50, gaps.maximum) == (3, 1.0, 2.0)


def test_a_long_gap_names_the_faults_in_it():
    ledger = _ledger(replace(EXACT, gaps=(Gap(5.0, 2.0),)), breaks=(1.0, 4.8, 6.0, 7.5))
    assert ledger.longest_gaps() == [
        {"seconds": 2.0, "faults": ["kill_worker decode-0 -0.20 s", "kill_worker decode-0 +1.00 s"]}
    ]


def test_the_slowest_errors_come_first_with_their_codes():
    late = replace(ERROR, last_sign=2.0, code="deadline_exceeded")
    first, second = _ledger(ERROR, late, EXACT, breaks=(4.0,)).slowest_errors()
    assert (first["code"], first["silent_s"]) == ("deadline_exceeded", 6.0)
    assert first["faults"] == ["kill_worker decode-0 +2.00 s"]
    assert (second["code"], second["silent_s"]) == ("worker_lost", 3.0)


def test_nothing_has_no_percentiles():
    assert Spread.of([]) == Spread(0, None, None, None)


def test_a_run_passes_when_nothing_is_wrong_and_everything_fired():
    assert _ledger(EXACT, ERROR, breaks=(1.0,)).passed


@pytest.mark.parametrize("verdict", ["wrong", "truncated", "hung", "untyped"])
def test_one_bad_answer_fails_a_run(verdict):
    assert not _ledger(EXACT, replace(EXACT, verdict=Verdict(verdict)), breaks=(1.0,)).passed


def test_a_leak_a_crash_or_a_fault_that_did_not_fire_fails_a_run():
    leaking, crashing, idle = (_ledger(EXACT, breaks=(1.0,)) for _ in range(3))
    leaking.leaks.append(Leak("decode-0", "blocks", 3))
    crashing.crashes.append("decode-0 ended by itself")
    idle.planned = {"kill_worker": 2}
    assert not any(ledger.passed for ledger in (leaking, crashing, idle))
    assert leaking.numbers()["blocks_leaked"] == 3
    assert idle.unfired == 1


def test_rows_say_for_every_kind_how_often_it_was_planned_and_how_often_it_fired():
    ledger = _ledger(breaks=(1.0, 2.0))
    ledger.planned = {"kill_worker": 3, "clock_jump": 1}
    assert ledger.rows() == [
        {"fault": "clock_jump", "planned": 1, "fired": 0},
        {"fault": "kill_worker", "planned": 3, "fired": 2},
    ]
