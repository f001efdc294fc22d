"""A boto3 session of which every call is counted, and one of them is the last."""

from typing import Any

import boto3


class Crashed(BaseException):
    """The process is gone; nothing of ours may catch it."""


class CrashingSession:
    """Crashes at call number `at` (from 0), before AWS has heard of it or after it has answered."""

    def __init__(self, at: int | None = None, *, answered: bool = False, region: str) -> None:
        self.calls: list[str] = []
        self._at = at
        self._answered = answered
        self.session = boto3.Session(region_name=region)
        self.session.events.register("before-call", self._before)
        self.session.events.register("after-call", self._after)

    def _before(self, model: Any, **_: Any) -> None:
        self.calls.append(f"{model.service_model.service_name}.{model.name}")
        if not self._answered:
            self._crash()

    def _after(self, **_: Any) -> None:
        if self._answered:
            self._crash()

    def _crash(self) -> None:
        if len(self.calls) - 1 == self._at:
            raise Crashed(self.calls[-1])
