"""A boto3 session that counts its calls and dies before one of them."""

from typing import Any

import boto3

REGION = "us-east-1"


class Crashed(BaseException):
    """The process is gone; nothing of ours may catch it."""


class CrashingSession:
    """After `crash_at(n)`, `session` raises at the call number n from 0: between it and the one before."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._at = -1
        self.session = boto3.Session(region_name=REGION)
        self.session.events.register("before-call", self._before)

    def crash_at(self, number: int) -> None:
        self._at = number
        self.calls = []

    def _before(self, model: Any, **_: Any) -> None:
        if len(self.calls) == self._at:
            raise Crashed(f"before {model.name}")
        self.calls.append(model.name)
