"""`chat` and `demo` against a scripted server: what is printed, what is sent, what Ctrl-C stops."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from kvrelay import Client, Finished, Queued, Started, TextDelta, Timings, Usage
from kvrelay.cli import demo
from kvrelay.cli.chat import Conversation
from kvrelay.cli.main import main
from kvrelay.cli.reply import Reply, card, stream_reply
from kvrelay.testing import FakeServer, delay, drop, status, timings
from kvrelay_protocol.errors import UsageError

ANSWER = (
    Started("disaggregated", "least_loaded", "prefill-0", "decode-0", 16, 40),
    TextDelta("Join"),
    TextDelta("s paths."),
    timings(path="disaggregated", prefill_worker="prefill-0", decode_worker="decode-0",
            kv_bytes=1572864, kv_transport="tcp/lo", kv_gbps=0.5, kv_exposed_ms=1.25, cached_tokens=16,
            tokens_per_second=200.0, reason="least_loaded"),
    Finished("stop"),
    Usage(40, 25, 65, 16),
)  # fmt: skip


@pytest.fixture
def server():
    with FakeServer(script=ANSWER) as running:
        yield running


@pytest.fixture
def piped(monkeypatch):
    def feed(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return feed


def test_the_card_says_what_happened(server, capsys):
    with Client(server.base_url) as client:
        reply = stream_reply(client, [{"role": "user", "content": "hi"}], {}, sys.stdout)
    assert capsys.readouterr().out == "Joins paths.\n"
    lines = card(reply).splitlines()
    assert re.fullmatch(r"  TTFT      \d+ ms from sending to the first text", lines.pop(1))
    assert lines == [
        "  path      disaggregated: prefill-0 → decode-0 (least_loaded)",
        "  speed     200.0 tokens/s, 25 tokens",
        "  KV moved  1.5 MiB over tcp/lo at 0.50 GB/s, 1.2 ms of it after the prefill",
        "  cached    16 of 40 prompt tokens",
        f"  trace     {reply.trace_id}",
    ]


def test_a_small_transfer_is_shown_by_its_time_not_as_a_rate():
    timings = Timings(kv_bytes=98_304, kv_transport="tcp/lo", kv_gbps=0.03, kv_transfer_ms=3.21)
    lines = card(Reply("", timings, None, None, False)).splitlines()
    assert "  KV moved  96 KiB over tcp/lo in 3.2 ms" in lines


def test_the_link_of_the_demo_is_really_probed():
    from kvrelay.cli.demo import _probe_link

    assert re.fullmatch(
        r"tcp/\w+ reaches \d+\.\d\d GB/s with messages of 8 MiB \(probed\)", _probe_link()
    )


def test_the_card_of_a_local_request_moves_no_kv():
    reply = Reply("", Timings(path="local", decode_worker="d", replays=1), None, None, False)
    assert card(reply).splitlines() == [
        "  path      local: d",
        "  replays   1 (a worker was lost)",
        "  trace     none",
    ]


def test_a_wait_in_the_queue_is_shown(capsys):
    script = [Queued(3), TextDelta("hi"), Finished("stop")]
    with FakeServer(script=script) as server, Client(server.base_url) as client:
        stream_reply(client, [{"role": "user", "content": "x"}], {}, sys.stdout)
    assert capsys.readouterr().out == "(waiting, number 3)\nhi\n"


def test_ctrl_c_stops_the_reply_here_and_on_the_server(capsys):
    class InterruptedOut(io.TextIOBase):
        """Ctrl-C a moment after the first word, when the reply waits for the next."""

        def write(self, text: str) -> int:
            if text == "partial":
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            return sys.stdout.write(text)

    script = [TextDelta("partial"), delay(600), Finished("stop")]
    with FakeServer(script=script) as server, Client(server.base_url) as client:
        reply = stream_reply(client, [{"role": "user", "content": "x"}], {}, InterruptedOut())
        assert reply.stopped
        assert reply.text == "partial"
        assert server.chats()[0].client_left()
    assert capsys.readouterr().out == "partial [stopped]\n"


def test_piped_lines_are_one_conversation(server, piped, capsys):
    piped("one\n\ntwo\n")
    arguments = ["--base-url", server.base_url, "--system", "be brief", "--seed", "7"]
    assert main(["chat", *arguments]) == 0
    assert capsys.readouterr().out == "Joins paths.\nJoins paths.\n"
    body = server.chats()[1].json
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "Joins paths."),
        ("user", "two"),
    ]
    assert (body["seed"], body["max_tokens"], body["model"]) == (7, 512, "fake")


def test_commands(server, piped, capsys, tmp_path):
    saved = tmp_path / "talk.json"
    piped(
        f"/trace\nhello\n/trace\n/save {saved}\n/save\n/modle\n/model nope\n/reset\nagain\n/quit\nno"
    )
    assert main(["chat", "--base-url", server.base_url]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["nothing was asked yet", "Joins paths."]
    assert "  path      disaggregated: prefill-0 → decode-0 (least_loaded)" in out
    assert out[-7:] == [
        f"saved 2 messages to {saved}",
        "usage: /save FILE",
        "unknown command /modle; did you mean /model?",
        "unknown model nope",
        "model fake; served here: fake",
        "new conversation",
        "Joins paths.",
    ]
    assert json.loads(saved.read_text())["messages"][0] == {"role": "user", "content": "hello"}
    assert len(server.chats()) == 2
    assert len(server.chats()[1].json["messages"]) == 1


def test_another_model_can_be_chosen(piped):
    with FakeServer(models=["a", "b"]) as server:
        piped("/model b\nhi\n")
        assert main(["chat", "--base-url", server.base_url]) == 0
        assert server.chats()[0].json["model"] == "b"


def test_a_failed_turn_leaves_no_trace_in_the_conversation():
    with FakeServer() as server, Client(server.base_url) as client:
        server.queue(status(400, "too long", code="context_length_exceeded"))
        conversation = Conversation(client, {"model": "fake"}, io.StringIO())
        with pytest.raises(Exception, match="too long"):
            conversation.say("x")
        assert conversation.messages == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (status(401, "no such key", code="invalid_api_key"), "no such key"),
        ([TextDelta("half"), drop()], "kvrelay: "),
    ],
)
def test_an_error_on_piped_input_is_one_line_and_exit_1(script, message, server, piped, capsys):
    server.queue(script)
    piped("hi\n")
    assert main(["chat", "--base-url", server.base_url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_server_that_is_not_there_is_one_line(piped, capsys):
    assert main(["chat", "--base-url", "http://127.0.0.1:9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvrelay: ")


def read_until(descriptor: int, pattern: bytes, timeout_s: float = 60.0) -> bytes:
    deadline = time.monotonic() + timeout_s
    seen = b""
    os.set_blocking(descriptor, False)
    while time.monotonic() < deadline:
        try:
            seen += os.read(descriptor, 4096)
        except (BlockingIOError, OSError):
            time.sleep(0.02)
        if re.search(pattern, seen):
            return seen
    pytest.fail(f"no {pattern!r} in {seen!r}")


def test_in_a_terminal_ctrl_c_stops_the_reply_and_ctrl_d_ends():
    slow = [TextDelta("working"), delay(600), Finished("stop")]
    with FakeServer() as server:
        server.queue(slow)
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "kvrelay.cli", "chat", "--base-url", server.base_url],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        try:
            read_until(ours, "› ".encode())
            os.write(ours, b"hello\n")
            read_until(ours, b"working")
            process.send_signal(signal.SIGINT)
            read_until(ours, rb"\[stopped\]")
            os.write(ours, b"again\n")
            read_until(ours, b"Hello world")
            os.write(ours, b"\x04")
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)


@pytest.fixture
def ready_stack(monkeypatch, server):
    """The demo's stack, already there."""
    seen = []

    def plan(values):
        seen.append(values)
        return SimpleNamespace(name="fake", fleet=None)

    monkeypatch.setattr(demo, "plan_stack", plan)
    monkeypatch.setattr(demo, "describe", lambda _plan: "a fake")
    monkeypatch.setattr(
        demo,
        "LocalStack",
        lambda *_: nullcontext(
            SimpleNamespace(
                base_url=server.base_url, last_lines=lambda _count: ["  [router] a warning"]
            )
        ),
    )
    monkeypatch.setattr(demo, "exit_on_sigterm", lambda: None)
    monkeypatch.setattr(demo, "_probe_link", lambda: "tcp/lo reaches 2.00 GB/s")
    return seen


