"""Clients in a closed loop: each asks, judges what it gets, and asks again."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from kvrelay import (
    AsyncClient,
    AsyncStream,
    KvrelayClientError,
    Resumed,
    Retries,
    TextDelta,
    Timeout,
)
from kvrelay_chaos.armed import Waiting
from kvrelay_chaos.faults.base import ClientOrder
from kvrelay_chaos.questions import Answer, Catalogue, Question
from kvrelay_chaos.verdict import Seen, Verdict, code_of, judge

MARGIN_S = 5.0
"""Past its deadline a request has this long to say so, before it counts as hung."""
_STREAMED = 0.8
"""Share of requests."""
_LEAVING = 0.03
"""Share of streams whose client changes its mind, apart from all faults."""
_PAUSE_AFTER_ERROR_S = 0.1
_SMALL_BUFFER = 2048


@dataclass(frozen=True, slots=True)
class Gap:
    """A pause in a stream that was resumed elsewhere: between the pieces before and after."""

    began: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as it went. Times are the loop's clock, in seconds."""

    question: int
    router: str
    streamed: bool
    verdict: Verdict
    code: str | None
    """Of its error."""
    detail: str
    """What was wrong, for a verdict that is not good."""
    began: float
    ended: float
    last_sign: float
    """When the client heard of it last before its end: the beginning, or a piece of the answer."""
    gaps: tuple[Gap, ...] = ()


@dataclass(slots=True)
class _Progress:
    """What one request has seen so far."""

    last_sign: float
    text: str = ""
    pieces: int = 0
    resumed: bool = False
    gaps: tuple[Gap, ...] = ()

    def piece(self, snapshot: str, now: float) -> None:
        if self.resumed and self.pieces:
            self.gaps = (*self.gaps, Gap(self.last_sign, now - self.last_sign))
        self.resumed = False
        self.text, self.last_sign = snapshot, now
        self.pieces += 1


class Load:
    """Owns the clients. `paused` lets what runs come to its end and starts nothing new."""

    def __init__(
        self,
        catalogue: Catalogue,
        routers: Sequence[tuple[str, str]],
        *,
        users: int,
        deadline_s: float,
        seed: int,
        epoch_of: Callable[[str], int],
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        """Args: `routers` are names and URLs; `epoch_of` is `Stack.epoch`."""
        self.orders: Waiting[ClientOrder] = Waiting()
        self._catalogue = catalogue
        self._routers = routers
        self._users = users
        self._deadline_s = deadline_s
        self._seed = seed
        self._epoch_of = epoch_of
        self._on_outcome = on_outcome
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._running = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: dict[str, AsyncClient] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The clients at work; at the end, what they still ask comes to its end first."""
        self._clients = {name: _client(url, self._deadline_s) for name, url in self._routers}
        self._tasks = [asyncio.create_task(self._user(n)) for n in range(self._users)]
        try:
            yield
            self._may_start.clear()
            await self._quiet.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for client in self._clients.values():
                await client.close()

    def failure(self) -> BaseException | None:
        """What ended a client that should not have ended."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception():
                return task.exception()
        return None

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """No request runs inside."""
        self._may_start.clear()
        await self._quiet.wait()
        try:
            yield
        finally:
            self._may_start.set()

    async def _user(self, number: int) -> None:
        dice = random.Random(f"kvrelay chaos user {self._seed} {number}")
        while True:
            await self._may_start.wait()
            question, answer = dice.choice(self._catalogue)
            router, url = dice.choice(self._routers)
            self._running += 1
            self._quiet.clear()
            try:
                # The client keeps its limits itself; a client that does not would stop the run.
                async with asyncio.timeout(self._deadline_s + 2 * MARGIN_S):
                    if dice.random() < _STREAMED:
                        outcome = await self._stream(question, answer, router, url, dice)
                    else:
                        outcome = await self._chat(question, answer, router)
            except TimeoutError:
                outcome = _hung(question, router, self._deadline_s + 2 * MARGIN_S)
            finally:
                self._running -= 1
                if not self._running:
                    self._quiet.set()
            self._on_outcome(outcome)
            if outcome.code is not None:
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async def _chat(self, question: Question, answer: Answer, router: str) -> Outcome:
        watch = self._watch(router)
        progress = _Progress(time.monotonic())
        began = progress.last_sign
        try:
            final = await self._clients[router].chat(question.messages, **question.options)
            seen = Seen(final.text, final.finish_reason)
        except KvrelayClientError as error:
            seen = Seen("", error=error, router_died=watch())
        return _outcome(
            question, answer, router, seen, began=began, progress=progress, streamed=False
        )

    async def _stream(
        self, question: Question, answer: Answer, router: str, url: str, dice: random.Random
    ) -> Outcome:
        watch = self._watch(router)
        # Before it begins, so that an order is never left behind by a stream that has ended.
        armed = self.orders.take(lambda order: order.after_pieces < question.max_tokens // 2)
        order = armed.order if armed else None
        if order is None and dice.random() < _LEAVING:
            order = ClientOrder(leaves=True, after_pieces=dice.randint(0, 8))
        progress = _Progress(time.monotonic())
        began = progress.last_sign
        hit = False
        async with self._client_for(router, url, order) as client:
            try:
                async with client.stream(question.messages, **question.options) as stream:
                    hit = await _read(stream, progress, order)
                    if hit and order is not None and order.leaves:
                        seen = Seen(progress.text, left=True)
                    else:
                        final = await stream.final()
                        seen = Seen(final.text, final.finish_reason)
            except KvrelayClientError as error:
                seen = Seen(progress.text, error=error, router_died=watch())
        if armed is not None:
            if hit:
                armed.fire()
            else:
                self.orders.rearm(armed)
        return _outcome(
            question, answer, router, seen, began=began, progress=progress, streamed=True
        )

    def _watch(self, router: str) -> Callable[[], bool]:
        """Asked later: was the router gone at any time since now?"""
        before = self._epoch_of(router)
        return lambda: before % 2 == 1 or self._epoch_of(router) != before

    @asynccontextmanager
    async def _client_for(
        self, router: str, url: str, order: ClientOrder | None
    ) -> AsyncIterator[AsyncClient]:
        if order is None or order.leaves:
            yield self._clients[router]
            return
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)]
        transport = httpx.AsyncHTTPTransport(socket_options=small)
        async with httpx.AsyncClient(transport=transport) as http:
            yield _client(url, self._deadline_s, http)


