"""`kvrelay bench serve`: traces, arrivals, arithmetic, and a run against real workers over HTTP."""

import asyncio
import contextlib
import itertools
import json
import math
import random
import socket
import statistics
from pathlib import Path

import pytest
from http_stack import http_stack
from tiny_models import tiny_model

from kvrelay.cli.settings import resolve
from kvrelay_bench.serve.client import Answer, CompletionClient, Outcome
from kvrelay_bench.serve.command import COMMAND
from kvrelay_bench.serve.load import Load, LoadRun, Sample
from kvrelay_bench.serve.metrics import Objectives, measure, parse_objectives, requests_of
from kvrelay_bench.serve.run import measure_loads, plan_loads, plan_requests, run_serve
from kvrelay_bench.serve.stack import fetch_target
from kvrelay_bench.serve.traces import read_trace
from kvrelay_bench.serve.workload import (
    Lengths,
    PlannedRequest,
    Prompts,
    clip,
    completion_body,
    parse_lengths,
    poisson,
    synthetic,
)
from kvrelay_protocol.errors import UsageError

SAMPLE = Path(__file__).parents[2] / "docs" / "sample-trace.jsonl"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05.9799600,110,0
"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
    {"timestamp": 3000, "input_length": 1300, "output_length": 9, "hash_ids": [7, 8, 10]},
]


def flags(**given):
    return resolve(COMMAND.flags, given, environ={})


# -- traces


def test_an_azure_trace_starts_at_zero_and_keeps_pauses_and_lengths(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    rows = read_trace(path)
    assert [r.arrival_s for r in rows] == pytest.approx([0.0, 0.052, 2.0], abs=1e-6)
    assert [(r.input_tokens, r.output_tokens) for r in rows] == [(4808, 10), (3180, 8), (110, 1)]
    assert [r.number for r in rows] == [0, 1, 2]
    faster = read_trace(path, limit=2, speed_up=4, divide=8)
    assert faster[1].arrival_s == pytest.approx(0.013, abs=1e-6)
    assert [(r.input_tokens, r.output_tokens) for r in faster] == [(601, 1), (398, 1)]


def test_equal_hash_ids_of_a_mooncake_trace_are_equal_tokens(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(map(json.dumps, MOONCAKE)))
    first, second = read_trace(path)
    assert second.arrival_s == 3.0
    prompts = Prompts(1000, seed=5)
    one, two = prompts.tokens(first), prompts.tokens(second)
    assert (len(one), len(two)) == (1100, 1300)
    assert one[:1024] == two[:1024]
    assert one[1024:] != two[1024 : len(one)]
    assert one == Prompts(1000, seed=5).tokens(first)
    assert one[:512] != Prompts(1000, seed=6).tokens(first)[:512]


def test_the_sample_trace_has_chats_that_share_a_beginning_and_fits_the_demo_model():
    rows = read_trace(SAMPLE)
    assert len(rows) == 24
    assert sum(row.blocks[:1] == (1,) for row in rows) > len(rows) / 2
    assert all(row.input_tokens + row.output_tokens <= 2048 for row in rows)
    assert 10 < rows[-1].arrival_s < 30


def test_shared_blocks_shrink_with_the_lengths(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(map(json.dumps, MOONCAKE)))
    first, second = read_trace(path, divide=32)
    assert (first.input_tokens, first.block_tokens) == (34, 16)
    prompts = Prompts(1000)
    one, two = prompts.tokens(first), prompts.tokens(second)
    assert one[:32] == two[:32]
    assert one[32:] != two[32:34]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "neither"),
        ("a,b,c\n", "neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        (AZURE + "2023-11-16 18:17:06,12\n", "line 5: 2 columns"),
        (AZURE + "soon,12,13\n", "line 5"),
        (AZURE + "2023-11-16 18:17:06,-4,13\n", "line 5: a length of -4"),
        ('{"timestamp": 0, "input_length": 3}\n', "line 1: lacks 'output_length'"),
        ('{"timestamp": 0\n', "line 1"),
    ],
)
def test_a_bad_trace_is_one_line_that_says_where(tmp_path, text, problem):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_trace(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- workload


def test_poisson_arrivals_are_repeatable_and_have_the_asked_rate():
    requests = synthetic(4001, Lengths(4, 9), Lengths(2, 2))
    assert {r.input_tokens for r in requests} == set(range(4, 10))
    times = [r.arrival_s for r in poisson(requests, 5.0, seed=1)]
    assert times[0] == 0.0
    assert times == [r.arrival_s for r in poisson(requests, 5.0, seed=1)]
    assert times != [r.arrival_s for r in poisson(requests, 5.0, seed=2)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1)
    # Exponential gaps: the deviation is the mean, and a share of 1/e is longer than it.
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)


