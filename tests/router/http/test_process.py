"""The router as a process: start, announce, drain, stop; and what keeps it from starting."""

import contextlib
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import httpx
import pytest
from ports import free_ports
from scripted_service import write_model_folder

from kvrelay_infra.host import accepts_connections
from kvrelay_protocol.errors import PortInUse, UsageError
from kvrelay_router.http.server import MAX_HEAD_BYTES, EdgeProtocol, check_tls, listen

PROGRAM = """
import json, sys
from pathlib import Path
from kvrelay_router.config import RouterConfig
from kvrelay_router.main import run
settings = json.loads(sys.argv[1])
for name in {"model_dir", "tls_cert", "tls_key"} & settings.keys():
    settings[name] = Path(settings[name])
sys.exit(run(RouterConfig(model_name="org/tiny", join_port=0, **settings)))
"""
CHAT = {"model": "org/tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


class Process:
    def __init__(self, **settings):
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(settings, default=str)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_serving(self):
        self.lines = []
        while line := self._process.stdout.readline():
            self.lines.append(line)
            if line.startswith("curl"):
                break
        self.url = re.search(r"https?://\S+?(?=/v1)", self.lines[-1])[0]
        return self

    def signal(self, number=signal.SIGTERM):
        self._process.send_signal(number)

    def end(self):
        out, err = self._process.communicate(timeout=60)
        return self._process.returncode, out, err

    def kill(self):
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(folder):
    started = []

    def start(**settings):
        started.append(Process(**{"model_dir": folder, "port": 0, **settings}))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_a_router_announces_itself_serves_and_stops(start):
    process = start().wait_until_serving()
    text = "".join(process.lines)
    assert re.search(r"^tokenizer +\d+\.\d\d s$", text, re.MULTILINE)
    assert "org/tiny, max context 512 tokens" in text
    assert re.search(r"workers join at +127\.0\.0\.1:\d+", text)
    health = httpx.get(f"{process.url}/health?verbose")
    assert (health.status_code, health.json()["workers"]) == (503, [])
    assert httpx.get(f"{process.url}/v1/models").json()["data"][0]["id"] == "org/tiny"
    assert "# TYPE" in httpx.get(f"{process.url}/metrics").text
    process.signal(signal.SIGINT)
    status, out, err = process.end()
    assert (status, err) == (0, "")
    assert "draining" in out
    assert out.endswith("stopped\n")


@pytest.mark.parametrize("signals", [1, 2])
def test_open_streams_get_the_grace_and_a_second_signal_ends_it(start, until, signals):
    # The longer ones end nothing while the test waits.
    grace = 0.5 if signals == 1 else 600.0
    process = start(queue_timeout_s=600, drain_grace_s=grace).wait_until_serving()
    with httpx.stream(
        "POST",
        f"{process.url}/v1/chat/completions",
        json=CHAT,
        timeout=60,
        headers={"x-stream-protocol": "1"},
    ) as reply:
        assert reply.status_code == 200  # queued: no worker has joined
        process.signal()
        if signals == 2:
            until(lambda: httpx.get(f"{process.url}/health").json()["phase"] == "draining")
            refused = httpx.post(f"{process.url}/v1/chat/completions", json=CHAT)
            answer = (refused.status_code, refused.json()["error"]["code"])
            assert answer == (503, "server_draining")
            process.signal()
        text = reply.read().decode()
    assert '"code":"server_draining"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert process.end()[0] == 0


def test_a_port_in_use_is_found_before_anything_else(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} "):
            listen("127.0.0.1", port)
        status, out, err = start(port=port, model_dir="/nowhere").end()
    assert (status, out) == (PortInUse.exit_code, "")
    assert err.count("\n") == 1
    assert f"port {port} " in err


def test_a_missing_folder_is_one_line_and_its_exit_code(start, tmp_path):
    status, _, err = start(model_dir=tmp_path).end()
    assert status == 3
    assert err.count("\n") == 1
    assert "config.json" in err


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls(start, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert,
         "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    process = start(tls_cert=cert, tls_key=key).wait_until_serving()
    assert process.url.startswith("https://127.0.0.1:")
    trusted = ssl.create_default_context(cafile=cert)
    assert httpx.get(f"{process.url}/v1/models", verify=trusted).status_code == 200
    process.signal()
    assert process.end()[0] == 0


def test_tls_files_are_checked_first(tmp_path):
    check_tls(None, None)
    with pytest.raises(UsageError, match="--tls-cert"):
        check_tls(None, tmp_path)
    with pytest.raises(UsageError, match="can't use TLS"):
        check_tls(tmp_path / "missing.pem", None)
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(UsageError, match="can't use TLS"):
        check_tls(tmp_path / "bad.pem", None)


def test_an_unknown_host_is_a_usage_error():
    with pytest.raises(UsageError, match="--host"):
        listen("no.such.host.invalid", 0)
    with pytest.raises(UsageError, match="can't listen"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("where", ["header", "path"])
def test_an_endless_head_is_refused(live, where):
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as connection:
        start = b"GET /health HTTP/1.1\r\nx-long: " if where == "header" else b"GET /health?"
        connection.sendall(start)
        sent = 0
        answer = b""
        try:
            while sent < 20 * MAX_HEAD_BYTES:
                connection.sendall(b"x" * 8192)
                sent += 8192
            answer = connection.recv(4096)
        except ConnectionError:
            answer = answer or b"HTTP/1.1 400"
        assert b"400" in answer.partition(b"\r\n")[0]


def raw(port, *pieces):
    """What comes back for these bytes, until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
        return received


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FOO / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: 1\r\n" % i for i in range(7000)) + b"\r\n",
    ],
    ids=["tls", "http2", "method", "length", "chunk", "header", "headers"],
)
def test_what_is_no_http_request_gets_the_same_error_shape(live, caplog, garbage):
    head, _, body = raw(live.port, garbage).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert head.count(b"HTTP/1.1") == 1
    assert b"x-request-id: req_" in head
    assert json.loads(body)["error"]["code"] == "invalid_value"
    assert not caplog.records


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost:",
        b"POST /tokenize HTTP/1.1\r\ncontent-type: application/json\r\nx-api-key: sk-test\r\ncontent-length: 500\r\n\r\n{",
    ],
    ids=["nothing", "head", "body"],
)
def test_a_client_that_never_finishes_its_request_is_disconnected(live, monkeypatch, beginning):
    monkeypatch.setattr(EdgeProtocol, "silence_s", 0.2)
    assert raw(live.port, beginning) == b""


def test_a_supervised_router_prints_its_phases_and_nothing_else(start):
    process = start(supervised=True, port=(port := free_ports(1)[0]))
    give_up = time.monotonic() + 60
    while not accepts_connections("127.0.0.1", port):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    httpx.get(f"http://127.0.0.1:{port}/v1/models")
    process.signal(signal.SIGINT)
    status, out, err = process.end()
    assert (status, err) == (0, "")
    assert [re.sub(r" +\d+\.\d\d s$", "", line) for line in out.splitlines()] == [
        "tokenizer",
        "listen for workers",
    ]


def test_log_requests_prints_a_line_for_each_and_no_prompt(start):
    process = start(log_requests=True).wait_until_serving()
    httpx.post(f"{process.url}/tokenize", json={"prompt": "SECRET"})
    process.signal()
    _, out, err = process.end()
    assert '"POST /tokenize HTTP/1.1" 200' in err
    assert "SECRET" not in out + err
