"""Whether to send a request again, and when. Pure: the dice and the clock come from outside."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from kvrelay._exchange import Failure, Head
from kvrelay._types import Retries

_AGAIN = frozenset({408, 409, 429})


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The pause the server asks for: `retry-after-ms` first, then `retry-after` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            pause = float(value) * unit
        except ValueError:
            pass
        else:
            if math.isnan(pause):
                continue
            return max(0.0, pause)
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            continue
        if when.tzinfo is None:  # "-0000": the date is in UTC, the sender's zone unknown
            when = when.replace(tzinfo=UTC)
        return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
    return None


def _worth_it(outcome: Head | Failure) -> bool:
    if isinstance(outcome, Failure):
        # After "timeout" the caller has waited as long as they were willing to.
        return outcome.kind != "timeout"
    match outcome.headers.get("x-should-retry"):
        case "true":
            return True
        case "false":
            return False
        case _:
            return outcome.status in _AGAIN or outcome.status >= 500


def pause_before_retry(
    outcome: Head | Failure, *, used: int, policy: Retries, dice: float
) -> float | None:
    """Seconds to wait before attempt `used + 2`, or None to give up.

    Only for outcomes before any output was seen. `dice` is uniform in [0, 1): clients that failed
    together should not come back together.
    """
    if used >= policy.max or not _worth_it(outcome):
        return None
    asked = retry_after_s(outcome.headers) if isinstance(outcome, Head) else None
    if asked is not None:
        return min(asked, policy.retry_after_max_s) * (1.0 + 0.1 * dice)
    return min(policy.backoff_s * 2.0**used, policy.backoff_max_s) * (0.5 + 0.5 * dice)