def test_prompts_have_the_exact_length_and_ids_the_model_knows():
    prompts = Prompts(20)
    tokens = prompts.tokens(PlannedRequest(0, 0.0, 5000, 1))
    assert len(tokens) == 5000
    assert set(tokens) == set(range(3, 20))
    assert tokens[:50] != prompts.tokens(PlannedRequest(1, 0.0, 5000, 1))[:50]


def test_clipping_cuts_prompts_first_at_their_own_limit_then_answers_at_the_context():
    requests = [PlannedRequest(0, 1.0, 100, 50), PlannedRequest(1, 2.0, 10, 5)]
    cut = clip(requests, max_input=60, max_output=30, max_context=70)
    assert cut.cut == 1
    assert [(r.input_tokens, r.output_tokens) for r in cut.requests] == [(60, 10), (10, 5)]
    assert [r.arrival_s for r in cut.requests] == [1.0, 2.0]
    (whole,) = clip(requests[:1], max_context=40).requests
    assert (whole.input_tokens, whole.output_tokens) == (39, 1)


@pytest.mark.parametrize("bad", ["0", "x", "9-3", "-4", "3-", ""])
def test_a_length_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="number of tokens"):
        parse_lengths(bad)


def test_the_flags_decide_what_is_run(tmp_path):
    def names(**given):
        values = flags(**given)
        return [(p.name, p.users) for p in plan_loads(values, plan_requests(values))]

    assert names() == [("2/s Poisson", None)]
    assert names(rate=["1", "2.5"]) == [("1/s Poisson", None), ("2.5/s Poisson", None)]
    assert names(concurrency=["4"]) == [("4 users", 4)]
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    shrunk = {"trace": str(path), "speed_up": "2", "divide_lengths": "10"}
    assert names(**shrunk) == [("trace azure.csv, 2x as fast, lengths / 10", None)]
    assert names(trace=str(path), rate=["3"]) == [("3/s Poisson", None)]
    with pytest.raises(UsageError, match="exclude each other"):
        run_serve(flags(rate=["1"], concurrency=["1"]))
    with pytest.raises(UsageError, match="--served-model-name"):
        run_serve(flags(base_url="http://127.0.0.1:1", model="tiny"))


# -- arithmetic


def sample(number, *, outcome=Outcome.OK, due=0.0, sent=0.0, chunks=(), ended=0.0, **fields):
    answer = Answer(sent=sent, chunks=list(chunks), ended=ended, outcome=outcome, **fields)
    return Sample(PlannedRequest(number, due, 10, 4), due, answer)


def test_latencies_follow_their_definitions():
    run = LoadRun(1, began=100.0, ended=110.0, client_cpu_s=1.0)
    run.samples = [
        sample(0, due=100.0, sent=100.5, chunks=[101.5, 102.0, 103.0], ended=103.5,
               completion_tokens=3, prompt_tokens=10, cached_tokens=4),
    ]  # fmt: skip
    point = measure("x", run)
    found = {name: q.p50 for name, q in point.latencies.items()}
    assert found == {"ttft": 1.0, "itl": 0.75, "tpot": 1.0, "e2e": 3.0}
    assert point.client_lag.p50 == 0.5
    assert point.seconds == 3.5
    assert point.output_tokens_per_s == pytest.approx(3 / 3.5)
    assert point.total_tokens_per_s == pytest.approx(13 / 3.5)
    assert point.cached_prompt_share == 0.4
    assert point.client_cpu_share == pytest.approx(0.1)
    assert point.short_answers == 1  # 3 of 4 tokens
    (row,) = requests_of(run)
    assert (row["sent_s"], row["first_s"], row["outcome"]) == (0.5, 1.5, "ok")


