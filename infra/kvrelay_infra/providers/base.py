"""The interface between what `decide` wants and the platform that starts and stops workers.

A provider sets a number and reports; it never decides. What it raises is a `ProviderError` of
`kvrelay_protocol.errors`, one line that names the platform, the value and the fix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Pool(StrEnum):
    """One of the two pools of workers."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What a platform says of one pool, in workers."""

    desired: int
    """What was asked for last."""
    running: int
    """Started by the platform; whether a worker serves is what its own `hello` says."""
    pending: int
    """Asked for and not running: being placed, pulling an image, starting."""
    reason: str = ""
    """Why the pending ones are not running, in the platform's words; empty where it gives none."""


class Provider(Protocol):
    """A platform that runs workers. At most one process may call `scale` for a pool (ADR 20)."""

    async def scale(self, pool: Pool, replicas: int) -> None:
        """Set how many workers of `pool` there shall be; returns when the platform has noted it.

        Idempotent: the number is a total, so a call that is repeated after a crash or a lost answer
        changes nothing.

        Raises:
            ValueError: `replicas` is negative.
            ProviderUnreachable: no answer; what was asked may or may not be noted.
            ProviderDenied: the credentials do not allow it.
            ProviderQuota: the account or the cluster is not allowed that many.
            ProviderMissing: what would be scaled does not exist.
            SecondWriter: something else sets this number.
        """

    async def describe(self) -> Mapping[Pool, PoolStatus]:
        """Both pools as the platform sees them now; raises as `scale` does."""

    async def close(self) -> None:
        """Give connections back; the workers stay."""


def checked(replicas: int) -> int:
    """`replicas`, which is not negative."""
    if replicas < 0:
        raise ValueError(f"replicas={replicas}: a pool cannot have fewer than 0 workers")
    return replicas
