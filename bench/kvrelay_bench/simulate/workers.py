"""Rate models of workers: what they hold, and when the next thing on them will have happened.

A prefill worker computes one prompt after another. A decode worker gives each of its streams one token
a step, all at the same pace, so that one number says how far all are: its progress in steps. Both
report a `WorkerState`, as real ones do.
"""

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass

from kvrelay_bench.serve.workload import PlannedRequest
from kvrelay_bench.simulate.fleet import Rates
from kvrelay_bench.simulate.totals import Worker
from kvrelay_router.requests.placement import Role, WorkerState, blocks_needed
from kvrelay_router.requests.types import Path

Changed = dict[Worker, None]
"""Where workers put themselves when their state is another one; in order, so that runs repeat."""

_MEASURED = 32
"""Prompts that a worker's measured speed is taken from."""
_EPSILON = 1e-9


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way through the fleet."""

    plan: PlannedRequest
    blocks: int
    """KV blocks at its end."""
    prompt_blocks: int
    parked: bool = False
    """There was no decode worker when it came."""
    path: Path | None = None
    granted: bool = False
    prefilled: bool = False
    computed_tokens: int = 0
    computed_s: float = 0.0
    first_at: float = math.nan
    done_at: float = math.nan

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.plan.arrival_s

    @property
    def tpot_s(self) -> float:
        """(end - first token) / (tokens - 1); 0 of a single token."""
        return (self.done_at - self.first_at) / max(1, self.plan.output_tokens - 1)

    @property
    def done(self) -> bool:
        return not math.isnan(self.done_at)


class PrefixCache:
    """Least recently used blocks of one worker, as many tokens as its KV pool holds."""

    def __init__(self, tokens: int) -> None:
        self._room = tokens
        self._blocks: OrderedDict[int, int] = OrderedDict()

    def take(self, plan: PlannedRequest) -> int:
        """Tokens of the prompt that are there; all of it will be from now on."""
        cached = 0
        for block in plan.blocks:
            if block not in self._blocks:
                break
            cached += plan.block_tokens
        for block in plan.blocks:
            if block in self._blocks:
                self._blocks.move_to_end(block)
            else:
                self._blocks[block] = plan.block_tokens
                self._room -= plan.block_tokens
        while self._room < 0 and self._blocks:
            self._room += self._blocks.popitem(last=False)[1]
        return min(cached, plan.input_tokens - 1)  # the last position gives the first token


class Speed:
    """Prompt tokens per second of computation, over the last prompts."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, float]] = deque()
        self._tokens = 0
        self._seconds = 0.0
        self.tokens_per_s = 0.0

    def measured(self, tokens: int, seconds: float) -> None:
        self._last.append((tokens, seconds))
        self._tokens += tokens
        self._seconds += seconds
        if len(self._last) > _MEASURED:
            tokens, seconds = self._last.popleft()
            self._tokens -= tokens
            self._seconds -= seconds
        self.tokens_per_s = self._tokens / self._seconds


class PrefillWorker:
    """Prompts, one after another."""

    role = Role.PREFILL

    def __init__(self, name: str, rates: Rates, changed: Changed) -> None:
        self.name = name
        self.draining = False
        self._changed = changed
        self._state: WorkerState | None = None
        self._rates = rates
        self._cache = PrefixCache(rates.blocks * rates.block_size)
        self._speed = Speed()
        self._queue: deque[Request] = deque()
        self._backlog = 0
        self._touch()

    @property
    def load(self) -> int:
        return self._backlog

    @property
    def empty(self) -> bool:
        return not self._queue

    def drain(self) -> None:
        """Take nothing new."""
        self.draining = True
        self._touch()

    def submit(self, request: Request) -> bool:
        """Returns whether it is computed at once, and the caller has to time it."""
        cached = self._cache.take(request.plan)
        request.computed_tokens = request.plan.input_tokens - cached
        request.computed_s = self._rates.prefill_s(request.plan.input_tokens, cached)
        self._queue.append(request)
        self._backlog += request.computed_tokens
        self._touch()
        return len(self._queue) == 1

    def finish(self) -> tuple[Request, Request | None]:
        """The prompt that was computed, and the one that is now."""
        done = self._queue.popleft()
        self._backlog -= done.computed_tokens
        self._speed.measured(done.computed_tokens, done.computed_s)
        self._touch()
        return done, self._queue[0] if self._queue else None

    def state(self) -> WorkerState:
        if self._state is None:
            self._state = self._report()
        return self._state

    def _touch(self) -> None:
        self._state = None
        self._changed[self] = None

    def _report(self) -> WorkerState:
        blocks = self._rates.blocks
        return WorkerState(
            name=self.name,
            role=self.role,
            block_size=self._rates.block_size,
            total_blocks=blocks,
            available_blocks=blocks,
            running=len(self._queue),
            backlog_tokens=self._backlog,
            tokens_per_second=self._speed.tokens_per_s,
            draining=self.draining,
        )


