"""Random events, valid and absurd, against the request machine: the invariants hold whatever comes.

The world outside is modelled by what each worker holds: `held` has every (worker, sequence) that was
submitted and not yet cancelled, released, failed, finished or lost.
"""

import copy

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvrelay_protocol import errors
from kvrelay_protocol.fleet_pb2 import Lease
from kvrelay_router.requests import actions as act
from kvrelay_router.requests import events as ev
from kvrelay_router.requests import machine as m
from kvrelay_router.requests.types import (
    ColdStart,
    Failed,
    Finished,
    FinishReason,
    Path,
    PathKind,
    Started,
    Tokens,
)

from .conftest import a_request

MAX_TOKENS = 12
ERRORS = [
    errors.LeaseLost("x"),
    errors.PeerLost("x"),
    errors.CorruptFrame("x"),
    errors.Draining("x"),
    errors.InternalError("x"),
    errors.ContextOverflow("x"),
]
workers = st.sampled_from(["P", "D", "Q", "E"])
finishes = st.sampled_from([None] * 6 + [FinishReason.STOP])


def token(index: int) -> int:
    return 1000 + index


class Requests(RuleBasedStateMachine):
    @initialize(replays=st.integers(0, 3))
    def receive(self, replays: int) -> None:
        self.now = 0.0
        self.machine = m.RequestMachine(
            a_request(max_tokens=MAX_TOKENS),
            received_at=0.0,
            max_replays=replays,
            queue_timeout_s=30.0,
            replay_wait_s=2.0,
        )
        self.next_id = 1
        self.sequence_ids = [999]
        self.path: Path | None = None
        self.find: act.FindPlace | None = None
        self.events: list[object] = []
        self.held: set[tuple[str, int]] = set()
        self.prefills: set[tuple[str, int]] = set()
        self.replays = replays
        self.feed(ev.Admitted(0.0))

    def feed(self, event: ev.Event) -> None:
        was_terminal = self.machine.state.terminal
        actions = self.machine.handle(event)
        assert not (was_terminal and actions)
        for action in actions:
            self.obey(action)

    def obey(self, action: act.Action) -> None:
        match action:
            case act.Emit(event):
                self.events.append(event)
            case act.FindPlace():
                assert self.find is None
                assert action.attempt <= self.replays
                self.find = action
            case act.SubmitDecode(worker, attempt) | act.SubmitPrefill(worker, attempt):
                emitted = self.emitted()
                assert attempt.tokens[len(attempt.tokens) - len(emitted) :] == emitted
                assert attempt.output_offset == len(emitted)
                assert attempt.max_tokens == MAX_TOKENS - len(emitted) > 0
                self.held.add((worker, attempt.sequence_id))
                if isinstance(action, act.SubmitPrefill):
                    self.prefills.add((worker, attempt.sequence_id))
            case act.OpenTransfer(worker, sequence_id) | act.ResendKv(worker, sequence_id):
                assert (worker, sequence_id) in self.prefills
            case act.ReleaseKv(worker, sequence_id):
                assert (worker, sequence_id) in self.prefills
                self.let_go(worker, sequence_id)
            case act.Cancel(worker, sequence_id):
                self.let_go(worker, sequence_id)

    def let_go(self, worker: str, sequence_id: int) -> None:
        self.held.discard((worker, sequence_id))
        self.prefills.discard((worker, sequence_id))

    def emitted(self) -> tuple[int, ...]:
        return tuple(i for e in self.events if isinstance(e, Tokens) for i in e.ids)

    def tick(self) -> float:
        self.now += 0.25
        return self.now

    # ---- the shell

    @rule(local=st.booleans(), decode=st.sampled_from("DE"), prefill=st.sampled_from("PQ"))
    def find_place(self, local: bool, decode: str, prefill: str) -> None:
        if self.find is None or self.machine.state.terminal:
            return
        self.find = None
        if local:
            self.path = Path(PathKind.LOCAL, "r", None, decode)
        else:
            self.path = Path(PathKind.DISAGGREGATED, "r", prefill, decode)
        self.sequence_ids.append(self.next_id)
        self.feed(ev.PlaceFound(self.tick(), self.next_id, self.path))
        self.next_id += 1

    @rule(parked=st.booleans())
    def no_place(self, parked: bool) -> None:
        if self.find is not None:
            self.feed(ev.NoPlace(self.tick(), 1, None, parked))

    @rule()
    def start_progress(self) -> None:
        before = len(self.events)
        self.feed(ev.StartProgress(self.tick(), ColdStart("decode", "warm_up", 0, 0, None)))
        assert (len(self.events) > before) == (self.machine.state is m.State.PARKED)

    @rule()
    def pool_awake(self) -> None:
        before = self.machine.deadline_at
        parked = self.machine.state is m.State.PARKED
        self.feed(ev.PoolAwake(self.tick()))
        assert self.machine.state is not m.State.PARKED
        assert (self.machine.deadline_at > before) == parked

    @rule(attempt=st.integers(0, 4))
    def timeout(self, attempt: int) -> None:
        if self.find is not None and attempt:
            self.feed(ev.PlaceTimedOut(self.tick(), attempt, 1.0))

    # ---- well-behaved workers

    @rule(count=st.integers(1, 3), back=st.integers(0, 2), ahead=st.booleans(), finish=finishes)
    def decode_tokens(self, count: int, back: int, ahead: bool, finish: FinishReason) -> None:
        """D goes on from what it has, repeats a little, or overtakes P's first token."""
        if self.path is None:
            return
        first = max(0, len(self.emitted()) - back) + (ahead and not back)
        self.tokens(self.path.decode_worker, self.sequence_ids[-1], first, count, finish)

    @rule(finish=finishes)
    def first_token(self, finish: FinishReason | None) -> None:
        if self.path is not None and self.path.prefill_worker is not None:
            first = len(self.emitted())
            self.tokens(self.path.prefill_worker, self.sequence_ids[-1], first, 1, finish)

    @rule()
    def transfer(self) -> None:
        if self.path is None:
            return
        sid, decode = self.sequence_ids[-1], self.path.decode_worker
        self.feed(ev.LeaseGranted(self.tick(), sid, decode, Lease()))
        self.feed(ev.KvReceived(self.tick(), sid, decode, 1, 0.1, 0.1, "t"))

    # ---- anything from anybody

    @rule(
        worker=workers,
        which=st.integers(0, 3),
        first=st.integers(0, MAX_TOKENS + 2),
        count=st.integers(0, 4),
        finish=finishes,
    )
    def any_tokens(self, worker: str, which: int, first: int, count: int, finish) -> None:
        sid = self.sequence_ids[-1 - which % len(self.sequence_ids)]
        self.tokens(worker, sid, first, count, finish)

    @rule(worker=workers, which=st.integers(0, 3), kind=st.integers(0, 4))
    def any_message(self, worker: str, which: int, kind: int) -> None:
        sid, at = self.sequence_ids[-1 - which % len(self.sequence_ids)], self.tick()
        self.feed(
            [
                ev.SequenceStarted(at, sid, worker, 1, 0.0),
                ev.LeaseGranted(at, sid, worker, Lease()),
                ev.KvSent(at, sid, worker, 1, 0.1, 0.1, "t"),
                ev.KvReceived(at, sid, worker, 1, 0.1, 0.1, "t"),
                ev.KvMissing(at, sid, worker, (1,)),
            ][kind],
        )

    @rule(worker=workers, which=st.integers(0, 1), error=st.sampled_from(ERRORS))
    def any_failure(self, worker: str, which: int, error: errors.KvrelayError) -> None:
        sid = self.sequence_ids[-1 - which % len(self.sequence_ids)]
        self.let_go(worker, sid)
        self.feed(ev.SequenceFailed(self.tick(), sid, worker, error))

    @rule(worker=workers)
    def lose(self, worker: str) -> None:
        for sid in self.sequence_ids:
            self.let_go(worker, sid)
        self.feed(ev.WorkerGone(self.tick(), worker, "cut"))

    @rule(kind=st.integers(0, 40))
    def end(self, kind: int) -> None:
        at = self.tick()
        endings = [
            ev.DeadlineReached(at),
            ev.ClientCancelled(at, "gone"),
            ev.StoppedEarly(at),
            ev.ShutDown(at),
            ev.Broken(at, "x"),
        ]
        if kind < len(endings):
            self.feed(endings[kind])

    def tokens(self, worker: str, sid: int, first: int, count: int, finish) -> None:
        ids = tuple(token(i) for i in range(first, first + count))
        # A decode worker lets go of what it finishes; a prefill worker only when told.
        if finish and (worker, sid) not in self.prefills:
            self.held.discard((worker, sid))
        event = ev.TokensArrived(self.tick(), sid, worker, first, ids, finish)
        if finish is None and self.short_way(event):
            return
        self.feed(event)

    def short_way(self, event: ev.TokensArrived) -> bool:
        """What `take` accepts, `handle` would have emitted just so; what it refuses it leaves alone."""
        before, twin = copy.deepcopy(self.machine), copy.deepcopy(self.machine)
        args = (event.sequence_id, event.worker, event.first_index, event.tokens)
        if not self.machine.take(*args):
            assert vars(before)["emitted"] == self.machine.emitted
            assert before.state is self.machine.state
            return False
        assert twin.handle(event) == [act.Emit(Tokens(event.tokens))]
        assert (twin.emitted, twin.state) == (self.machine.emitted, self.machine.state)
        self.events.append(Tokens(event.tokens))
        return True

    # ---- what must hold

    @invariant()
    def tokens_come_once_and_in_order(self) -> None:
        emitted = self.emitted()
        assert emitted == tuple(token(i) for i in range(len(emitted)))
        assert len(emitted) <= MAX_TOKENS
        assert emitted == tuple(self.machine.emitted)

    @invariant()
    def one_start_and_one_end(self) -> None:
        ends = [i for i, e in enumerate(self.events) if isinstance(e, Finished | Failed)]
        assert len(ends) == self.machine.state.terminal
        assert not ends or ends[0] == len(self.events) - 1
        starts = [i for i, e in enumerate(self.events) if isinstance(e, Started)]
        firsts = [i for i, e in enumerate(self.events) if isinstance(e, Tokens)]
        assert len(starts) <= 1
        assert not firsts or starts[0] < firsts[0]

    @invariant()
    def only_the_current_attempt_is_held(self) -> None:
        if self.machine.state.terminal or self.find is not None:
            assert not self.held
        else:
            assert {sid for _, sid in self.held} <= {self.sequence_ids[-1]}

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.feed(ev.DeadlineReached(self.tick()))
            assert self.machine.state.terminal
            assert not self.held


TestRequests = Requests.TestCase
TestRequests.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is not a finding
)