def test_the_demo_asks_once_and_ends_when_not_on_a_terminal(ready_stack, server, piped, capsys):
    piped("never read\n")
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "> What does os.path.join do?" in out
    assert "Joins paths." in out
    assert "KV moved  1.5 MiB over tcp/lo at 0.50 GB/s" in out
    assert "link      tcp/lo reaches 2.00 GB/s" in out
    (chat,) = server.chats()
    assert chat.json["temperature"] == 0
    (values,) = ready_stack
    assert (values.port, values.join_port, values.api_key) == (0, 0, ())


def test_the_demo_offers_the_prompt_again_on_a_terminal(ready_stack, server, monkeypatch):
    answers = iter([True, True, True, True])
    terminal = SimpleNamespace(isatty=lambda: next(answers))
    monkeypatch.setattr(demo.sys, "stdin", terminal)
    monkeypatch.setattr(demo.sys.stdout, "isatty", lambda: True, raising=False)
    typed = iter(["another", ""])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(typed))
    assert main(["demo", "--prompt", "first"]) == 0
    asked = [chat.json["messages"][0]["content"] for chat in server.chats()]
    assert asked == ["first", "another"]


def test_a_failing_demo_exits_1(ready_stack, server, piped, capsys):
    server.queue(status(400, "no"))
    piped("")
    assert main(["demo"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("kvrelay: ")
    assert err[1] == "  [router] a warning"


def test_chat_talks_to_the_server_that_runs_already(server, piped, capsys, monkeypatch):
    monkeypatch.setattr("kvrelay.cli.chat.DEFAULT_BASE_URL", server.base_url)
    model = {"id": "fake", "object": "model", "owned_by": "kvrelay"}
    server.queue(status(200, body={"object": "list", "data": [model]}), path="/v1/models")
    piped("hi\n")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == f"kvrelay chat, fake at {server.base_url}\nJoins paths.\n"


@pytest.mark.parametrize("arguments", [["--decode", "2"], ["some/model"], ["--device", "cpu"], []])
def test_chat_starts_its_own_stack_where_one_is_asked_for_or_nobody_answers(
    server, monkeypatch, arguments
):
    # A server of somebody else's, for the run without arguments.
    monkeypatch.setattr("kvrelay.cli.chat.DEFAULT_BASE_URL", server.base_url)
    theirs = {"id": "fake", "object": "model", "owned_by": "somebody"}
    server.queue(status(200, body={"object": "list", "data": [theirs]}), path="/v1/models")

    def refuse(values):
        raise UsageError("would start a stack")

    monkeypatch.setattr("kvrelay.cli.chat._OwnServer", refuse)
    assert main(["chat", *arguments]) == 2
    assert server.chats() == []
