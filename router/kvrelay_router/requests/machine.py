"""The life of one request as a pure state machine: an event in, a list of actions out.

```
RECEIVED ──► QUEUED / PARKED ──► PLACED ──► PREFILLING ──► TRANSFERRING ──► DECODING ──► FINISHED
    │                              ▲  │           │              │              │
    └──────── place at once ───────┘  └───────────┴── lost ──────┴──────────────┤
                                   ▲                                            │
                                   └──────────────── REPLAYING ◄────────────────┘
any state ──► FAILED (typed error) or CANCELLED (client gone)
```

There is no clock, no socket and no task in here: events carry their time, actions are carried out by
`service.py`. What an attempt still owes to a worker is two flags:

```
prefill_open   SubmitPrefill ... until ReleaseKv or Cancel is sent, or P failed or was lost
decode_open    SubmitDecode  ... until Cancel is sent, or D finished, failed or was lost
```

Whatever ends an attempt cancels exactly the open ones. Output tokens are numbered over all attempts; a
token is accepted only from the current attempt and only as the next number, so that a client sees each
once. A worker that sends anything else is out of step with what this machine knows, by a lost message,
another's, or a defect: its attempt is given up, and another one starts from what the client has.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from kvrelay_protocol.errors import (
    ClientGone,
    CorruptFrame,
    DeadlineExceeded,
    Draining,
    InternalError,
    KvrelayError,
    LeaseLost,
    NoCapacity,
    TransferError,
    WaitOver,
    WorkerLost,
)
from kvrelay_router.requests.actions import (
    Action,
    AllSent,
    Attempt,
    Cancel,
    Emit,
    FindPlace,
    OpenTransfer,
    OutOfStep,
    ReleaseKv,
    ResendKv,
    SubmitDecode,
    SubmitPrefill,
)
from kvrelay_router.requests.events import (
    Admitted,
    Broken,
    ClientCancelled,
    DeadlineReached,
    Event,
    KvMissing,
    KvReceived,
    KvSent,
    LeaseGranted,
    NoPlace,
    PlaceFound,
    PlaceTimedOut,
    PoolAwake,
    SequenceFailed,
    SequenceStarted,
    ShutDown,
    StartProgress,
    StoppedEarly,
    TokensArrived,
    WorkerEvent,
    WorkerGone,
)
from kvrelay_router.requests.types import (
    Failed,
    Finished,
    FinishReason,
    Path,
    PathKind,
    Placed,
    Queued,
    RequestStats,
    Resumed,
    Started,
    Tokens,
    ValidRequest,
)

MAX_ASKS = 6
"""A decode worker may ask for KV again this often. It has limits of its own; this one holds whatever it does."""

RETRYABLE = (WorkerLost, LeaseLost, Draining, TransferError)
"""A decode worker's failure of these kinds says nothing about the request: another attempt may work."""


class State(StrEnum):
    """Where a request is. The last three are terminal."""

    RECEIVED = "received"
    QUEUED = "queued"
    PARKED = "parked"
    PLACED = "placed"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    REPLAYING = "replaying"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})
_UNPLACED = frozenset({State.RECEIVED, State.QUEUED, State.PARKED})
_DECODING = State.DECODING  # looking a member up costs as much as a call
_PROGRESS = (State.PLACED, State.PREFILLING, State.TRANSFERRING, State.DECODING)


@dataclass(slots=True)
class _Run:
    """The attempt in progress (or the last one, with nothing open)."""

    number: int
    sequence_id: int
    path: Path
    offset: int
    placed_at: float
    prefill_open: bool
    decode_open: bool = True
    live: bool = True
    """Its messages still count."""
    started_at: float | None = None
    lease_opened: bool = False
    kv_received: bool = False
    resends: int = 0
    held: list[int] = field(default_factory=list)
    """Output of D from `offset + 1` on that overtook P's first token (two streams, no common order)."""
    held_finish: FinishReason | None = None


