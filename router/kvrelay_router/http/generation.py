"""The answers of one HTTP request while they are made.

New text goes to `sink` at once, from within the service's turn: no task wakes for a token. Where there
is none, or it takes nothing because the client is behind, outputs pile up here until the writer fetches
them. So the service never waits for a slow reader, and text that piles up leaves as one delta. What can
pile up is bounded by `max_tokens`. Everything else comes through one task per answer, which reads the
service's events.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvrelay_protocol.errors import ClientGone, InternalError, KvrelayError
from kvrelay_router.http.errors import log_defect
from kvrelay_router.http.timings import timings_object, usage_object
from kvrelay_router.http.validation import ChoicePlan, GenerationPlan
from kvrelay_router.requests.types import (
    ColdStart,
    Failed,
    Finished,
    FinishReason,
    Path,
    Placed,
    Queued,
    RequestEvent,
    RequestService,
    RequestStats,
    RequestStream,
    Resumed,
    Started,
    Tokens,
)


@dataclass(slots=True)
class Delta:
    """New text of one answer."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """One answer is complete."""

    index: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Notice:
    """Progress, for clients of the SDK's protocol."""

    event: str
    data: dict[str, Any]


Output = Delta | End | Notice
Sink = Callable[[int, str], bool]
"""Takes an answer's index and its new text, or returns False."""


class Choice:
    """One answer: tokens and events in, text and other outputs out."""

    def __init__(
        self, plan: ChoicePlan, stream: RequestStream, show: Callable[[int, str], None]
    ) -> None:
        self.plan = plan
        self.stream = stream
        self._index = plan.index
        self._text = plan.text
        self._show = show
        self.path: Path | None = None
        self.cached_tokens = 0
        self.stats: RequestStats | None = None
        self.reason: FinishReason | None = None
        self.error: KvrelayError | None = None

    @property
    def over(self) -> bool:
        return self.reason is not None or self.error is not None

    def take(self, ids: tuple[int, ...]) -> None:
        """Take new tokens: the path of every token. What the service calls must not raise."""
        try:
            new = self._text.push(ids)
            if new:
                self._show(self._index, new)
            if self._text.may_stop and self._text.stopped():
                # Not from within the service's own call: it is in the middle of its work.
                asyncio.get_running_loop().call_soon(self.stream.stop_early)
        except Exception as error:
            self.break_off(error)

    def break_off(self, defect: Exception) -> None:
        """A defect of ours ends the answer."""
        log_defect(defect, self.plan.request.request_id)
        self.error = self.error or InternalError("internal error while generating")
        asyncio.get_running_loop().call_soon(self.stream.cancel, "internal error")

    def handle(self, event: RequestEvent) -> list[Output]:
        """Take one event of the service."""
        match event:
            case Tokens(ids):
                self.take(ids)
                return []
            case Finished(reason, stats):
                return self._end(reason, stats)
            case Failed(error):
                if self.plan.text.stopped():
                    # The answer was complete before the failure; only its timings are lost.
                    return self._end(FinishReason.STOP, None)
                self.error = self.error or error
                return []
            case Placed(path):
                self.path = path
                return []
            case Queued(position, eta_s):
                return [Notice("queued", {"position": position, "eta_s": eta_s})]
            case ColdStart():
                return [Notice("cold_start", asdict(event))]
            case Started(cached_tokens):
                self.cached_tokens = cached_tokens
                return [Notice("started", self._started())]
            case Resumed(gap_s, from_index):
                return [Notice("resumed", {"gap_s": gap_s, "from_index": from_index})]

    def _end(self, reason: FinishReason, stats: RequestStats | None) -> list[Output]:
        index = self.plan.index
        text = self.plan.text.flush()
        self.stats = stats
        # The flush may complete a stop string, and the service can't know of stop strings.
        self.reason = FinishReason.STOP if self.plan.text.stopped() else reason
        rest: list[Output] = [Delta(index, text)] if text else []
        return [*rest, End(index, self.reason)]

    def _started(self) -> dict[str, Any]:
        path = self.path
        return {
            "path": path and path.kind.value,
            "reason": path and path.reason,
            "prefill_worker": path and path.prefill_worker,
            "decode_worker": path and path.decode_worker,
            "cached_tokens": self.cached_tokens,
            "prompt_tokens": len(self.plan.request.prompt_tokens),
        }

    @property
    def completion_tokens(self) -> int:
        """Tokens of this answer; those computed after a stop string don't count."""
        if self.stats is None or self.plan.text.stopped():
            return self.plan.text.tokens
        return self.stats.completion_tokens