def test_goodput_counts_every_failure_as_a_miss():
    good = {"chunks": [0.1, 0.2], "ended": 0.2, "completion_tokens": 2}
    run = LoadRun(6, began=0.0, ended=4.0)
    run.samples = [
        sample(0, **good),
        sample(1, chunks=[0.9, 1.0], ended=1.0, completion_tokens=2),  # TTFT too long
        sample(2, chunks=[0.1, 2.0], ended=2.0, completion_tokens=2),  # TPOT too long
        sample(3, outcome=Outcome.REJECTED, ended=0.01),
        sample(4, outcome=Outcome.ABORTED, chunks=[0.1, 0.2], ended=0.2),
        sample(5, outcome=Outcome.FAILED, ended=4.0),
        sample(6, outcome=Outcome.STOPPED, chunks=[0.1]),  # ours, not the server's
        sample(7, chunks=[0.3], ended=0.3, completion_tokens=1),  # one token has no TPOT
    ]
    point = measure("x", run, parse_objectives("ttft=500ms,tpot=1s"))
    assert (point.sent, point.good) == (7, 2)
    assert point.goodput == pytest.approx(2 / 4.0)
    assert point.outcomes == {"ok": 4, "rejected": 1, "aborted": 1, "failed": 1}
    assert point.latencies["ttft"].count == 4  # of those that ended well
    assert point.objectives == "TTFT <= 500 ms, TPOT <= 1000 ms"


def test_nothing_but_failures_has_no_latencies_and_no_goodput():
    run = LoadRun(1, began=0.0, ended=1.0)
    run.samples = [sample(0, outcome=Outcome.FAILED, ended=1.0)]
    point = measure("x", run, parse_objectives("e2e=1m"))
    assert set(point.latencies.values()) == {None}
    assert (point.good, point.goodput, point.output_tokens_per_s) == (0, 0.0, 0.0)


def test_tokens_that_came_together_void_the_itl():
    def share(chunks, tokens, counts=()):
        run = LoadRun(1, began=0.0, ended=9.0)
        run.samples = [
            sample(0, chunks=chunks, ended=9.0, completion_tokens=tokens, counts=list(counts))
        ]
        return measure("x", run).single_token_share

    assert share([1.0, 2.0, 3.0, 4.0], 4) == 1.0
    assert share([1.0, 2.0, 2.0, 3.0], 4) == 0.5  # two pieces in one read
    assert share([1.0, 2.0, 3.0], 4) == 0.5  # one piece with two tokens
    assert share([1.0, 2.0], 8, [1, 8]) == pytest.approx(1 / 8)


def test_a_saturated_client_and_late_sends_are_said():
    run = LoadRun(1, began=0.0, ended=1.0, client_cpu_s=0.95)
    run.samples = [sample(0, sent=0.2, chunks=[0.3], ended=0.4, completion_tokens=4)]
    warnings = " ".join(measure("x", run).warnings)
    assert "95% of a core" in warnings
    assert "p99 200 ms" in warnings


@pytest.mark.parametrize("bad", ["ttft", "ttft=", "itl=5ms", "ttft=5ms,,tpot=1s", "ttft=-1s"])
def test_objectives_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        parse_objectives(bad)


def test_no_limit_means_any_answer_with_text_is_good():
    assert Objectives(()).met(sample(0, chunks=[1.0], ended=1.0).answer)
    assert not Objectives(()).met(sample(0, ended=1.0).answer)


# -- the client, against servers that behave badly


@contextlib.asynccontextmanager
async def raw_server(*replies):
    """Answers one request of a connection with each reply, then closes it."""
    left, serving = list(replies), []

    async def serve(reader, writer):
        serving.append(asyncio.current_task())
        with (
            contextlib.closing(writer),
            contextlib.suppress(asyncio.IncompleteReadError, ConnectionError),
        ):
            while left:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                await reader.readexactly(size)
                writer.write(left.pop(0))
                await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0)  # closed connections are taken off the loop in its next turn


LONG = 20_000
"""Tokens that outlast a test on any machine."""
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def frames(*documents, chunk_size=7):
    """A chunked body cut where no event ends."""
    text = "".join(f"data: {d if isinstance(d, str) else json.dumps(d)}\n\n" for d in documents)
    data = text.encode()
    pieces = [data[i : i + chunk_size] for i in range(0, len(data), chunk_size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in [*pieces, b""])


def piece(text, reason=None, **more):
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}], **more}


USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
GOOD = frames(
    piece("a"), piece("b"), piece("", "length"), {"choices": [], "usage": USAGE}, "[DONE]"
)


async def one(reply):
    async with raw_server(reply) as url:
        client = CompletionClient(url)
        answer = await client.complete(b"{}")
        client.close()
        return answer


async def test_a_stream_cut_into_arbitrary_pieces_is_read_whole():
    answer = await one(STREAM + GOOD)
    assert answer.outcome is Outcome.OK
    assert len(answer.chunks) == 2
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens) == (2, 9, 4)
    assert answer.sent <= answer.chunks[0] <= answer.ended


async def test_a_body_that_ends_with_the_connection_is_whole_once_it_said_done():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    body = f"data: {json.dumps(piece('a', 'stop'))}\n\n".encode()
    assert (await one(head + body + b"data: [DONE]\n\n")).outcome is Outcome.OK
    cut = await one(head + body)
    assert cut.outcome is Outcome.ABORTED
    assert "cut" in cut.problem


@pytest.mark.parametrize(
    ("reply", "outcome", "problem"),
    [
        (b"HTTP/1.1 429 No\r\nContent-Length: 33\r\n\r\n" + b'{"error": {"message": "too many"}}'[:33],
         Outcome.REJECTED, "429"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 34\r\n\r\n" + b'{"error": {"message": "too many"}}',
         Outcome.REJECTED, "503 too many"),
        (b"HTTP/1.1 400 No\r\nContent-Length: 3\r\n\r\nbad", Outcome.FAILED, "400 bad"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Outcome.FAILED, "200"),
        (STREAM + frames(piece("a"), {"error": {"message": "worker lost"}}, "[DONE]"),
         Outcome.ABORTED, "worker lost"),
        (STREAM + frames(piece("a"), "[DONE]"), Outcome.ABORTED, "finish_reason"),
        (STREAM + GOOD[:40], Outcome.ABORTED, "cut"),
        (b"nonsense\r\n\r\n", Outcome.ABORTED, "no HTTP response"),
        (b"", Outcome.FAILED, "without an answer"),
    ],
)  # fmt: skip
async def test_every_way_to_fail_is_told_apart(reply, outcome, problem):
    answer = await one(reply)
    assert answer.outcome is outcome
    assert problem in answer.problem


async def test_a_refused_connection_is_a_failure():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        answer = await CompletionClient(f"http://127.0.0.1:{port}").complete(b"{}")
    assert answer.outcome is Outcome.FAILED
    assert "no connection" in answer.problem


async def test_a_request_that_takes_too_long_is_aborted():
    async with raw_server(STREAM, b"never asked for") as url:
        client = CompletionClient(url, timeout_s=0.1)
        answer = await client.complete(b"{}")
        assert not client._idle
    assert answer.outcome is Outcome.ABORTED
    assert "0.1 s" in answer.problem


async def test_a_connection_is_kept_and_replaced_when_the_server_closed_it():
    async with raw_server(STREAM + GOOD, STREAM + GOOD, STREAM + GOOD) as url:
        client = CompletionClient(url)
        first = await client.complete(b"{}")
        (kept,) = client._idle
        second = await client.complete(b"{}")
        assert list(client._idle) == [kept]
        kept.abort()
        third = await client.complete(b"{}")
        client.close()
    assert {a.outcome for a in (first, second, third)} == {Outcome.OK}


# -- against real workers


async def test_a_run_against_real_workers_gives_exact_lengths_in_a_report(tmp_path, capsys):
    out = tmp_path / "result.json"
    values = flags(
        rate=["40"], requests="8", input_len="20-60", output_len="6", warmup="2",
        slo="ttft=30s,tpot=10s", out=str(out),
    )  # fmt: skip
    async with http_stack() as url:
        target = await asyncio.to_thread(fetch_target, url, vocabulary=256)
        assert (target.model, target.max_context) == ("tiny", 2048)
        (measured,) = await measure_loads(values, target, plan_loads(values, plan_requests(values)))
        users = flags(concurrency=["3"], requests="6", output_len="4", out=str(tmp_path / "2.json"))
        (closed,) = await measure_loads(users, target, plan_loads(users, plan_requests(users)))
    point = measured.point
    assert (point.sent, point.good) == (8, 8)
    assert point.outcomes == {"ok": 8}
    assert point.short_answers == 0
    assert point.latencies["ttft"].count == 8
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert all(20 <= r["input_tokens"] <= 60 for r in row["requests"])
    assert {r["output_tokens"] for r in row["requests"]} == {6}
    assert {r["path"] for r in row["requests"]} == {"disaggregated"}
    assert "api_key" not in report["arguments"]
    assert closed.point.outcomes == {"ok": 6}
    assert _most_at_once(closed.run) <= 3
    assert "goodput" in capsys.readouterr().out