class DecodeWorker:
    """Streams at one pace, and prompts of its own between their steps, a chunk a step."""

    role = Role.DECODE

    def __init__(self, name: str, rates: Rates, changed: Changed, now: float) -> None:
        self.name = name
        self.draining = False
        self._changed = changed
        self._state: WorkerState | None = None
        self.version = 0
        """Counts changes: a timer of an older version has been overtaken."""
        self._rates = rates
        self._cache = PrefixCache(rates.blocks * rates.block_size)
        self._speed = Speed()
        self._free = rates.blocks
        self._ungranted: OrderedDict[Request, None] = OrderedDict()
        self._pending_blocks = 0
        self._coming = 0
        """Granted, KV on its way."""
        self._streams: list[tuple[float, int, Request]] = []
        self._context = 0.0
        self._progress = 0.0
        self._updated = now
        self._local: deque[Request] = deque()
        self._left_s = 0.0
        """Of the prompt in front of `_local`, in seconds of computation."""
        self._local_tokens = 0
        self._chunk_s = rates.chunk_tokens / rates.prefill_tokens_per_s
        self._period_s = rates.decode_step_s(0, 0.0)
        """Of one step, with a chunk of a prompt in it where there is one."""
        self._touch()

    @property
    def load(self) -> int:
        return len(self._streams) + self._coming + len(self._ungranted)

    @property
    def empty(self) -> bool:
        return not (self._streams or self._coming or self._ungranted or self._local)

    def drain(self) -> None:
        """Take nothing new."""
        self.draining = True
        self._touch()

    def submit(self, request: Request) -> list[Request]:
        """Returns those that have got their blocks."""
        self._ungranted[request] = None
        self._pending_blocks += request.prompt_blocks
        self._touch()
        return self._grant()

    def compute(self, request: Request, now: float) -> None:
        """Compute a granted request's prompt here."""
        self._advance(now)
        cached = self._cache.take(request.plan)
        request.computed_tokens = request.plan.input_tokens - cached
        request.computed_s = self._rates.prefill_s(request.plan.input_tokens, cached)
        if not self._local:
            self._left_s = request.computed_s
        self._local.append(request)
        self._local_tokens += request.computed_tokens
        self._repace()

    def join(self, request: Request, now: float) -> None:
        """The KV of a granted request is here."""
        self._advance(now)
        self._enter(request)
        self._repace()

    def next_at(self) -> float | None:
        """When a stream or a prompt will have ended, if nothing changes before."""
        ends = []
        if self._streams:
            ends.append((self._streams[0][0] - self._progress) * self._period_s)
        if self._local:
            ends.append(self._left_s * self._period_s / self._chunk_s)
        return self._updated + max(0.0, min(ends)) if ends else None

    def step(self, now: float) -> tuple[list[Request], list[Request], list[Request]]:
        """Prompts computed, streams ended, and requests that got their blocks for it."""
        self._advance(now)
        prompts, ended = [], []
        stretch = self._period_s / self._chunk_s
        while self._local and self._left_s <= _EPSILON:
            request = self._local.popleft()
            self._local_tokens -= request.computed_tokens
            self._speed.measured(request.computed_tokens, request.computed_s * stretch)
            self._left_s = self._local[0].computed_s if self._local else 0.0
            prompts.append(request)
            self._enter(request)
        while self._streams and self._streams[0][0] - self._progress <= 1e-6:
            request = heapq.heappop(self._streams)[2]
            self._context -= _mean_context(request)
            self._free += request.blocks
            ended.append(request)
        self._repace()
        return prompts, ended, self._grant() if ended else []

    def state(self) -> WorkerState:
        if self._state is None:
            self._state = self._report()
        return self._state

    def _report(self) -> WorkerState:
        return WorkerState(
            name=self.name,
            role=self.role,
            block_size=self._rates.block_size,
            total_blocks=self._rates.blocks,
            available_blocks=self._free,
            running=len(self._streams) + self._coming,
            waiting=len(self._ungranted),
            backlog_tokens=self._local_tokens,
            tokens_per_second=self._speed.tokens_per_s,
            pending_blocks=self._pending_blocks,
            ungranted=len(self._ungranted),
            draining=self.draining,
        )

    def _grant(self) -> list[Request]:
        granted = []
        while self._ungranted:
            request = next(iter(self._ungranted))
            if request.blocks > self._free:
                break
            del self._ungranted[request]
            self._pending_blocks -= request.prompt_blocks
            self._free -= request.blocks
            self._coming += 1
            request.granted = True
            granted.append(request)
        return granted

    def _enter(self, request: Request) -> None:
        self._coming -= 1
        tokens_left = max(0, request.plan.output_tokens - 1)
        self._context += _mean_context(request)
        entry = (self._progress + tokens_left, request.plan.number, request)
        heapq.heappush(self._streams, entry)

    def _advance(self, now: float) -> None:
        passed, self._updated = now - self._updated, now
        if passed <= 0:
            return
        steps = passed / self._period_s
        self._progress += steps
        if self._local:
            self._left_s -= steps * self._chunk_s

    def _repace(self) -> None:
        """Streams or prompts have come or gone: steps take another time, and timers are overtaken."""
        self.version += 1
        step = self._rates.decode_step_s(len(self._streams), self._context)
        self._period_s = step + self._chunk_s if self._local else step
        self._touch()

    def _touch(self) -> None:
        self._state = None
        self._changed[self] = None


def make_request(plan: PlannedRequest, rates: Rates) -> Request:
    """A request that has arrived."""
    size = rates.block_size
    total = plan.input_tokens + plan.output_tokens
    return Request(plan, -(-total // size), blocks_needed(plan.input_tokens, size))


def _mean_context(request: Request) -> float:
    return request.plan.input_tokens + request.plan.output_tokens / 2