class Generation:
    """All answers of one HTTP request. Owns their streams: `close` leaves none running."""

    def __init__(
        self,
        service: RequestService,
        plan: GenerationPlan,
        *,
        notices: bool,
    ) -> None:
        """Args: without `notices` progress is dropped, so that silence is silence."""
        self.plan = plan
        self._notices = notices
        self.choices: list[Choice] = []
        self.gone = False
        """The client left."""
        self.sink: Sink | None = None
        self._service = service
        self._outputs: list[Output] = []
        self._wake = asyncio.Event()
        self._pumps: list[asyncio.Task[None]] = []
        self._running = len(plan.choices)
        self._error: KvrelayError | None = None

    def start(self) -> None:
        """Submit every answer.

        Raises:
            KvrelayError: the service refuses one; `close` cancels those before it.
        """
        for plan in self.plan.choices:
            request = plan.request
            if self.choices:
                # Further answers are children of the first one's span: one trace, one root.
                request = replace(request, traceparent=self.choices[0].stream.traceparent)
            self.choices.append(Choice(plan, self._service.submit(request), self._show))
        self._outputs += [Delta(c.plan.index, c.plan.echo) for c in self.choices if c.plan.echo]
        for choice in self.choices:
            choice.stream.divert(choice.take)
        self._pumps = [asyncio.create_task(self._pump(choice)) for choice in self.choices]

    @property
    def path(self) -> Path | None:
        """Where the first placed answer runs."""
        return next((choice.path for choice in self.choices if choice.path is not None), None)

    @property
    def error(self) -> KvrelayError | None:
        """The first failure; it fails the whole request."""
        return self._error

    @property
    def complete(self) -> bool:
        """Every answer ended well."""
        return self._running == 0

    @property
    def trace_id(self) -> str:
        return self.choices[0].stream.trace_id

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.complete or self.gone or self.error is not None

    async def wait(self, until: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait for a condition on this object, a failure or a lost client; False if time ran out."""
        if until() or self.over:
            return True
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            self._wake.set()

        # A bare timer: asyncio.timeout costs several times as much, once a token.
        loop = asyncio.get_running_loop()
        timer = None if timeout_s is None else loop.call_later(timeout_s, expire)
        try:
            while not (until() or self.over or expired):
                self._wake.clear()
                await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()
        return until() or self.over

    async def placed(self, timeout_s: float | None) -> bool:
        """Wait until it is known where the request runs."""
        return await self.wait(lambda: self.path is not None, timeout_s)

    async def ended(self) -> None:
        """Wait until nothing more will come."""
        await self.wait(lambda: False)

    async def outputs(self, timeout_s: float | None = None) -> list[Output]:
        """Everything new, once there is something; empty if time ran out or nothing will come."""
        await self.wait(lambda: bool(self._outputs), timeout_s)
        taken, self._outputs = self._outputs, []
        return taken

    def client_gone(self) -> None:
        """Cancel everything at once: nobody is left to answer."""
        self.gone = True
        self._cancel("client disconnected")
        self._wake.set()

    async def close(self, reason: str = "response ended") -> None:
        """Cancel what still runs and end the tasks."""
        self._cancel(reason)
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def _cancel(self, reason: str) -> None:
        for choice in self.choices:
            if not choice.over:
                choice.stream.cancel(reason)

    async def _pump(self, choice: Choice) -> None:
        try:
            async for event in choice.stream:
                for output in choice.handle(event):
                    self._pile_up(output)
                if choice.over:
                    break
            else:
                choice.error = InternalError("the request ended without a result")
        except Exception as error:
            choice.break_off(error)
        if choice.error is None:
            self._running -= 1
        self._error = self._error or choice.error
        if isinstance(choice.error, ClientGone):
            self.gone = True
        self._wake.set()

    def _show(self, index: int, text: str) -> None:
        # What waits already goes first.
        if self._outputs or self.sink is None or not self.sink(index, text):
            self._pile_up(Delta(index, text))

    def _pile_up(self, output: Output) -> None:
        if isinstance(output, Notice) and not self._notices:
            return
        last = self._outputs[-1] if self._outputs else None
        if isinstance(output, Delta) and isinstance(last, Delta) and last.index == output.index:
            last.text += output.text
        else:
            self._outputs.append(output)
        self._wake.set()

    def usage(self) -> dict[str, Any]:
        """Token counts; a prompt shared by several answers counts once."""
        first_of_prompt = {c.plan.prompt_index: c for c in reversed(self.choices)}.values()
        return usage_object(
            prompt_tokens=sum(len(c.plan.request.prompt_tokens) for c in first_of_prompt),
            completion_tokens=sum(c.completion_tokens for c in self.choices),
            cached_tokens=sum(
                c.stats.cached_tokens if c.stats else c.cached_tokens for c in first_of_prompt
            ),
        )

    def timings(self) -> dict[str, Any] | None:
        """Where the first answer's time went; None where a failure after its end lost them."""
        stats = self.choices[0].stats
        return None if stats is None else timings_object(stats)
