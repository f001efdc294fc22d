"""A boto3 session that counts its calls and dies before one of them."""

from typing import Any

import boto3
import botocore.session

REGION = "us-east-1"
_MODELS = botocore.session.Session().get_component("data_loader")
"""Read once for all sessions."""


class Crashed(BaseException):
    """The process is gone; nothing of ours may catch it."""


class CrashingSession:
    """`session` raises at call number `at`, from 0: between that call and the one before."""

    def __init__(self, region: str, at: int | None = None) -> None:
        self.calls: list[str] = []
        self._at = at
        core = botocore.session.Session()
        core.register_component("data_loader", _MODELS)
        self.session = boto3.Session(botocore_session=core, region_name=region)
        self.session.events.register("before-call", self._before)

    def _before(self, model: Any, **_: Any) -> None:
        if len(self.calls) == self._at:
            raise Crashed(f"before {model.name}")
        self.calls.append(model.name)
