"""The vocabulary between the pure layer and the two I/O drivers.

A *flow* is a generator: it yields actions, the driver carries each out and sends back the outcome.
`Client` and `AsyncClient` run the same flows; they differ in how an action is carried out.

```
flow ── Send, Read, Sleep ──► driver        flow ◄── Head, Chunk, Eof, Failure ── driver
flow ── Opened, Emit ───────► the caller of the stream
```
"""

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeAlias, TypeVar

from kvrelay._events import Event

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, ready to be sent, and sent again."""

    method: Literal["GET", "POST"]
    url: str
    headers: Mapping[str, str] = field(repr=False)  # they hold the API key
    body: bytes | None = field(default=None, repr=False)  # and this the prompt
    stream: bool = False
    """Keep a successful response open and hand its body out through `Read`."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request, giving up any response still open. Answer: `Head` or `Failure`."""

    request: Request
    connect_s: float | None
    deadline: float
    """On the monotonic clock: when the head (or, unless streaming, the whole body) must be in."""


@dataclass(frozen=True, slots=True)
class Read:
    """Wait for the next bytes of the open response. Answer: `Chunk`, `Eof` or `Failure`."""

    deadline: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait. Answer: None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Opened:
    """The server accepted the stream. Answer: None."""


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand an event to the caller. Answer: None."""

    event: Event


@dataclass(frozen=True, slots=True)
class Returned(Generic[T]):
    """The flow is over, and this is what it was for."""

    value: T


@dataclass(frozen=True, slots=True)
class Head:
    """An answer: its head, and its body unless that is still to be read."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of the body and when they arrived."""

    data: bytes = field(repr=False)
    at: float


@dataclass(frozen=True, slots=True)
class Eof:
    """The body ended as HTTP says it should."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The connection did not come about, broke, or was too slow."""

    kind: Literal["connect", "connect_timeout", "timeout", "cut"]
    detail: str
    cause: BaseException | None = field(default=None, repr=False)


Action: TypeAlias = Send | Read | Sleep | Opened | Emit
Outcome: TypeAlias = Head | Chunk | Eof | Failure | None
Flow: TypeAlias = Generator[Action, Outcome, T]
Step: TypeAlias = Opened | Emit | Returned[T]
"""Where a flow stops being the driver's business: the caller has to see it."""


def send(action: Send) -> Flow[Head | Failure]:
    """Yield `Send` and narrow its answer."""
    outcome = yield action
    if isinstance(outcome, Head | Failure):
        return outcome
    raise TypeError(f"a driver answered Send with {outcome!r}")


def read(action: Read) -> Flow[Chunk | Eof | Failure]:
    """Yield `Read` and narrow its answer."""
    outcome = yield action
    if isinstance(outcome, Chunk | Eof | Failure):
        return outcome
    raise TypeError(f"a driver answered Read with {outcome!r}")


# By class name along the MRO: httpx and its fork httpx2 share the names but no classes, and naming
# them here keeps both out of the import. First match wins.
_KINDS: tuple[tuple[str, Literal["connect", "connect_timeout", "timeout", "cut"]], ...] = (
    ("ConnectTimeout", "connect_timeout"),
    ("PoolTimeout", "connect_timeout"),
    ("ConnectError", "connect"),
    ("TimeoutException", "timeout"),
    ("TimeoutError", "timeout"),
    ("TransportError", "cut"),
    ("DecodingError", "cut"),
    ("StreamError", "cut"),
)


def failure_of(error: Exception) -> Failure | None:
    """What a transport's exception means, or None where it is not about transport."""
    names = {cls.__name__ for cls in type(error).__mro__}
    for name, kind in _KINDS:
        if name in names:
            return Failure(kind, str(error) or type(error).__name__, error)
    return None


def head_of(status: int, headers: Iterable[tuple[str, str]], body: bytes = b"") -> Head:
    """An answer from a transport's parts; of a repeated header the last one counts."""
    return Head(status, {name.lower(): value for name, value in headers}, body)


def failure_or_raise(error: Exception) -> Failure:
    """`failure_of`, for an `except` clause: what is not about transport goes on to the caller."""
    failure = failure_of(error)
    if failure is None:
        raise error
    return failure
