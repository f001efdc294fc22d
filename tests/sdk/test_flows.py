"""The pure layer on its own: actions in, outcomes out, a clock that moves when told to."""

import json
import sys
from types import SimpleNamespace

import pytest

from kvrelay import (
    APIConnectionError,
    APITimeoutError,
    Finished,
    InternalServerError,
    Queued,
    Retries,
    StreamInterrupted,
    TextDelta,
    Timeout,
)
from kvrelay._config import Config
from kvrelay._exchange import (
    Chunk,
    Emit,
    Eof,
    Failure,
    Head,
    Opened,
    Read,
    Send,
    Sleep,
    failure_of,
    failure_or_raise,
)
from kvrelay._flows import Flows
from kvrelay._wire import traceparent

SSE = Head(200, {"content-type": "text/event-stream; charset=utf-8", "x-request-id": "r"})
CUT = Failure("cut", "reset")


def text(content):
    return _frame({"choices": [{"index": 0, "delta": {"content": content}}]})


def _frame(data, name=""):
    event = f"event: {name}\n" if name else ""
    return f"{event}data: {json.dumps(data)}\n\n".encode()


STOP = _frame({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = b"data: [DONE]\n\n"


class Script:
    """Runs a flow: answers each Send and Read with the next outcome, records every action."""

    def __init__(self, *outcomes, timeout=None, retries=None):
        self.now = 100.0
        self.outcomes = list(outcomes)
        self.actions = []
        config = Config(
            "http://test",
            None,
            timeout or Timeout(connect=5, first_token=120, idle=30, total=600),
            retries or Retries(),
        )
        self.flows = Flows(config, clock=lambda: self.now, dice=lambda: 0.0)

    def chunk(self, *parts, after=1.0):
        self.outcomes.append((b"".join(parts), after))
        return self

    def run(self, flow):
        outcome = None
        while True:
            try:
                action = flow.send(outcome)
            except StopIteration as stop:
                return stop.value
            self.actions.append(action)
            outcome = self.answer(action)

    def answer(self, action):
        if isinstance(action, Sleep):
            self.now += action.seconds
        if not isinstance(action, Send | Read):
            return None
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, tuple):
            data, after = outcome
            self.now += after
            return Chunk(data, self.now)
        return outcome

    def stream(self):
        self.made = self.flows.stream("hi", {"model": "m"})
        self.run(self.made.flow)
        return self.made.state


def names(actions):
    return [type(action).__name__ for action in actions]


def test_a_stream_is_this_list_of_actions():
    script = Script(SSE).chunk(_frame({"position": 1}, "queued")).chunk(text("a"))
    script.chunk(text("b"), STOP).chunk(DONE)
    script.outcomes.append(Eof())
    state = script.stream()
    send, *rest = script.actions
    assert (send.connect_s, send.deadline) == (5, 220.0)
    assert rest == [
        Opened(),
        Read(130.0),
        Emit(Queued(1)),
        Read(131.0),
        Emit(TextDelta("a", "a")),
        Read(132.0),
        Emit(TextDelta("b", "ab")),
        Emit(Finished("stop")),
        Read(133.0),
        Read(104.25),
    ]
    assert state.final().text == "ab"
    assert state.timings().client_ttft_ms == 2000
    assert state.timings().client_itl_p50_ms == 1000


def test_a_retried_stream_is_this_list_of_actions():
    script = Script(Failure("connect", "refused"), Head(503, {"retry-after": "2"}), SSE, CUT, SSE)
    script.chunk(text("a"), STOP)
    script.outcomes.append(Eof())
    state = script.stream()
    assert names(script.actions) == [
        *("Send", "Sleep", "Send", "Sleep", "Send"),
        *("Opened", "Read", "Sleep", "Send"),
        *("Read", "Emit", "Emit", "Read"),
    ]
    assert [a.seconds for a in script.actions if isinstance(a, Sleep)] == [0.25, 2.0, 1.0]
    assert state.retries == 3
    # 0.25 + 2 + 1 s of pauses and 1 s for the chunk: retries count.
    assert state.timings().client_ttft_ms == 4250


def test_cuts_before_the_first_event_exhaust_the_retries():
    script = Script(SSE, CUT, SSE, CUT, retries=Retries(max=1))
    with pytest.raises(StreamInterrupted, match="reset"):
        script.stream()
    assert script.made.state.error is not None


def test_deadlines_shrink_to_what_is_left():
    script = Script(SSE, timeout=Timeout(connect=1, first_token=10, idle=30, total=40))
    script.chunk(_frame({}, "ping"), after=8.0).chunk(text("a"), after=1.0)
    script.chunk(text("b"), after=25.0).chunk(text("c"), after=20.0)
    with pytest.raises(APITimeoutError) as caught:
        script.stream()
    reads = [action.deadline for action in script.actions if isinstance(action, Read)]
    assert reads == [110, 110, 139, 140]
    assert (caught.value.phase, caught.value.partial) == ("total", "abc")


@pytest.mark.parametrize(
    ("failure", "cls"),
    [
        (Failure("connect", "x"), APIConnectionError),
        (Failure("connect_timeout", "x"), APITimeoutError),
        (Failure("timeout", "x"), APITimeoutError),
        (Failure("cut", "x"), APIConnectionError),
        (Head(500, {}), InternalServerError),
    ],
)
def test_the_last_outcome_becomes_the_error(failure, cls):
    script = Script(failure, retries=Retries(max=0))
    with pytest.raises(cls) as caught:
        script.run(script.flows.models())
    assert type(caught.value) is cls


def test_a_flow_refuses_an_answer_to_another_question():
    flow = Script().flows.models()
    next(flow)
    with pytest.raises(TypeError, match="driver"):
        flow.send(Eof())


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_exceptions_of_both_transports_mean_the_same(package):
    module = pytest.importorskip(package)
    for name, kind in {
        "ConnectError": "connect",
        "ConnectTimeout": "connect_timeout",
        "PoolTimeout": "connect_timeout",
        "ReadTimeout": "timeout",
        "WriteTimeout": "timeout",
        "ReadError": "cut",
        "RemoteProtocolError": "cut",
        "ProxyError": "cut",
        "DecodingError": "cut",
    }.items():
        assert failure_of(getattr(module, name)("why")).kind == kind
    assert failure_of(module.StreamClosed()).kind == "cut"
    assert failure_of(module.InvalidURL("x")) is None


def test_what_is_not_about_transport_is_left_alone():
    assert failure_of(TimeoutError()).kind == "timeout"
    with pytest.raises(ZeroDivisionError):
        failure_or_raise(ZeroDivisionError())


def test_traceparent_comes_from_an_active_span_only(monkeypatch):
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    assert traceparent() is None
    context = SimpleNamespace(is_valid=True, trace_id=0xABC, span_id=0x1, trace_flags=1)
    span = SimpleNamespace(get_span_context=lambda: context)
    fake = SimpleNamespace(get_current_span=lambda: span)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", fake)
    assert traceparent() == f"00-{0xABC:032x}-{1:016x}-01"
    context.is_valid = False
    assert traceparent() is None


def test_traceparent_of_the_real_library(server):
    trace = pytest.importorskip("opentelemetry.trace")
    from kvrelay import Client

    context = trace.SpanContext(7, 8, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)), Client(server.base_url) as client:
        client.chat("x", model="fake")
    assert server.requests[-1].headers["traceparent"] == f"00-{7:032x}-{8:016x}-01"


def test_the_path_is_known_from_the_header_alone():
    head = Head(200, {**SSE.headers, "x-kvrelay-path": "local; reason=short_prompt"})
    script = Script(head).chunk(text("a"), STOP)
    script.outcomes.append(Eof())
    assert script.stream().timings().path == "local"
