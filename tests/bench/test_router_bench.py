"""`kvrelay bench router` in small: real router process, mock workers, exact tokens."""

import json

import pytest

from kvrelay_bench.router.command import COMMAND
from kvrelay_bench.router.load_client import Exchange, arrivals_of_tokens, check
from kvrelay_bench.router.measure import evaluate
from kvrelay_bench.router.stack import Seen
from kvrelay_bench.router.workload import Workload, answer_ids, text_tokens
from kvrelay_protocol.errors import UsageError
from kvrelay_protocol.model_files import DEMO_MODEL_DIR
from kvrelay_router.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL_DIR / "tokenizer.json")


@pytest.fixture(scope="module")
def table(tokenizer):
    return text_tokens(tokenizer)


def a_workload(**change):
    fields = {
        "name": "t", "requests": 1, "rate": 0.0, "tokens": 3, "step_s": 0.01, "prefill_s": 0.0,
        "path": "local", "prompt_words": 3, "seed": 1,
    }  # fmt: skip
    return Workload(**{**fields, **change})


def resolved(**given):
    from kvrelay.cli.settings import resolve

    return resolve(COMMAND.flags, given, environ={})


def test_every_request_gets_exactly_its_tokens(tmp_path, capsys):
    out = tmp_path / "router.json"
    values = resolved(
        rate="40", duration="0.5", tokens="5", streams="4", stream_tokens="30", step="0.005",
        out=str(out),
    )  # fmt: skip
    assert COMMAND.run(values) == 0, capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"latency", "floor", "paced", "saturated"}
    for row in rows.values():
        assert (row["errors"], row["lost_tokens"], row["first_error"]) == (0, 0, "")
    for name in ("latency", "floor"):
        assert rows[name]["requests"] == 20
        assert rows[name]["added_ms"]["count"] == 20
        assert rows[name]["added_ms"]["minimum"] > 0
    assert rows["saturated"]["router_cpu_s"] > 0
    assert "added p50" in capsys.readouterr().out


def test_requests_the_model_cannot_serve_are_refused_before_anything_starts():
    with pytest.raises(UsageError, match=r"saturated part needs .* --stream-tokens"):
        COMMAND.run(resolved(only="saturated", stream_tokens="5000"))


def answer_to(table, tokenizer, workload, *, skip=()):
    ids = answer_ids(table, 0, workload.tokens)
    events = [
        {"choices": [{"delta": {"content": tokenizer.decode([token])}}]}
        for at, token in enumerate(ids)
        if at not in skip
    ]
    events.append({"choices": [], "usage": {"completion_tokens": workload.tokens}})
    body = "".join(f"data: {json.dumps(e, separators=(',', ':'))}\n\n" for e in events)
    body += "data: [DONE]\n\n"
    return f"HTTP/1.1 200 OK\r\n\r\n{len(body):x}\r\n{body}\r\n0\r\n\r\n".encode()


def test_a_lost_token_is_found(tokenizer, table):
    workload = a_workload()
    whole = Exchange(0, pieces=[(1, answer_to(table, tokenizer, workload))])
    assert check(whole, workload, table, tokenizer) == [1, 1, 1]
    assert arrivals_of_tokens(whole, [1, 1, 1]) == [1, 1, 1]
    assert not whole.error
    holed = Exchange(0, pieces=[(1, answer_to(table, tokenizer, workload, skip={1}))])
    assert check(holed, workload, table, tokenizer) == []
    assert holed.error == "another text than its tokens"


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"", "no answer"), (b"HTTP/1.1 503 Busy\r\n\r\n{}", "503"), (b"HTTP/1.1 200 OK\r\n\r\n", "not the stream")],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error(tokenizer, table, raw, words):
    exchange = Exchange(0, pieces=[(1, raw)])
    assert check(exchange, a_workload(), table, tokenizer) == []
    assert words in exchange.error


def test_what_the_mock_waited_is_not_added_latency():
    exchange = {"request": 0, "due": 0, "sent": 1_000_000, "arrived": [9_000_000, 12_000_000],
                "events": 2, "error": ""}  # fmt: skip
    marks = {"begin": [0, 1.0, 0.0], "end": [20_000_000, 1.5, 0.1]}
    workers = {"submitted": [[0, 3_000_000]], "answered": [[0, 8_000_000]],
               "steps": [11_000_000], "joined": [[0, [0, 1]]]}  # fmt: skip
    workload = a_workload(rate=1.0, tokens=2)
    result = evaluate(workload, Seen({"exchanges": [exchange], "marks": marks}, workers))
    assert result.added_ms.median == pytest.approx(2.0 + 1.0)
    assert result.relay_ms.median == pytest.approx(1.0)
    assert result.cpu_us_per_request == pytest.approx(0.5e6)
    assert result.lost_tokens == 0
