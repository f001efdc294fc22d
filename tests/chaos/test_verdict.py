import pytest

from kvrelay import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    InvalidResponseError,
    StreamInterrupted,
)
from kvrelay_chaos.questions import Answer
from kvrelay_chaos.verdict import GOOD, Seen, Verdict, judge

ANSWER = Answer("abcdef", "stop")
LOST = StreamInterrupted("lost", code="worker_lost")
CUT = StreamInterrupted("the connection broke")
REFUSED = APIConnectionError("no answer")


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (Seen("abcdef", "stop"), Verdict.EXACT),
        (Seen("abcdef", "length"), Verdict.WRONG),
        (Seen("abcdeX", "stop"), Verdict.WRONG),
        (Seen("abcdefg", "stop"), Verdict.WRONG),
        (Seen("abc", "stop"), Verdict.TRUNCATED),
        (Seen("", "stop"), Verdict.TRUNCATED),
        (Seen("abc", error=LOST), Verdict.TYPED_ERROR),
        (Seen("", error=APIStatusError("no", status_code=503, code="no_capacity")),
         Verdict.TYPED_ERROR),
        (Seen("abX", error=LOST), Verdict.WRONG),
        (Seen("abc", left=True), Verdict.LEFT),
        (Seen("abX", left=True), Verdict.WRONG),
        (Seen("abc", error=APITimeoutError("late")), Verdict.HUNG),
        (Seen("abc", error=CUT, router_died=True), Verdict.TYPED_ERROR),
        (Seen("abc", error=CUT), Verdict.UNTYPED),
        (Seen("", error=REFUSED, router_died=True), Verdict.TYPED_ERROR),
        (Seen("", error=REFUSED), Verdict.UNTYPED),
        (Seen("", error=APIStatusError("no", status_code=500)), Verdict.UNTYPED),
        (Seen("", error=APIStatusError("no", status_code=500, code="internal_error")),
         Verdict.UNTYPED),
        (Seen("", error=InvalidResponseError("what is this")), Verdict.UNTYPED),
    ],
)  # fmt: skip
def test_every_end_has_one_verdict(seen, verdict):
    assert judge(ANSWER, seen) is verdict


def test_an_empty_answer_can_be_exact():
    assert judge(Answer("", "stop"), Seen("", "stop")) is Verdict.EXACT


def test_only_right_answers_typed_errors_and_goodbyes_are_good():
    assert {Verdict.EXACT, Verdict.TYPED_ERROR, Verdict.LEFT} == GOOD