def _most_at_once(run):
    changes = [(s.answer.sent, 1) for s in run.samples] + [
        (s.answer.ended, -1) for s in run.samples
    ]
    level = most = 0
    for _, change in sorted(changes):
        level += change
        most = max(most, level)
    return most


async def test_an_interrupted_run_keeps_what_had_ended_and_the_server_forgets_the_rest():
    stop = asyncio.Event()

    class StoppingClient(CompletionClient):
        """Interrupts the run when the three short answers are there."""

        answers = 0

        async def complete(self, body, answer=None):
            given = await super().complete(body, answer)
            self.answers += 1
            if self.answers == 3:
                stop.set()
            return given

    # The fourth answer lasts far longer than the others, and the fifth is never asked for.
    async with http_stack(tiny_model("llama3", max_position_embeddings=LONG), prefill=0) as url:
        client = StoppingClient(url)
        prompts = Prompts(256)

        def encode(request):
            return completion_body("tiny", prompts.tokens(request), request.output_tokens)

        requests = [PlannedRequest(i, 0.0 if i < 4 else 600.0, 8, LONG - 8 if i == 3 else 2)
                    for i in range(5)]  # fmt: skip
        run = await Load(client, encode, stop=stop).open_loop(requests)
        client.close()
        point = measure("x", run)
    assert run.interrupted
    assert len(run.samples) == 4
    assert run.samples[3].answer.outcome is Outcome.STOPPED
    assert point.outcomes == {"ok": 3}
    assert "interrupted" in " ".join(point.warnings)


async def test_equal_blocks_of_a_trace_hit_the_prefix_cache():
    blocks = tuple(range(4))
    requests = [PlannedRequest(i, 0.0, 70, 2, blocks, 16) for i in range(3)]
    async with http_stack(prefill=0) as url:
        client = CompletionClient(url)
        prompts = Prompts(256)
        run = await Load(
            client, lambda r: completion_body("tiny", prompts.tokens(r), 2, salt="a")
        ).closed_loop(requests, 1)
        other = await client.complete(
            completion_body("tiny", prompts.tokens(requests[0]), 2, salt="b")
        )
        client.close()
    assert [s.answer.cached_tokens for s in run.samples] == [0, 64, 64]
    assert other.cached_tokens == 0


async def test_tokens_are_counted_in_every_chunk_when_asked_for():
    async with http_stack(prefill=0) as url:
        client = CompletionClient(url)
        body = completion_body("tiny", [5] * 8, 30, count_tokens=True)
        answer = await client.complete(body)
        client.close()
    assert answer.outcome is Outcome.OK
    assert len(answer.counts) == len(answer.chunks)
    assert answer.counts == sorted(set(answer.counts))
    assert answer.counts[-1] <= answer.completion_tokens == 30


def test_a_server_that_is_not_there_is_one_clear_line():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UsageError, match="gives no models"):
            fetch_target(url, vocabulary=100)


# -- the plot


def test_the_plot_is_drawn_from_the_runs(tmp_path):
    pytest.importorskip("matplotlib")
    from kvrelay_bench.serve.charts import draw

    generator = random.Random(0)
    runs = {}
    for load in ("1/s", "2/s"):
        run = LoadRun(9, began=0.0, ended=9.0)
        for number in range(9):
            times = sorted(generator.uniform(number, number + 1) for _ in range(4))
            run.samples.append(sample(number, sent=float(number), chunks=times, ended=number + 1.0))
        run.samples.append(sample(9, outcome=Outcome.FAILED, sent=1.0, ended=2.0))
        runs[load] = run
    path = tmp_path / "plot.svg"
    draw(path, runs, title="a title")
    text = path.read_text()
    assert "<svg" in text
    assert draw(path, {"empty": LoadRun(0)}, title="nothing") is None