@dataclass(slots=True)
class _Measured:
    """What the statistics need; zeros where a stage did not happen."""

    queue_s: float = 0.0
    first_token_at: float | None = None
    cached_tokens: int = 0
    prefill_s: float = 0.0
    kv_transfer_s: float = 0.0
    kv_exposed_s: float = 0.0
    kv_bytes: int = 0
    kv_transport: str = ""


class RequestMachine:
    """One request. Owned by the service; nothing else may call `handle`."""

    def __init__(
        self,
        request: ValidRequest,
        *,
        received_at: float,
        max_replays: int,
        queue_timeout_s: float,
        replay_wait_s: float,
    ) -> None:
        self.request = request
        self.state = State.RECEIVED
        self.emitted: list[int] = []
        self._max_tokens = request.max_tokens
        self._received_at = received_at
        self.deadline_at = received_at + request.deadline_s
        """By the clock of the events; time spent parked moves it."""
        self._parked_at = received_at
        self._max_replays = max_replays
        self._queue_timeout_s = queue_timeout_s
        self._replay_wait_s = replay_wait_s
        self._handed_over = 0
        """Attempts that ended because their worker was asked to stop: no sign of anything wrong."""
        self._run: _Run | None = None
        self._measured = _Measured()
        self._started = False
        self._local_only = False
        self._cause: KvrelayError | None = None
        self._gap_from: float | None = None

    @property
    def path(self) -> Path | None:
        """The path of the current or last attempt."""
        return self._run.path if self._run else None

    @property
    def replays(self) -> int:
        return self._run.number if self._run else 0

    @property
    def awaits_kv(self) -> bool:
        """The current attempt's decode worker holds a lease, or waits for one, for KV to come."""
        run = self._run
        return run is not None and run.prefill_open and not run.kv_received

    @property
    def prompt_computed(self) -> bool:
        """The prefill worker's token is here: what is missing of the KV is on its way, or lost on it."""
        run = self._run
        return run is not None and len(self.emitted) > run.offset

    @property
    def lost_at(self) -> float | None:
        """When the attempt was lost whose next token has not come from another one yet."""
        return self._gap_from

    def holds(self, worker: str) -> bool:
        """Whether a worker has, as far as is known here, something of the current attempt."""
        run = self._run
        if run is None:
            return False
        if worker == run.path.decode_worker:
            return run.decode_open
        return worker == run.path.prefill_worker and run.prefill_open

    def take(
        self, sequence_id: int, worker: str, first_index: int, tokens: tuple[int, ...]
    ) -> bool:
        """`handle(TokensArrived(...))` for what comes with every step: tokens in the middle of an answer.

        Returns:
            True where the tokens were due, are accepted, and must be emitted as they are. False where
            there is more to it: then nothing happened, and `handle` decides.
        """
        run = self._run
        emitted = self.emitted
        due = len(emitted)
        if (
            run is None
            or self.state is not _DECODING
            or first_index != due
            or sequence_id != run.sequence_id
            or worker != run.path.decode_worker
            or not run.live
            or due <= run.offset
            or due + len(tokens) >= self._max_tokens
            or not tokens
        ):
            return False
        emitted += tokens
        return True

    def handle(self, event: Event) -> list[Action]:
        """Take one event; what is late, foreign or repeated yields nothing."""
        if self.state.terminal:
            return []
        match event:
            case TokensArrived():
                return self._tokens(event) if self._current(event) else []
            case SequenceStarted():
                return self._sequence_started(event) if self._current(event) else []
            case LeaseGranted():
                return self._lease_granted(event) if self._current(event) else []
            case KvSent():
                return self._kv_sent(event) if self._current(event) else []
            case KvReceived():
                return self._kv_received(event) if self._current(event) else []
            case KvMissing():
                return self._kv_missing(event) if self._current(event) else []
            case SequenceFailed():
                return self._sequence_failed(event) if self._current(event) else []
            case WorkerGone():
                return self._worker_gone(event)
            case Admitted():
                return self._admitted()
            case NoPlace():
                return self._no_place(event)
            case StartProgress(_, start):
                return [Emit(start)] if self.state is State.PARKED else []
            case PoolAwake(at):
                return self._pool_awake(at)
            case PlaceFound():
                return self._place_found(event)
            case PlaceTimedOut():
                return self._place_timed_out(event)
            case DeadlineReached():
                return self._deadline_reached()
            case ClientCancelled():
                return self._client_cancelled(event.reason)
            case StoppedEarly():
                return self._stopped_early(event)
            case ShutDown():
                return self._end(State.FAILED, Draining("the server is shutting down"), "shutdown")
            case Broken():
                return self._end(State.FAILED, InternalError(event.what), "failed")

    # ---- placing

    def _admitted(self) -> list[Action]:
        if self.state is not State.RECEIVED or self._run:
            return []
        return [FindPlace(0, self._queue_timeout_s)]

    def _no_place(self, event: NoPlace) -> list[Action]:
        if self.state not in _UNPLACED:
            return []
        if event.parked and self.state is not State.PARKED:
            self._parked_at = event.at
        self.state = State.PARKED if event.parked else State.QUEUED
        return [Emit(Queued(event.position, event.eta_s))]

    def _pool_awake(self, at: float) -> list[Action]:
        """Time spent parked is not the request's own: what it may run begins now."""
        if self.state is State.PARKED:
            self.state = State.QUEUED
            self.deadline_at += at - self._parked_at
        return []

    def _place_found(self, event: PlaceFound) -> list[Action]:
        if self.state not in _UNPLACED and self.state is not State.REPLAYING:
            return []
        number = 0
        if self._run is None:
            self._measured.queue_s = event.at - self._received_at
        else:
            number = self._run.number + 1
        path = event.path
        offset = len(self.emitted)
        self._run = _Run(
            number,
            event.sequence_id,
            path,
            offset,
            placed_at=event.at,
            prefill_open=path.prefill_worker is not None,
        )
        self.state = State.PLACED
        attempt = Attempt(
            event.sequence_id,
            self.request.prompt_tokens + tuple(self.emitted),
            offset,
            self.request.max_tokens - offset,
            max(0.0, self.deadline_at - event.at),
        )
        actions: list[Action] = [Emit(Placed(path, number))]
        if path.prefill_worker is not None:
            # First the one whose token the client waits for.
            actions.append(SubmitPrefill(path.prefill_worker, attempt))
        expect_kv = path.prefill_worker is not None
        actions.append(SubmitDecode(path.decode_worker, attempt, expect_kv))
        return actions

    def _place_timed_out(self, event: PlaceTimedOut) -> list[Action]:
        if self.state in _UNPLACED and event.attempt == 0:
            error: KvrelayError = self._nobody_came(event)
        elif self.state is State.REPLAYING and event.attempt == self.replays + 1:
            error = WorkerLost(
                f"{self._cause}; no other worker took the request over within {self._replay_wait_s:g} s",
            )
        else:
            return []
        return self._end(State.FAILED, error, "failed")

    def _nobody_came(self, event: PlaceTimedOut) -> NoCapacity:
        waited_s = self._queue_timeout_s if event.waited_s is None else event.waited_s
        asleep = "; the model sleeps, and wakes up now" if event.waking else ""
        message = f"no worker took the request within {waited_s:g} s{asleep}"
        kind = NoCapacity if self.request.wait_s is None else WaitOver
        return kind(message, retry_after_s=event.retry_after_s)

    # ---- messages of the current attempt

    def _current(self, event: WorkerEvent) -> _Run | None:
        """The attempt this event belongs to, if it is the one in progress."""
        run = self._run
        if run is None or not run.live or event.sequence_id != run.sequence_id:
            return None
        if event.worker not in {run.path.decode_worker, run.path.prefill_worker}:
            return None
        return run

    def _attempt(self) -> _Run:
        if self._run is None:
            raise AssertionError("only called for messages of the current attempt")
        return self._run

    def _sequence_started(self, event: SequenceStarted) -> list[Action]:
        run = self._attempt()
        computes_prompt = run.path.prefill_worker or run.path.decode_worker
        if event.worker != computes_prompt:
            return []
        # Not when it was heard of: the report waits for company on its way.
        run.started_at = min(event.at, run.placed_at + event.queue_seconds)
        self._advance(State.PREFILLING)
        return self._start(event.cached_tokens)

    def _start(self, cached_tokens: int) -> list[Action]:
        if self._started:
            return []
        self._started = True
        self._measured.cached_tokens = cached_tokens
        return [Emit(Started(cached_tokens))]

    def _lease_granted(self, event: LeaseGranted) -> list[Action]:
        run = self._attempt()
        if event.worker != run.path.decode_worker or not run.prefill_open or run.lease_opened:
            return []
        run.lease_opened = True
        return [OpenTransfer(self._prefill_worker(run), run.sequence_id, event.lease)]

    def _kv_sent(self, event: KvSent) -> list[Action]:
        run = self._attempt()
        if event.worker != run.path.prefill_worker:
            return []
        self._measured.prefill_s = event.prefill_seconds
        self._advance(State.TRANSFERRING)
        # Two streams: D may have it all already.
        if run.kv_received or not run.decode_open:
            return []
        return [AllSent(run.path.decode_worker, run.sequence_id)]

    def _kv_received(self, event: KvReceived) -> list[Action]:
        run = self._attempt()
        local = run.path.kind is PathKind.LOCAL
        if event.worker != run.path.decode_worker or local or run.kv_received:
            return []
        run.kv_received = True
        self._measured.kv_bytes += event.bytes
        self._measured.kv_transfer_s = event.seconds
        self._measured.kv_exposed_s = event.exposed_seconds
        self._measured.kv_transport = event.transport
        self._advance(State.DECODING)
        if not run.prefill_open:
            return []
        run.prefill_open = False
        return [ReleaseKv(self._prefill_worker(run), run.sequence_id)]

    def _kv_missing(self, event: KvMissing) -> list[Action]:
        run = self._attempt()
        if event.worker != run.path.decode_worker:
            return []
        if run.prefill_open and run.resends < MAX_ASKS:
            run.resends += 1
            return [ResendKv(self._prefill_worker(run), run.sequence_id, event.messages)]
        error = CorruptFrame(f"KV blocks arrived corrupt {run.resends + 1} times")
        return self._replace(event.at, error, local=True)

    def _sequence_failed(self, event: SequenceFailed) -> list[Action]:
        run = self._attempt()
        error = event.error
        retryable = isinstance(error, RETRYABLE)
        if event.worker == run.path.decode_worker:
            run.decode_open = False
            peer = run.path.prefill_worker
            if not retryable:
                return self._end(State.FAILED, error, "failed")
        else:
            # P may fail after its work is done and released; D then has all it needs.
            if not run.prefill_open:
                return []
            run.prefill_open = False
            peer = run.path.decode_worker
        # What P can't do D may do alone: P's word is never the last one on a request.
        transfer = isinstance(error, TransferError | LeaseLost)
        # A transfer error names the other side at least as often as the one that reports it, and a lease
        # ends because nothing comes over that link: the next try over it would end like this one.
        avoid = {event.worker, peer} if transfer and peer else {event.worker}
        return self._replace(
            event.at,
            error,
            local=transfer or not retryable,
            avoid=frozenset(avoid),
        )

    def _tokens(self, event: TokensArrived) -> list[Action]:
        run = self._attempt()
        if event.first_index > len(self.emitted):
            return self._hold(run, event)
        skip = len(self.emitted) - event.first_index
        known = self.emitted[event.first_index : event.first_index + len(event.tokens)]
        if tuple(known) != event.tokens[:skip]:
            what = f"sent another token {event.first_index} than the client has"
            return self._out_of_step(event.at, event.worker, what)
        if skip > len(event.tokens):
            return []
        if event.worker == run.path.prefill_worker:
            self._advance(State.TRANSFERRING)
        else:
            self._advance(State.DECODING)
        actions = self._accept(event.at, event.worker, event.tokens[skip:], event.finish)
        if run.live and (run.held or run.held_finish) and len(self.emitted) == run.offset + 1:
            held, finish = tuple(run.held), run.held_finish
            run.held, run.held_finish = [], None
            actions += self._accept(event.at, run.path.decode_worker, held, finish)
        return actions

    def _hold(self, run: _Run, event: TokensArrived) -> list[Action]:
        """Keep what D computed on top of P's first token until that token is here as well."""
        next_index = run.offset + 1 + len(run.held)
        from_decode = event.worker == run.path.decode_worker
        overtaking = from_decode and run.path.kind is PathKind.DISAGGREGATED
        if not overtaking or len(self.emitted) > run.offset or event.first_index > next_index:
            what = f"sent token {event.first_index} where {len(self.emitted)} was due"
            return self._out_of_step(event.at, event.worker, what)
        run.held.extend(event.tokens[next_index - event.first_index :])
        if event.finish and event.first_index + len(event.tokens) >= next_index:
            run.held_finish = event.finish
        if run.offset + 1 + len(run.held) > self.request.max_tokens:
            return self._too_many(event.at, event.worker)
        return []

    def _accept(
        self,
        at: float,
        worker: str,
        tokens: tuple[int, ...],
        finish: FinishReason | None,
    ) -> list[Action]:
        run = self._attempt()
        length = len(self.emitted) + len(tokens)
        if length > self.request.max_tokens:
            return self._too_many(at, worker)
        if finish is FinishReason.LENGTH and length < self.request.max_tokens:
            what = f"ended at token {length} of {self.request.max_tokens}"
            return self._out_of_step(at, worker, what)
        actions: list[Action] = []
        if tokens:
            actions += self._start(0)
            actions += self._resume(at, run)
            self._measure_first_token(at, run)
            self.emitted.extend(tokens)
            actions.append(Emit(Tokens(tokens)))
        if finish is None and len(self.emitted) == self.request.max_tokens:
            return [*actions, *self._finish(at, FinishReason.LENGTH)]
        if finish is None:
            return actions
        # D lets go by itself. P holds its blocks until told, also where its token was the last one.
        if worker == run.path.decode_worker:
            run.decode_open = False
        return [*actions, *self._finish(at, finish)]

    def _resume(self, at: float, run: _Run) -> list[Action]:
        gap_from, self._gap_from = self._gap_from, None
        if gap_from is None or not run.offset:
            return []
        return [Emit(Resumed(at - gap_from, run.offset))]

    def _measure_first_token(self, at: float, run: _Run) -> None:
        if self._measured.first_token_at is not None:
            return
        self._measured.first_token_at = at
        started_at = run.placed_at if run.started_at is None else run.started_at
        # The worker's own figure, where it comes, replaces this one.
        self._measured.prefill_s = self._measured.prefill_s or at - started_at

    # ---- losing an attempt

    def _worker_gone(self, event: WorkerGone) -> list[Action]:
        run = self._run
        if run is None or not run.live:
            return []
        decode_lost = event.worker == run.path.decode_worker
        prefill_lost = event.worker == run.path.prefill_worker
        if not decode_lost and not prefill_lost:
            return []
        if decode_lost:
            run.decode_open = False
        if prefill_lost:
            run.prefill_open = False
        # D goes on without P once it has all the KV and the router has P's token.
        if not decode_lost and self.state is State.DECODING and len(self.emitted) > run.offset:
            return []
        self._handed_over += event.drained
        error = WorkerLost(f"worker {event.worker} was lost ({event.why})")
        return self._replace(event.at, error)

    def _replace(
        self,
        at: float,
        cause: KvrelayError,
        *,
        local: bool = False,
        avoid: frozenset[str] = frozenset(),
    ) -> list[Action]:
        """Give the attempt up; the next one starts from what the client already has."""
        run = self._attempt()
        if self._gap_from is None:
            self._gap_from = at
        if run.number - self._handed_over >= self._max_replays:
            return self._end(State.FAILED, cause, "failed")
        cancels = self._close("replaced")
        self.state = State.REPLAYING
        self._cause = cause
        self._local_only = self._local_only or local
        find = FindPlace(
            run.number + 1,
            self._replay_wait_s,
            self._local_only,
            avoid,
            cause.code,
        )
        return [*cancels, find]

    def _out_of_step(self, at: float, worker: str, what: str) -> list[Action]:
        """What came does not follow from what went before: nothing of this attempt can be trusted."""
        error = WorkerLost(f"worker {worker} was out of step: it {what}")
        return [OutOfStep(worker, what), *self._replace(at, error, avoid=frozenset({worker}))]

    def _too_many(self, at: float, worker: str) -> list[Action]:
        return self._out_of_step(at, worker, f"sent more than {self.request.max_tokens} tokens")

    # ---- endings

    def _deadline_reached(self) -> list[Action]:
        error = DeadlineExceeded(
            f"the request did not finish within its {self.request.deadline_s:g} s",
        )
        return self._end(State.FAILED, error, "deadline")

    def _client_cancelled(self, reason: str) -> list[Action]:
        return self._end(State.CANCELLED, ClientGone(reason), "client_gone")

    def _stopped_early(self, event: StoppedEarly) -> list[Action]:
        if self._run is None:  # nothing was emitted, so nobody can have found a stop string
            return self._client_cancelled("stopped before the first token")
        return self._finish(event.at, FinishReason.STOP)

    def _end(self, state: State, error: KvrelayError, reason: str) -> list[Action]:
        cancels = self._close(reason)
        self.state = state
        return [*cancels, Emit(Failed(error))]

    def _finish(self, at: float, reason: FinishReason) -> list[Action]:
        cancels = self._close("finished")
        self.state = State.FINISHED
        return [*cancels, Emit(Finished(reason, self._stats(at)))]

    def _close(self, reason: str) -> list[Action]:
        """Cancel whatever is open; from here on messages of the attempt are late."""
        run = self._run
        if run is None:
            return []
        cancels: list[Action] = []
        if run.decode_open:
            cancels.append(Cancel(run.path.decode_worker, run.sequence_id, reason))
        if run.prefill_open:
            cancels.append(Cancel(self._prefill_worker(run), run.sequence_id, reason))
        run.decode_open = run.prefill_open = run.live = False
        return cancels

    def _stats(self, at: float) -> RequestStats:
        measured = self._measured
        run = self._attempt()
        first = at if measured.first_token_at is None else measured.first_token_at
        return RequestStats(
            path=run.path,
            prompt_tokens=len(self.request.prompt_tokens),
            completion_tokens=len(self.emitted),
            cached_tokens=measured.cached_tokens,
            queue_s=measured.queue_s,
            prefill_s=measured.prefill_s,
            kv_transfer_s=measured.kv_transfer_s,
            kv_exposed_s=measured.kv_exposed_s,
            decode_s=at - first,
            time_to_first_token_s=first - self._received_at,
            kv_bytes=measured.kv_bytes,
            kv_transport=measured.kv_transport,
            replays=run.number,
        )

    # ---- helpers

    def _advance(self, state: State) -> None:
        """Messages of two streams may cross: the state only moves forward."""
        if self.state in _PROGRESS and _PROGRESS.index(state) > _PROGRESS.index(self.state):
            self.state = state

    @staticmethod
    def _prefill_worker(run: _Run) -> str:
        if run.path.prefill_worker is None:
            raise AssertionError("prefill is only open on a path that has a prefill worker")
        return run.path.prefill_worker
