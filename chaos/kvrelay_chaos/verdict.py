"""What became of a request, judged against the answer of an undisturbed run. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from kvrelay import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    KvrelayClientError,
    StreamInterrupted,
)
from kvrelay_chaos.questions import Answer

CONNECTION = "connection"
"""Code of an error that a broken connection is."""
DEFECTS = frozenset({"internal_error", "invalid_request_error", "invalid_value"})
"""Codes that say: a defect of ours. No fault excuses one."""


class Verdict(StrEnum):
    """One of these for every request."""

    EXACT = "exact"
    """The whole answer, the same text."""
    TYPED_ERROR = "typed error"
    """An error with a code, and what was streamed before it is how the answer begins."""
    LEFT = "left"
    """The client went away, and what it had read is how the answer begins."""
    WRONG = "wrong"
    """A text that the answer does not begin with, or an end for another reason."""
    TRUNCATED = "truncated"
    """Called a success, and only a part of the answer."""
    HUNG = "hung"
    """Neither answer nor error within its deadline."""
    UNTYPED = "untyped"
    """An error without a code, or with that of a defect."""


GOOD = frozenset({Verdict.EXACT, Verdict.TYPED_ERROR, Verdict.LEFT})


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of one request."""

    text: str
    """As far as it came."""
    finish_reason: str | None = None
    error: KvrelayClientError | None = None
    left: bool = False
    """It went away of its own accord."""
    router_died: bool = False
    """The router it spoke to was killed meanwhile, so that its connection had to break."""


def judge(answer: Answer, seen: Seen) -> Verdict:
    """The verdict; whatever is not known to be right is wrong."""
    if isinstance(seen.error, APITimeoutError):
        return Verdict.HUNG
    if not answer.text.startswith(seen.text):
        return Verdict.WRONG
    if seen.left:
        return Verdict.LEFT
    if seen.error is not None:
        return _judge_error(seen.error, router_died=seen.router_died)
    if seen.text != answer.text:
        return Verdict.TRUNCATED
    return Verdict.EXACT if seen.finish_reason == answer.finish_reason else Verdict.WRONG


def _judge_error(error: KvrelayClientError, *, router_died: bool) -> Verdict:
    code = code_of(error)
    if code is None or code in DEFECTS or (code == CONNECTION and not router_died):
        return Verdict.UNTYPED
    return Verdict.TYPED_ERROR


def code_of(error: KvrelayClientError) -> str | None:
    """The server's code, `connection` where the connection broke, None where nothing says what it is."""
    if isinstance(error, APIStatusError):
        return error.code
    if isinstance(error, StreamInterrupted):
        return error.code or CONNECTION
    if isinstance(error, APIConnectionError):
        return CONNECTION
    return None