async def _read(stream: AsyncStream, progress: _Progress, order: ClientOrder | None) -> bool:
    """Read to the end, or as far as the order says. Returns whether the order was carried out."""
    hit = False
    async for event in stream:
        match event:
            case Resumed():
                progress.resumed = True
            case TextDelta(snapshot=snapshot):
                progress.piece(snapshot, time.monotonic())
        if order is not None and not hit and progress.pieces >= order.after_pieces:
            hit = True
            if order.leaves:
                return True
            await asyncio.sleep(order.seconds)
    return hit


def _outcome(
    question: Question,
    answer: Answer,
    router: str,
    seen: Seen,
    *,
    began: float,
    progress: _Progress,
    streamed: bool,
) -> Outcome:
    verdict = judge(answer, seen)
    code = None if seen.error is None else code_of(seen.error) or type(seen.error).__name__
    detail = str(seen.error) if seen.error is not None else ""
    if verdict in {Verdict.WRONG, Verdict.TRUNCATED}:
        detail = f"{detail} got {seen.text!r} ({seen.finish_reason}), expected {answer.text!r}"
    return Outcome(
        question.number,
        router,
        streamed,
        verdict,
        code,
        detail.strip(),
        began,
        time.monotonic(),
        progress.last_sign,
        progress.gaps,
    )


def _hung(question: Question, router: str, seconds: float) -> Outcome:
    now = time.monotonic()
    detail = f"the client itself did not come back within {seconds:g} s"
    began = now - seconds
    return Outcome(
        question.number, router, False, Verdict.HUNG, None, detail, began, now, last_sign=began
    )


def _client(url: str, deadline_s: float, http: httpx.AsyncClient | None = None) -> AsyncClient:
    limit = deadline_s + MARGIN_S
    timeout = Timeout(connect=MARGIN_S, first_token=limit, idle=limit, total=limit)
    # One request is one verdict: what it ends in is not asked for again.
    return AsyncClient(url, http_client=http, timeout=timeout, retries=Retries(max=0))


async def undisturbed(
    questions: Sequence[Question], url: str, *, users: int, deadline_s: float
) -> list[tuple[Question, Answer]]:
    """Ask everything once, before the first fault.

    Raises:
        KvrelayClientError: a stack that nothing is wrong with has to answer.
    """
    slots = asyncio.Semaphore(users)
    client = _client(url, deadline_s)

    async def ask(question: Question) -> tuple[Question, Answer]:
        async with slots:
            final = await client.chat(question.messages, **question.options)
        return question, Answer(final.text, final.finish_reason)

    try:
        return list(await asyncio.gather(*map(ask, questions)))
    finally:
        with contextlib.suppress(httpx.HTTPError):
            await client.close()
