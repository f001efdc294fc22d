"""What a caller says in headers about the request as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.types import Scope

from kvrelay_protocol.errors import InvalidRequest
from kvrelay_protocol.trace import TraceContext
from kvrelay_router.requests.types import PathKind


def header_values(scope: Scope) -> dict[str, str]:
    """A request's headers by lower-case name, the first of each.

    Starlette's own `Headers` reads the whole list again for every question.
    """
    pairs = reversed(scope["headers"])
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in pairs}


@dataclass(frozen=True, slots=True)
class CallerWishes:
    """What a caller says in headers."""

    traceparent: str | None
    force_path: PathKind | None
    deadline_s: float
    wait_s: float | None = None
    """Longest wait for a worker; None: the router's own limits."""
    tenant: bytes = b""
    """Prefixes are shared among requests of one tenant only; see `auth.tenant_of`."""

    @classmethod
    def from_headers(
        cls, headers: Mapping[str, str], longest_s: float, tenant: bytes = b""
    ) -> "CallerWishes":
        """Read them.

        Raises:
            InvalidRequest: one has a value that can't be followed.
        """
        traceparent = headers.get("traceparent")
        context = TraceContext.parse(traceparent)
        return cls(
            None if context is None else context.traceparent,
            _force_path(headers.get("x-kvrelay-force-path")),
            _deadline(headers.get("x-request-timeout"), longest_s),
            _wait(headers.get("x-kvrelay-wait")),
            tenant,
        )


def _force_path(given: str | None) -> PathKind | None:
    if given is None:
        return None
    try:
        return PathKind(given)
    except ValueError:
        names = " or ".join(PathKind)
        message = f"x-kvrelay-force-path must be {names}"
        raise InvalidRequest(message, param="x-kvrelay-force-path") from None


def _wait(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # NaN as well
        message = "x-kvrelay-wait must be a number of seconds, 0 or more"
        raise InvalidRequest(message, param="x-kvrelay-wait")
    return seconds


def _deadline(given: str | None, longest_s: float) -> float:
    if given is None:
        return longest_s
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # NaN as well
        message = "x-request-timeout must be a positive number of seconds"
        raise InvalidRequest(message, param="x-request-timeout")
    return min(seconds, longest_s)
